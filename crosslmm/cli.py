"""A script's arguments -> the configuration of a run: presets, laid over one another, and dotted overrides on top."""

import signal
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any, NoReturn

from jsonargparse import (  # type: ignore[attr-defined]
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    set_parsing_settings,
)

from crosslmm.config import BadConfig, RunConfig, one_line, redacted, validate_run

PRESETS = resources.files("crosslmm") / "presets"


class _PresetOrFile(ActionConfigFile):
    """`--config NAME_OR_FILE_OR_URI`; several are laid over one another, the last one on top."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, cfg, resolve_preset(values), option_string)


def preset_names() -> list[str]:
    """Names that `--config` takes."""
    return sorted(path.name.removesuffix(".yaml") for path in PRESETS.iterdir() if path.name.endswith(".yaml"))


def resolve_preset(name_or_file_or_uri: str) -> str:
    """The file behind a preset's name; anything that looks like a path or URI is returned as it is."""
    if name_or_file_or_uri in preset_names():
        return str(PRESETS / f"{name_or_file_or_uri}.yaml")
    if "/" not in name_or_file_or_uri and not name_or_file_or_uri.endswith((".yaml", ".yml")):
        raise BadConfig(f"--config {name_or_file_or_uri}: no such preset; there are {', '.join(preset_names())}")
    return name_or_file_or_uri


def parse_run(argv: Sequence[str], description: str, default: str = "tiny") -> RunConfig:
    """Command line -> validated configuration. `--help` and `--print_config` print and exit 0.

    Raises:
        BadConfig: unknown key, wrong type, impossible combination.
    """
    return parse_job(argv, description, lambda parser: None, default)[0]


def parse_job(
    argv: Sequence[str], description: str, add_own: Callable[[ArgumentParser], object], default: str = "tiny"
) -> tuple[RunConfig, dict[str, Any]]:
    """As `parse_run`, for a script with arguments of its own: `add_own` adds them, their values come second.

    Raises:
        BadConfig: unknown key, wrong type, impossible combination.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True, config_read_mode_fsspec_enabled=True)
    usage = "%(prog)s [--config NAME_OR_FILE_OR_URI] [--SECTION.KEY VALUE ...]"
    parser = ArgumentParser(description=description, usage=usage, exit_on_error=False, allow_abbrev=False)
    add_own(parser)
    parser.add_argument(
        "--config",
        action=_PresetOrFile,
        metavar="NAME_OR_FILE_OR_URI",
        help=f"a preset ({', '.join(preset_names())}), a YAML file or an s3:// URI; "
        f"several are laid over one another, the last on top (default: {default})",
    )
    parser.add_class_arguments(RunConfig, fail_untyped=False)
    try:
        argv = list(argv)
        if not any(a == "--config" or a.startswith("--config=") for a in argv):
            argv = ["--config", default, *argv]
        values = parser.parse_args(argv).as_dict()
    except ArgumentError as error:
        hint = "; --help lists the keys" if "accept option" in str(error) or "unrecognized" in str(error) else ""
        raise BadConfig(one_line(str(error)) + hint) from error
    run = {key: values.pop(key) for key in RunConfig.model_fields}
    values.pop("config")
    return validate_run(run), values


def fail(error: Exception) -> NoReturn:
    """Print one line and leave with status 2: what was asked for cannot be done."""
    print(f"error: {redacted(one_line(str(error)))}", file=sys.stderr)  # noqa: T201
    raise SystemExit(2)


def stop_on_sigterm() -> None:
    """From now on a job that is told to stop ends as if by Ctrl-C: what is done stays, and is written down."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
