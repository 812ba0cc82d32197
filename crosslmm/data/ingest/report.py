"""Tables that jobs/prepare.py prints for people."""

from typing import Any

import rich
from rich.table import Table
from rich.text import Text

from crosslmm.data.ingest.summary import Summary

MOST_FREQUENT = 5
"""Number of codecs, sizes and reasons that a table shows."""


def print_converted(result: dict[str, Any]) -> None:
    """Print the counts of a conversion."""
    table = Table("rows", "malformed", "unreadable", "videos", "hours", "codecs", "sizes")
    table.add_row(
        *(f"{result[key]:,}" for key in ("rows", "rejected", "quarantined", "videos", "hours")),
        *(
            Text("\n".join(f"{name} {count:,}" for name, count in _most_frequent(result[key])))
            for key in ("codecs", "sizes")
        ),
    )
    rich.get_console().print(table)


def print_problems(summary: Summary) -> None:
    """Print why rows are malformed and videos unreadable; nothing if there are none."""
    if not summary.reasons and not summary.unreadable:
        return
    table = Table("rows", "lines", "reason")
    for count, lines, reason in sorted(summary.reasons.values(), key=lambda entry: -entry[0]):
        more = ", ..." if count > len(lines) else ""
        table.add_row(f"{count:,}", f"{', '.join(map(str, lines))}{more}", Text(reason))
    for reason, count in _most_frequent(summary.unreadable):
        table.add_row(f"{count:,}", "", Text(reason))
    rich.get_console().print(table)


def _most_frequent(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: -item[1])[:MOST_FREQUENT]
