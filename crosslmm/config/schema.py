"""What a setting is: its role in a run, the types that settings share, and the base of all sections."""

import enum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class Role(enum.Enum):
    """What may happen to a setting after a run has begun. Every setting is either FIXED or FREE."""

    FIXED = "determines the samples, their order or the weights: a resume with another value is refused"
    FREE = "may differ at each start of a run or sweep: where and how fast it executes, or differences of rounding"
    COMPARED = "free for a run, but fixed for a sweep, since it decides how trials are compared"
    FEATURES = "changes what the frozen vision encoder computes: trials of a sweep that searches it share no features"
    NOT_SEARCHED = "names where a run's files and records go: cannot be a dimension of a search space"


FIXED, FREE, COMPARED, FEATURES, NOT_SEARCHED = Role


def setting(default: Any, *roles: Role) -> Any:
    """Return a field with this default value and these roles."""
    return Field(default, json_schema_extra={"roles": [role.name for role in roles]})


Count = Annotated[int, Field(ge=1, le=10**15)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0)]
Limit = Annotated[float, Field(gt=0)]
# The syntax of Kubernetes and Ray: an optional domain, a slash, a name.
LabelKey = Annotated[
    str, Field(pattern=r"^([a-zA-Z0-9][a-zA-Z0-9.-]*/)?[a-zA-Z0-9]([\w.-]*[a-zA-Z0-9])?$", max_length=316)
]
LabelValue = Annotated[str, Field(pattern=r"^[a-zA-Z0-9]([\w.-]*[a-zA-Z0-9])?$", max_length=63)]
Labels = dict[LabelKey, LabelValue]
"""Labels of a node, or labels that a node must have."""


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, and values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested values: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
