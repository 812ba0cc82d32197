"""Search spaces: dotted configuration keys -> Tune domains, some of them conditional.

A space is a file with one function, `space(config)`, that returns such a dict; `tune_spaces/` has examples.
"""

import contextlib
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import BaseTrial
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.sample import Domain

from crosslmm.config import BadConfig, RunConfig, flatten, roles_of, validate_run
from crosslmm.config.schema import FEATURES, NOT_SEARCHED
from crosslmm.sweep.trials import Point

GRID = "grid_search"
"""The key of a grid's values in Tune."""


class OnlyIf(NamedTuple):
    """A dimension that is searched only under a condition."""

    condition: Callable[[Mapping[str, Any]], bool]
    """Function of the values by key: the configuration's, and those of the dimensions before this one."""
    domain: Any
    """Tune domain or grid."""
    otherwise: Any
    """Value when the condition is false."""


Space = dict[str, Any]
"""Dotted key -> Tune domain (`tune.choice`, `tune.loguniform`, ...), `tune.grid_search`, or `OnlyIf` with one of
them."""


def load(name_or_file: str, folder: Path, config: RunConfig) -> Space:
    """Load a space by its name in `folder`, a package, or from a Python file, and check it against the configuration.

    Raises:
        BadConfig: no such space, an unknown key, a value that its key does not accept, or grids mixed with domains.
    """
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    if str(folder.parent) not in sys.path:  # a user's file may import those of the folder
        sys.path.append(str(folder.parent))
    if name_or_file in names:
        module: Any = importlib.import_module(f"{folder.name}.{name_or_file}")
    elif name_or_file.endswith(".py") and Path(name_or_file).exists():
        spec = importlib.util.spec_from_file_location("user_space", name_or_file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with _one_line(name_or_file):
            spec.loader.exec_module(module)
    else:
        raise BadConfig(f"--space {name_or_file}: neither a file nor one of {', '.join(names)}")
    if not hasattr(module, "space"):
        raise BadConfig(f"--space {name_or_file}: the file has no function space(config)")
    with _one_line(name_or_file):
        space = dict(module.space(config))
    check(name_or_file, space, config)
    return space


@contextlib.contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Turn any error of a user's file into a BadConfig of one line."""
    try:
        yield
    except BadConfig:
        raise
    except Exception as error:
        raise BadConfig(f"--space {name}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def check(name: str, space: Space, config: RunConfig) -> None:
    """Check that every key exists and accepts the values it may get.

    Raises:
        BadConfig: naming the key.
    """
    known = flatten(config.model_dump())
    if not space:
        raise BadConfig(f"--space {name}: the space is empty")
    for path, dimension in space.items():
        if NOT_SEARCHED in roles_of(path):
            raise BadConfig(f"--space {name}: {path} cannot be searched; the sweep sets it for its trials")
        _require_path(name, path, known)
        if isinstance(dimension, OnlyIf):
            with _one_line(name):
                try:
                    dimension.condition(known)
                except KeyError as error:
                    _require_path(name, str(error.args[0]), known)
        for value in _examples(name, path, dimension):
            try:
                apply(config, {path: value})
            except BadConfig as error:
                # Conflicts with other values are detected point by point.
                if str(error).startswith(path):
                    raise BadConfig(f"--space {name}: {error}") from error
    if len({_is_grid(dimension) for dimension in space.values()}) > 1:
        raise BadConfig(f"--space {name}: grid_search mixed with other domains; use only grids, or none")


def _require_path(name: str, path: str, known: Mapping[str, Any]) -> None:
    if path not in known:
        close = difflib.get_close_matches(path, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise BadConfig(f"--space {name}: {path}: the configuration has no such key{hint}")


def is_grid(space: Space) -> bool:
    """Return whether every point becomes a trial (grid_search), rather than only those that Optuna draws."""
    return all(_is_grid(dimension) for dimension in space.values())


def changes_features(space: Space, config: RunConfig) -> list[str]:
    """Return the paths of a space that change the frozen encoder's features, so that trials cannot share any."""
    # Without published weights, the seed determines the encoder.
    random_encoder = not (config.model.vision_weights or config.model.init_from)
    return [path for path in space if FEATURES in roles_of(path) or (random_encoder and path == "seed")]


def grid(space: Space, config: RunConfig) -> list[Point]:
    """Return all points of a space of grids; the last dimension varies fastest."""
    known = flatten(config.model_dump())
    points: list[Point] = [{}]
    for path, dimension in space.items():
        points = [
            longer
            for point in points
            for longer in (
                [point | {path: value} for value in _domain(dimension)[GRID]]
                if _applies(dimension, known | settings(space, config, point))
                else [point]
            )
        ]
    return points


def suggest(space: Space, config: RunConfig, trial: BaseTrial) -> Point:
    """Let an Optuna trial draw a value for each dimension that applies."""
    known = flatten(config.model_dump())
    point: Point = {}
    for path, dimension in space.items():
        if not _applies(dimension, known | settings(space, config, point)):
            continue
        match distribution(path, dimension):
            case CategoricalDistribution(choices=choices):
                point[path] = trial.suggest_categorical(path, choices)
            case FloatDistribution(low=low, high=high, step=step, log=log):
                point[path] = trial.suggest_float(path, low, high, step=step, log=log)
            case IntDistribution(low=low, high=high, step=step, log=log):
                point[path] = trial.suggest_int(path, low, high, step=step, log=log)
    return point


def settings(space: Space, config: RunConfig, point: Point) -> Point:
    """Return a point with the values that follow from it: those of false conditions, and a rate of 0 for an absent
    branch."""
    implied = {
        path: dimension.otherwise
        for path, dimension in space.items()
        if isinstance(dimension, OnlyIf) and path not in point
    }
    values = flatten(config.model_dump()) | implied | point
    layers = values["model.cross_attention_layers"]
    anywhere = values["model.cross_attention_every"] > 0 if layers is None else bool(layers)
    for branch in ("v2v", "t2v"):
        rate = f"train.learning_rate.{branch}"
        if values[rate] and not (anywhere and values[f"model.{branch}"]):
            implied[rate] = 0.0
    return {**point, **implied}


def apply(config: RunConfig, values: Point) -> RunConfig:
    """Return the configuration with some values changed.

    Raises:
        BadConfig: the values are invalid, alone or together.
    """
    changed = config.model_dump()
    for path, value in values.items():
        *sections, key = path.split(".")
        inner = changed
        for section in sections:
            inner = inner[section]
        inner[key] = value
    return validate_run(changed)


def distribution(path: str, dimension: Any) -> BaseDistribution:
    """Return the Optuna distribution of a dimension; a grid's values are choices.

    Raises:
        ValueError: Optuna has no such distribution.
    """
    domain = _domain(dimension)
    if _is_grid(domain):
        return CategoricalDistribution(domain[GRID])
    return OptunaSearch.convert_search_space({path: domain})[path]


def _domain(dimension: Any) -> Any:
    return dimension.domain if isinstance(dimension, OnlyIf) else dimension


def _is_grid(dimension: Any) -> bool:
    domain = _domain(dimension)
    return isinstance(domain, dict) and list(domain) == [GRID]


def _applies(dimension: Any, values: dict[str, Any]) -> bool:
    return not isinstance(dimension, OnlyIf) or dimension.condition(values)


def _examples(name: str, path: str, dimension: Any) -> Sequence[Any]:
    """Return values that a dimension may yield: all choices, or both ends of a range."""
    if not _is_grid(dimension) and not isinstance(_domain(dimension), Domain):
        raise BadConfig(f"--space {name}: {path}: {_domain(dimension)!r} is neither a Tune domain nor a grid_search")
    try:
        drawn: Any = distribution(path, dimension)
    except ValueError as error:
        raise BadConfig(f"--space {name}: {path}: {error}") from error
    values = list(drawn.choices) if isinstance(drawn, CategoricalDistribution) else [drawn.low, drawn.high]
    return [*values, *([dimension.otherwise] if isinstance(dimension, OnlyIf) else [])]
