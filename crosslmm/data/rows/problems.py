"""What is wrong with rows, or not followed in them, counted by kind, so that a million lines make a short table."""

import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from crosslmm.data.rows.forms import UNUSED
from crosslmm.text import one_printable_line

MAX_EXAMPLES = 5
"""Most lines of a kind that are named; the others are only counted [rows]."""
MAX_KINDS, OTHER_KINDS = 200, "others"
"""Most kinds that are counted separately, and the name under which all others are counted."""
MAX_WIDTH = 120
"""Widest table [characters]."""
SPECIFICS = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\d+")
"""Names and numbers: the parts in which reasons of one kind differ."""

Reasons = dict[str, list[Any]]
"""Malformed rows by kind of reason: [number of rows, first lines, first reason]."""


def count_reason(reasons: Reasons, line: int, reason: str) -> None:
    """Count a malformed row."""
    kind = SPECIFICS.sub("...", reason)[:160]
    add_reasons(reasons, {kind: [1, [line], reason]})


def add_reasons(reasons: Reasons, others: Mapping[str, Iterable[Any]]) -> None:
    """Add counts of the same kind."""
    for kind, (count, lines, reason) in others.items():
        kind = kind if kind in reasons or len(reasons) < MAX_KINDS else OTHER_KINDS
        entry = reasons.setdefault(kind, [0, [], reason])
        entry[0] += count
        entry[1] = sorted([*entry[1], *lines])[:MAX_EXAMPLES]


def problem_table(reasons: Reasons) -> str:
    """Return a table of the kinds, the most frequent first: number of rows, first lines, first reason. It is as wide as
    the terminal, for an error's details and for reports."""
    cells = [("rows", "lines", "reason")]
    for count, lines, reason in sorted(reasons.values(), key=lambda entry: -entry[0]):
        more = ", ..." if count > len(lines) else ""
        cells.append((f"{count:,}", f"{', '.join(map(str, lines))}{more}", one_printable_line(reason)))
    counts, places = (max(len(row[column]) for row in cells) for column in (0, 1))
    indent = counts + places + 4
    width = max(min(shutil.get_terminal_size().columns, MAX_WIDTH) - indent, 30)
    table: list[str] = []
    for count, where, why in cells:
        first, *others = textwrap.wrap(why, width) or [""]
        table += [f"{count:>{counts}}  {where:<{places}}  {first}", *(" " * indent + other for other in others)]
    return "\n".join(table)


def unused_lines(unused: Mapping[str, int]) -> list[str]:
    """Return a line for each key that rows have and that is not followed."""
    return [f"{key} is not used ({rows(count)}): {UNUSED[key]}" for key, count in unused.items() if key in UNUSED]


def rows(count: int) -> str:
    """Return a number of rows."""
    return f"{count:,} row{'' if count == 1 else 's'}"
