"""Command lines of the jobs: presets and arguments become a validated configuration; `--help` explains it.

Also what an entry point does to its own process: logging, SIGTERM, one line for an error.
"""

import argparse
import contextlib
import io
import itertools
import shutil
import signal
import sys
import textwrap
import types
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

import yaml
from jsonargparse import (  # type: ignore[attr-defined]
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    set_parsing_settings,
)

from crosslmm import storage
from crosslmm.config import BadConfig, RunConfig, flatten, validate_run
from crosslmm.progress import set_up_logging
from crosslmm.text import one_line, one_printable_line, redacted

PRESETS = resources.files("crosslmm") / "presets"

COMMON_KEYS = (
    "name", "storage", "data.manifest", "data.validation_manifest", "data.num_frames", "model.pool_stride",
    "model.cross_attention_every", "train.max_steps", "train.global_batch_size", "train.learning_rate.decoder",
    "scaling.num_workers", "scaling.use_gpu", "tracking.uri",
)  # fmt: skip
"""Keys that a short --help shows."""


class _PresetOrFile(ActionConfigFile):
    """`--config NAME_OR_FILE_OR_URI`, repeatable; later ones override earlier ones."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, cfg, resolve_preset(values), option_string)


def describe_type(annotation: Any) -> str:
    """Describe a type for people: `int`, `text or null`, `uniform | fps`, `{text: int, ...}`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe_type(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe_type(argument) for argument in arguments))
    if origin is dict:
        key, value = map(describe_type, arguments)
        return f"{{{key}: {value}, ...}}"
    if origin in (list, tuple):
        return f"[{', '.join(map(describe_type, arguments))}{', ...' if origin is list else ''}]"
    names = {str: "text", int: "integer", bool: "true | false", float: "number", type(None): "null", Any: "any value"}
    return str(names.get(annotation) or getattr(annotation, "__name__", annotation))


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
        raise BadConfig(f"--config {name_or_file_or_uri}: no such preset; there are {', '.join(preset_names())}")
    return name_or_file_or_uri


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
    argv = list(argv)
    if not any(argument == "--config" or argument.startswith("--config=") for argument in argv):
        argv = ["--config", default, *argv]
    parser = _parser(description, add_own, default)
    if any(argument in ("-h", "--help") for argument in argv):
        print_help(parser, everything="all" in argv, defaults=_preset_values(argv))
        raise SystemExit(0)
    printed = io.StringIO()  # by --print_config, before any value is validated
    try:
        with contextlib.redirect_stdout(printed):
            values = parser.parse_args(argv).as_dict()
    except SystemExit:
        sys.stdout.write(redacted(printed.getvalue()))
        raise
    except ArgumentError as error:
        hint = "; --help all lists the keys" if "accept option" in str(error) or "unrecognized" in str(error) else ""
        raise BadConfig(one_line(str(error)) + hint) from error
    run = {key: values.pop(key) for key in RunConfig.model_fields}
    values.pop("config")
    return validate_run(run), values


def _parser(description: str, add_own: Callable[[ArgumentParser], object], default: str) -> ArgumentParser:
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    add_own(parser)
    parser.add_argument(
        "--config",
        action=_PresetOrFile,
        metavar="PRESET_OR_FILE",
        help=f"Preset ({', '.join(preset_names())}), YAML file or s3:// URI; repeatable, later ones override earlier "
        f"ones. Without it: {default}.",
    )
    parser.add_class_arguments(RunConfig, fail_untyped=False)
    return parser


def _preset_values(argv: Sequence[str]) -> dict[str, tuple[Any, str]]:
    """Return the (value, preset or file) of each key that the command line's --config arguments set."""
    names = [
        after if argument == "--config" else argument.partition("=")[2]
        for argument, after in itertools.pairwise([*argv, ""])
        if argument == "--config" or argument.startswith("--config=")
    ]
    values: dict[str, tuple[Any, str]] = {}
    for name in names:
        file = resolve_preset(name)
        origin = f"preset {name}" if file != name else name
        values |= {key: (value, origin) for key, value in flatten(yaml.safe_load(storage.read_bytes(file))).items()}
    return values


def print_help(parser: ArgumentParser, everything: bool, defaults: dict[str, tuple[Any, str]]) -> None:
    """Print a parser's arguments, each with its type and the default that the present command would use.

    Args:
        parser: whose arguments to explain.
        everything: all arguments, by section; otherwise the job's own and `COMMON_KEYS`.
        defaults: value and origin of keys that presets or files set.
    """
    width = min(shutil.get_terminal_size().columns, 110)
    paragraphs = str(parser.description).strip().split("\n\n")
    lines = [f"usage: python jobs/{parser.prog} [--config PRESET_OR_FILE ...] [--KEY VALUE ...]"]
    for paragraph in paragraphs:
        verbatim = paragraph.startswith("    ")
        lines += ["", *(paragraph.splitlines() if verbatim else textwrap.wrap(" ".join(paragraph.split()), width))]
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if _shown(action, everything)]
        if actions:
            title = str(group.title or "").rstrip(":")
            lines += ["", f"{'Options' if title == 'options' else title}:"]
        for action in actions:
            lines += _explain(action, defaults, width)
    keys = sum(1 for action in parser._actions if _shown(action, True))
    if not everything:
        hint = f"--help all explains all {keys} keys; --print_config prints the configuration as YAML."
        lines += ["", hint]
    print(redacted("\n".join(lines)))  # noqa: T201


def _shown(action: argparse.Action, everything: bool) -> bool:
    nested = isinstance(action.metavar, str) and action.metavar == "CONFIG"  # `--model FILE`, one for each section
    if nested or action.help == argparse.SUPPRESS or action.dest in ("help", "print_config"):
        return False
    is_setting = any(action.dest.startswith(f"{name}.") or action.dest == name for name in RunConfig.model_fields)
    return everything or not is_setting or action.dest in COMMON_KEYS


def _explain(action: argparse.Action, defaults: dict[str, tuple[Any, str]], width: int) -> list[str]:
    """Return the lines of one argument: name, type and default; then what it means."""
    name = next((option for option in action.option_strings if not option.endswith("+")), action.dest)
    annotation = getattr(action, "_typehint", None)
    kind = action.metavar or (describe_type(annotation) if annotation is not None else "")
    if annotation is None and not kind and action.nargs != 0:
        kind = getattr(action.type, "__name__", "text") if action.type else "text"
    value, origin = defaults.get(action.dest, (action.default, ""))
    head = f"  {name} {kind}".rstrip()
    if action.dest != "config" and action.nargs != 0 and value != argparse.SUPPRESS:
        head += f"   [{_plain(value)}{f', {origin}' if origin else ''}]"
    text, indent = " ".join((action.help or "").split()), " " * 8
    return [head, *textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)]


def _plain(value: Any) -> str:
    """Return a default as it is typed on a command line."""
    if isinstance(value, dict):
        return "{...}" if value else "{}"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


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
    """Print an error as one line and exit with 2: the request was refused."""
    print_error(error)
    raise SystemExit(2)


def print_error(error: object) -> None:
    """Print an error as one line, without credentials and control characters."""
    print(f"error: {one_printable_line(redacted(one_line(str(error))))}", file=sys.stderr)  # noqa: T201
