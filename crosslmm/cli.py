"""Command lines of the jobs: presets, files and arguments become a validated configuration.

Also what an entry point does to its own process: logging, SIGTERM, one line for an error.
"""

import argparse
import contextlib
import io
import re
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any, NoReturn

import yaml
from jsonargparse import (  # type: ignore[attr-defined]
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    set_parsing_settings,
)

from crosslmm import storage
from crosslmm.cli_errors import closest, explain
from crosslmm.cli_help import print_help
from crosslmm.config import BadConfig, RunConfig, flatten, validate_run
from crosslmm.progress import set_up_logging
from crosslmm.text import in_brief, one_line, one_printable_line, printable, redacted

PRESETS = resources.files("crosslmm") / "presets"
MAX_CONFIG_BYTES = 2**20
"""Largest configuration file [bytes]."""


class CommandParser(argparse.ArgumentParser):
    """Command line of a job without a configuration: one line for an error, and no abbreviated options.

    A description of several paragraphs needs `formatter_class=RawDescriptionHelpFormatter`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with 2."""
        fail(BadConfig(f"{message}; {self.prog} --help lists the arguments"))


class _PresetOrFile(ActionConfigFile):
    """`--config NAME_OR_FILE_OR_URI`, repeatable; later ones override earlier ones."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        file = resolve_preset(values)
        read_config(file)  # jsonargparse's errors name neither the file nor the line
        super().__call__(parser, cfg, file, option_string)


def preset_names() -> list[str]:
    """Return the names that `--config` takes."""
    return sorted(path.name.removesuffix(".yaml") for path in PRESETS.iterdir() if path.name.endswith(".yaml"))


def resolve_preset(name_or_file_or_uri: str) -> str:
    """Return the file of a preset's name; return anything that looks like a path or URI as it is.

    Raises:
        BadConfig: no preset has this name.
    """
    if name_or_file_or_uri in preset_names():
        return str(PRESETS / f"{name_or_file_or_uri}.yaml")
    if "/" not in name_or_file_or_uri and not name_or_file_or_uri.endswith((".yaml", ".yml")):
        meant = closest(name_or_file_or_uri, preset_names())
        names = ", ".join(preset_names())
        raise BadConfig(f"--config {name_or_file_or_uri}: no such preset{meant}; there are {names}")
    return name_or_file_or_uri


def read_config(file: str) -> dict[str, Any]:
    """Read a configuration file.

    Args:
        file: path or URI.

    Raises:
        BadConfig: it cannot be read, or is not a YAML mapping.
    """
    try:
        text = storage.read_at_most(file, MAX_CONFIG_BYTES).decode()
        values = yaml.safe_load(text)
    except UnicodeDecodeError:
        raise BadConfig(f"--config {file}: is not text in UTF-8") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise BadConfig(f"--config {file}: cannot be read: {in_brief(error)}") from error
    if values is not None and not isinstance(values, dict):
        raise BadConfig(f"--config {file}: is a YAML {type(values).__name__}, and not a mapping of keys to values")
    return values or {}


def parse_run(argv: Sequence[str], description: str, default: str = "tiny") -> RunConfig:
    """Parse a command line into a validated configuration. `--help` and `--print_config` print and exit with 0.

    Args:
        argv: the arguments.
        description: the text above the help.
        default: preset that applies without `--config`.

    Raises:
        BadConfig: unknown key, wrong type, impossible combination.
    """
    return parse_job(argv, description, lambda parser: None, default)[0]


def parse_job(
    argv: Sequence[str], description: str, add_own: Callable[[ArgumentParser], object], default: str = "tiny"
) -> tuple[RunConfig, dict[str, Any]]:
    """Parse the command line of a job that has arguments besides the configuration.

    Args:
        argv, description, default: as for `parse_run`.
        add_own: adds the job's own arguments to the parser.

    Returns:
        The configuration, and the values of the job's own arguments.

    Raises:
        BadConfig: unknown key, wrong type, impossible combination.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True, config_read_mode_fsspec_enabled=True)
    configs, rest = _split_configs(argv)
    configs = configs or [default]
    parser = _parser(description, add_own, default)
    if any(argument in ("-h", "--help") for argument in rest):
        print_help(parser, everything="all" in rest, defaults=_preset_values(configs))
        raise SystemExit(0)
    printed = io.StringIO()  # by --print_config, before any value is validated
    try:
        with contextlib.redirect_stdout(printed):
            # Files first, wherever they stand: a value on the command line overrides all of them.
            values = parser.parse_args([*(f"--config={name}" for name in configs), *rest]).as_dict()
    except SystemExit:
        sys.stdout.write(redacted(_settings_only(printed.getvalue())))
        raise
    except ArgumentError as error:
        raise BadConfig(explain(error, parser)) from error
    run = {key: values.pop(key) for key in RunConfig.model_fields}
    values.pop("config")
    if empty := [key for key, value in flatten(run | values).items() if value == ""]:
        raise BadConfig(f"{empty[0]}: is empty; give it a value, or leave it out")
    return validate_run(run), values


def _parser(description: str, add_own: Callable[[ArgumentParser], object], default: str) -> ArgumentParser:
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    add_own(parser)
    parser.add_argument(
        "--config",
        action=_PresetOrFile,
        metavar="PRESET_OR_FILE",
        help=f"Preset ({', '.join(preset_names())}), YAML file or s3:// URI; repeatable, later ones override earlier "
        f"ones, and other arguments override them all. Without it: {default}.",
    )
    parser.add_class_arguments(RunConfig, fail_untyped=False)
    return parser


def _settings_only(printed: str) -> str:
    """Return a printed configuration without a job's own arguments, so that every job takes it as --config."""
    keys = "|".join(RunConfig.model_fields)
    return "".join(re.findall(rf"^(?:{keys}):.*\n(?:[ -].*\n)*", printed, re.MULTILINE)) or printed


def _split_configs(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the values of --config, and all other arguments."""
    configs: list[str] = []
    rest: list[str] = []
    remaining = iter(argv)
    for argument in remaining:
        name, mark, value = argument.partition("=")
        if name != "--config":
            rest.append(argument)
        else:
            configs.append(value if mark else next(remaining, ""))
    if any(not config or config.startswith("--") for config in configs):
        raise BadConfig(f"--config: needs a value: a YAML file, or one of {', '.join(preset_names())}")
    return configs, rest


def _preset_values(configs: Sequence[str]) -> dict[str, tuple[Any, str]]:
    """Return the (value, preset or file) of each key that the files set."""
    values: dict[str, tuple[Any, str]] = {}
    for name in configs:
        file = resolve_preset(name)
        origin = f"preset {name}" if file != name else name
        values |= {key: (value, origin) for key, value in flatten(read_config(file)).items()}
    return values


def start_job(run: str | None = None) -> None:
    """Set up this process as a job: log to the terminal, and end on SIGTERM as on Ctrl-C, so that work is kept.

    Args:
        run: name of the run, for log lines.

    Raises:
        BadConfig: CROSSLMM_LOG_LEVEL is not a log level.
    """
    set_up_logging(run)
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def fail(error: Exception) -> NoReturn:
    """Print an error and exit with 2: the request was refused; see `print_error`."""
    print_error(error)
    raise SystemExit(2)


def print_error(error: object) -> None:
    """Print an error as one line, with its `details` below if it has some, and no credentials or control characters."""
    print(f"error: {one_printable_line(redacted(one_line(str(error))))}", file=sys.stderr)  # noqa: T201
    if details := getattr(error, "details", ""):
        print(printable(redacted(details)), file=sys.stderr)  # noqa: T201
