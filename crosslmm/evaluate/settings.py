"""Settings of an evaluation: the arguments of jobs/evaluate.py."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from pydantic import Field, ValidationError

from crosslmm import storage
from crosslmm.cli import resolve_preset
from crosslmm.cli_help import print_help
from crosslmm.config import (
    CREDENTIALS_ERROR,
    BadConfig,
    DataConfig,
    RunConfig,
    ScalingConfig,
    TrackingConfig,
    flatten,
    roles_of,
)
from crosslmm.config.schema import FREE, Count, Section, Share
from crosslmm.text import first_error, holds_credentials, one_line

COMMON = ("model", "data", "storage", "name", "scaling.num_workers", "scaling.use_gpu", "tracking.uri")
"""Keys that a short --help shows besides those of an evaluation alone."""
REGISTERED_MODEL = re.compile(r"models:/[^/@]+(@[\w-]+|/\d+)")


class EvaluationSettings(Section):
    """The evaluation."""

    model: str = "models:/crosslmm@candidate"
    """Registered model (models:/NAME@ALIAS or models:/NAME/VERSION), or folder of an exported one (path or s3://)."""
    benchmark: str | None = None
    """Benchmark whose questions are asked; docs/evaluation.md lists them."""
    data: str | None = None
    """Folder of the benchmark, in the layout in which it is published (path or s3:// URI)."""
    manifest: str | None = None
    """Instead of a benchmark: manifest whose questions are asked and scored by exact match (path or s3:// URI)."""
    roots: list[str] = Field(default=[])
    """Further folders that videos may lie in, and that links may lead to (paths or s3:// URIs)."""
    only: str | None = None
    """KEY=VALUE: ask only the questions of this group, such as duration=long."""
    limit: Count | None = None
    """Ask only this many questions, from the first one on [questions]."""
    num_frames: Count | None = None
    """Frames of a video, at most; null takes those that the model was trained with [frames]."""
    max_new_tokens: Count | None = None
    """Length limit of an answer; null takes the benchmark's [tokens]."""
    likelihood: bool = False
    """Choose the option whose letter is most likely, instead of generating an answer and looking for a letter in it."""
    scorer: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    """MODULE:FUNCTION that scores open answers: function(question, expected, answer) returns whether it is right."""
    max_unreadable: Share = 0.005
    """Share of questions that cannot be asked, beyond which there is no score."""
    against: str | None = None
    """Model to compare with, on the same questions; given as `model` is."""
    promote: Annotated[str, Field(pattern=r"^[\w-]+$", max_length=200)] | None = None
    """Alias that moves to this version if it is better than the version that has it: if the 95 % interval of the
    difference lies above `margin`. An alias that no version has is given without a comparison."""
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Difference in accuracy that a version must exceed to be promoted."""
    write_manifest: str | None = None
    """Ask nothing, but write the questions as a manifest (path or s3:// URI), for `data.validation_manifest` of a
    training or a sweep."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)] | None = None
    """Name of the evaluation; the same name resumes it. Null makes one of benchmark, model and settings."""

    def check(self) -> None:
        """Check the settings against each other.

        Raises:
            BadConfig: naming the argument.
        """
        if (self.benchmark is None) == (self.manifest is None):
            raise BadConfig("--benchmark, --manifest: give one of them")
        if (self.benchmark is None) != (self.data is None):
            raise BadConfig("--data: give the folder of a --benchmark; a --manifest names its videos itself")
        if self.write_manifest and self.manifest:
            raise BadConfig("--write_manifest: --manifest is one already")
        if self.promote and not REGISTERED_MODEL.fullmatch(self.model):
            raise BadConfig(f"--promote {self.promote}: only a registered model (models:/...) can get an alias")
        if self.promote and (self.limit or self.only):
            raise BadConfig(f"--promote {self.promote}: takes all questions; leave out --limit and --only")
        for key, value in flatten(self.model_dump()).items():
            for text in value if isinstance(value, list) else [value]:
                if holds_credentials(str(text)):
                    raise BadConfig(f"--{key}: {CREDENTIALS_ERROR}")


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are made."""

    max_new_tokens: int
    likelihood: bool


class Overrides:
    """Settings of where and how an evaluation runs, laid over those of the model's training run.

    Args:
        given: nested values of `RunConfig`.

    Raises:
        BadConfig: one of them belongs to the model.
    """

    def __init__(self, given: dict[str, Any]) -> None:
        for key in flatten(given):
            roles = roles_of(key)
            if not roles:
                raise BadConfig(f"{key}: there is no such setting")
            if FREE not in roles:
                raise BadConfig(f"{key}: belongs to the model, from which an evaluation takes it; leave it out")
        self.given = given
        sections: dict[str, type[Section]] = {"scaling": ScalingConfig, "tracking": TrackingConfig}
        for key, section in sections.items():
            try:
                section.model_validate(given.get(key, {}))
            except ValidationError as error:
                raise BadConfig(f"{key}.{first_error(error)}") from None

    @property
    def tracking(self) -> TrackingConfig:
        """The MLflow server."""
        return TrackingConfig.model_validate(self.given.get("tracking", {}))

    def apply(self, trained: RunConfig, num_frames: int | None, roots: Sequence[str]) -> RunConfig:
        """Return the configuration of an evaluation: that of the training run, with what was given on top.

        Args:
            trained: configuration that the model was trained with.
            num_frames: frames of a video; None for those of the training run.
            roots: folders that videos may lie in.
        """
        data = _merged(trained.data.model_dump(), self.given.get("data", {}))
        # The data of the training run are not read, and no decoders are reserved for its validation.
        data |= {"validation_manifest": None, "features": None, "roots": list(roots)}
        data |= {"num_frames": num_frames} if num_frames else {}
        scaling = _merged(trained.scaling.model_dump(), self.given.get("scaling", {}))
        # Section by section: what training demands of the sections together does not matter here.
        return trained.model_copy(
            update={
                "data": DataConfig.model_validate(data),
                "scaling": ScalingConfig.model_validate(scaling),
                "tracking": self.tracking,
                "storage": storage.absolute(self.given.get("storage", "runs")),
            }
        )


def parse(argv: Sequence[str], description: str) -> tuple[EvaluationSettings, Overrides]:
    """Parse a command line. `--help` prints and exits with 0.

    Raises:
        BadConfig: unknown key, wrong type, impossible combination.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(EvaluationSettings, fail_untyped=False)
    text = (
        "YAML file or preset with settings of the cluster, such as cluster/run.yaml; repeatable. Without it, scaling "
        "is that of the model's training run."
    )
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help=text)
    parser.add_argument("--storage", default="runs", metavar="FOLDER", help="Folder of all runs (path or s3:// URI).")
    text = "Deadline for one video; null takes that of the training run [s]."
    parser.add_argument("--decode_timeout_s", type=float, default=None, help=text)
    parser.add_class_arguments(ScalingConfig, "scaling", fail_untyped=False)
    parser.add_class_arguments(TrackingConfig, "tracking", fail_untyped=False)
    if any(argument in ("-h", "--help") for argument in argv):
        trained = {action.dest: ("as in training", "") for action in parser._actions if action.dest[:8] == "scaling."}
        print_help(parser, everything="all" in argv, defaults=trained, common=COMMON)
        raise SystemExit(0)
    try:
        given = parser.parse_args(list(argv), defaults=False).as_dict()
    except ArgumentError as error:
        raise BadConfig(one_line(str(error))) from error
    overrides: dict[str, Any] = {}
    for file in given.pop("config", []):
        overrides = _merged(overrides, _read_config(file))
    for key in ("storage", "scaling", "tracking"):
        if key in given:
            overrides = _merged(overrides, {key: given.pop(key)})
    if (timeout := given.pop("decode_timeout_s", None)) is not None:
        overrides = _merged(overrides, {"data": {"decode_timeout_s": timeout}})
    try:
        settings = EvaluationSettings.model_validate(given)
    except ValidationError as error:
        raise BadConfig(f"--{first_error(error)}") from None
    settings.check()
    return settings, Overrides(overrides)


def _read_config(name: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(storage.read_bytes(resolve_preset(name)))
    except (OSError, yaml.YAMLError) as error:
        raise BadConfig(f"--config {name}: cannot be read: {one_line(str(error))}") from None
    if not isinstance(values, dict):
        raise BadConfig(f"--config {name}: is not YAML with keys and values")
    return values


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Lay nested values over others; lists and the values of settings that are dicts are replaced as a whole."""
    both = dict(below)
    for key, value in above.items():
        inner = isinstance(value, dict) and isinstance(below.get(key), dict) and key in RunConfig.model_fields
        both[key] = _merged(below[key], value) if inner else value
    return both
