"""The `--help` of the jobs: types and defaults as a person reads them, common keys first."""

import argparse
import shutil
import textwrap
import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentParser

from crosslmm.config import RunConfig
from crosslmm.text import redacted

COMMON_KEYS = (
    "name", "storage", "data.manifest", "data.validation_manifest", "data.num_frames", "model.pool_stride",
    "model.cross_attention_every", "train.max_steps", "train.global_batch_size", "train.learning_rate.decoder",
    "scaling.num_workers", "scaling.use_gpu", "tracking.uri",
)  # fmt: skip
"""Keys that a short --help shows."""


def describe_type(annotation: Any) -> str:
    """Describe a type for people: `integer`, `text or null`, `uniform | fps`, `{text: integer, ...}`."""
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


def print_help(
    parser: ArgumentParser,
    everything: bool,
    defaults: dict[str, tuple[Any, str]],
    common: Sequence[str] = COMMON_KEYS,
) -> None:
    """Print a parser's arguments, each with its type and the default that the present command would use.

    Args:
        parser: whose arguments to explain.
        everything: all arguments, by section; otherwise the job's own and `common`.
        defaults: value and origin of keys that presets or files set.
        common: settings that a short help shows.
    """
    width = min(shutil.get_terminal_size().columns, 110)
    paragraphs = str(parser.description).strip().split("\n\n")
    lines = [f"usage: python jobs/{parser.prog} [--config PRESET_OR_FILE ...] [--KEY VALUE ...]"]
    for paragraph in paragraphs:
        verbatim = paragraph.startswith("    ")
        lines += ["", *(paragraph.splitlines() if verbatim else textwrap.wrap(" ".join(paragraph.split()), width))]
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if _shown(action, everything, common)]
        if actions:
            title = str(group.title or "").rstrip(":")
            lines += ["", f"{'Options' if title == 'options' else title}:"]
        for action in actions:
            lines += _explain(action, defaults, width)
    keys = sum(1 for action in parser._actions if _shown(action, True, common))
    if not everything:
        printed = any(action.dest == "print_config" for action in parser._actions)
        also = "; --print_config prints the configuration as YAML" if printed else ""
        lines += ["", f"--help all explains all {keys} keys{also}."]
    print(redacted("\n".join(lines)))  # noqa: T201


def _shown(action: argparse.Action, everything: bool, common: Sequence[str]) -> bool:
    nested = isinstance(action.metavar, str) and action.metavar == "CONFIG"  # `--model FILE`, one for each section
    if nested or action.help == argparse.SUPPRESS or action.dest in ("help", "print_config"):
        return False
    is_setting = any(action.dest.startswith(f"{name}.") or action.dest == name for name in RunConfig.model_fields)
    return everything or not is_setting or action.dest in common


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
