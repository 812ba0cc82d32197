"""The roles of settings: which of them may differ between two configurations."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from crosslmm.config.run import RunConfig
from crosslmm.config.schema import FREE, Role, Section, flatten


def settings_of(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the pydantic field of every setting, those of nested sections included."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from settings_of(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def roles_of(key: str) -> frozenset[Role]:
    """Return the roles of a dotted key, which may also lie inside a setting (`model.vision.hidden_size`); none for a
    key that this version does not know."""
    for known, field in settings_of():
        if key == known or key.startswith(f"{known}."):
            return frozenset(Role[name] for name in (field.json_schema_extra or {}).get("roles", ()))
    return frozenset()


def changes(before: dict[str, Any], now: dict[str, Any], free: frozenset[Role] = frozenset([FREE])) -> dict[str, Any]:
    """Compare two configurations, given as nested plain values; return (old, new) of each key that differs and has
    none of the roles in `free`."""
    old, new = flatten(before), flatten(now)
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return {key: (old.get(key), new.get(key)) for key in keys if not roles_of(key) & free}
