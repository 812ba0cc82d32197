"""The scores of an evaluation as a table on the terminal."""

from typing import Any

import rich
from rich.table import Table

from crosslmm.evaluate.run import EvaluationResult
from crosslmm.progress import cell

MAX_VALUES = 40
"""Values of a group's key that are listed; a key with more is left out."""


def print_table(result: EvaluationResult) -> None:
    """Print the scores, with their intervals and counts."""
    table = Table("", "", "accuracy", "95 % interval", "questions", title=cell(f"{result.model} on {result.benchmark}"))

    def add(label: str, value: str, estimate: dict[str, Any] | None) -> None:
        table.add_row(*map(cell, (label, value, *_figures(estimate))))

    for key, values in result.by_group.items():
        for value, estimate in values.items() if len(values) <= MAX_VALUES else ():
            add(key, value, estimate)
    add("all", "", result.accuracy)
    if result.against:
        add("against", result.against["model"], result.against["accuracy"])
        add("difference", "", result.against["difference"])
    console = rich.get_console()
    console.print(table)
    console.print(cell("questions " + ", ".join(f"{count:,} {status}" for status, count in result.counts.items())))
    console.print(cell(f"page      {result.page}"))


def _figures(estimate: dict[str, Any] | None) -> tuple[str, str, str]:
    if estimate is None:
        return "none", "", ""
    return f"{estimate['value']:.3f}", f"{estimate['low']:.3f} to {estimate['high']:.3f}", f"{estimate['count']:,}"
