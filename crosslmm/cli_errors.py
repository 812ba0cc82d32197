"""Errors of a command line in one line: which key, what it takes, and the key that was probably meant."""

import argparse
import difflib
import re
from collections.abc import Iterable

from jsonargparse import ArgumentError, ArgumentParser

from crosslmm.cli_help import describe_type
from crosslmm.text import one_line

_KEY = re.compile(r'^(?:Parser key )?"(?P<key>[\w.]+)":\s+(?P<reason>.*)', re.DOTALL)
_UNKNOWN_IN_SECTION = re.compile(r"Group '(?P<section>[\w.]+)' does not accept option '(?P<key>[\w.]+)'")
_UNKNOWN_IN_FILE = re.compile(r"Key '(?P<key>[\w.]+)' is not expected|Option '(?P<option>[\w.]+)' is not accepted")
_OF_TYPE = re.compile("Union subtypes|Unable to load config|Expected a <class|Expected a typing")
"""Reasons in which jsonargparse quotes Python's types, or takes the value for a file."""
_VALUES = (r"Given value: (.*)", r"Got value: (.*)", r"Unable to load config '(.*?)'\n")
"""Where jsonargparse quotes the value."""
LONGEST_VALUE = 100
"""Longest part of a value that an error quotes [characters]."""


def explain(error: ArgumentError, parser: ArgumentParser) -> str:
    """Return an error of `parser.parse_args` as one line."""
    text = str(error)
    if unknown := re.match("unrecognized arguments: (.*)", text, re.DOTALL):
        return _unknown_argument(unknown[1].split() or [""], parser)
    if unknown := _UNKNOWN_IN_SECTION.search(text):
        return _unknown_key(f"{unknown['section']}.{unknown['key']}", parser)
    if unknown := _UNKNOWN_IN_FILE.search(text):
        return _unknown_key(unknown["key"] or unknown["option"], parser)
    if match := _KEY.match(text):
        return f"{match['key']}: {_reason(match['key'], match['reason'], parser)}"
    return one_line(text)


def _unknown_argument(unknown: list[str], parser: ArgumentParser) -> str:
    name = next((argument for argument in unknown if argument.startswith("-")), None)
    if name is None:
        return f"{unknown[0]}: arguments are --KEY VALUE or --KEY=VALUE; --help all lists the keys"
    key = name.lstrip("-").partition("=")[0]
    return f"--{_unknown_key(key, parser)}"


def _unknown_key(key: str, parser: ArgumentParser) -> str:
    keys = [action.dest for action in parser._actions if action.help != argparse.SUPPRESS]
    meant = closest(key, keys)
    return f"{key}: no such key{meant}; --help all lists the keys"


def closest(name: str, names: Iterable[str]) -> str:
    """Return `; did you mean NAME?` if one of the names is close to this one, else nothing."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


def _reason(key: str, reason: str, parser: ArgumentParser) -> str:
    """Return why a key does not take its value."""
    if not _OF_TYPE.search(reason):
        head, mark, value = one_line(reason).partition("; got: ")
        return f"{head}{mark}{_shortened(value)}"
    quoted = next(filter(None, (re.search(pattern, reason, re.DOTALL) for pattern in _VALUES)), None)
    got = f"; got: {_shortened(quoted[1])}" if quoted else ""
    keys = [action.dest for action in parser._actions if action.dest.startswith(f"{key}.")]
    if keys:
        return f"is a section; set its keys, such as --{keys[0]}, or all as a YAML mapping{got}"
    action = next(action for action in parser._actions if action.dest == key)
    # jsonargparse lists one error for each type of a union: the rule that the value breaks is in that of its own type.
    rule = re.search(r"(?:Input should be (?:greater|less)|String should) [^\[]*[^\[ ]", reason)
    return f"takes {describe_type(getattr(action, '_typehint', None))}{f'; {rule[0]}' if rule else ''}{got}"


def _shortened(value: str) -> str:
    value = " ".join(value.split())
    return value if len(value) <= LONGEST_VALUE else f"{value[:LONGEST_VALUE]}... ({len(value)} characters)"
