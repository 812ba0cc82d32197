"""What jobs/prepare.py prints for people."""

from typing import Any

import numpy as np
import rich
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from crosslmm.config import DataConfig
from crosslmm.data.frame_sampling import FrameSampling
from crosslmm.data.ingest.summary import Summary
from crosslmm.data.rows.problems import problem_table, rows, unused_lines
from crosslmm.progress import cell

MAX_FREQUENT = 5
"""Number of codecs, sizes and reasons that a table shows."""
SHOWN_TIMES = 6
"""Most moments of a video that are shown; the last one is always among them."""


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


def print_validated(manifest: str, summary: Summary, probe: bool, data: DataConfig) -> None:
    """Print which forms the rows of a manifest have, the first of them as the model will see them, what is not followed
    in them, why rows are malformed, and why videos are unreadable."""
    console = rich.get_console()
    sampling = FrameSampling(data.num_frames, data.sampling, data.fps)
    for form, count in _most_frequent(summary.forms):
        console.print(cell(f"{rows(count)}: {form}"))
    for row in summary.previews:
        console.print(_preview(row, sampling, data.timestamps))
    for line in unused_lines(summary.unused):
        console.print(cell(f"note: {line}"))
    if not probe:
        console.print("note: no video was opened; --probe true reads the header of each")
    if summary.reasons:
        console.print(Text(f"\nmalformed: {rows(summary.rejected)}\n{problem_table(summary.reasons)}"))
    if summary.unreadable:
        console.print(f"\nwith a video that cannot be read: {rows(summary.quarantined)}")
        for reason, count in _most_frequent(summary.unreadable):
            console.print(cell(f"{count:,}  {reason}"))


def _preview(row: dict[str, Any], sampling: FrameSampling, timestamps: bool) -> Group:
    """Return a row as the model will see it; what it learns is green, and marked."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for number, (kind, name, seconds) in enumerate(row["media"], start=1):
        grid.add_row(f"{kind} {number}", cell(f"{name}, {_frames(kind, seconds, sampling, timestamps)}"))
    if row["more_media"]:
        grid.add_row("", f"and {row['more_media']:,} more videos and images")
    for role, text in row["turns"]:
        learned = role == "assistant"
        style = "green" if learned else ""
        grid.add_row(Text(f"{role} (learned)" if learned else role, style), Text(cell(text).plain, style))
    if row["more_turns"]:
        grid.add_row("", f"and {row['more_turns']:,} more messages")
    kind = f", kind {row['kind']}" if row["kind"] else ""
    title = f"line {row['line']:,}, id {row['id']}{kind}"
    return Group("", cell(title), Padding(grid, (0, 0, 0, 2)))


def _frames(kind: str, seconds: float | None, sampling: FrameSampling, timestamps: bool) -> str:
    """Return which frames of a video the model sees, their moments where its duration is known, and the text before
    each."""
    if kind == "image":
        return "one frame"
    stamps = ', each after its time: "<12.0 seconds>"' if timestamps else ""
    return f"{_policy(seconds, sampling)}{stamps}"


def _policy(seconds: float | None, sampling: FrameSampling) -> str:
    if seconds is None:
        policy = {
            "uniform": f"{sampling.num_frames} frames spread evenly",
            "fps": f"{sampling.fps:g} frames per second, the first {sampling.num_frames}",
            "fps_then_uniform": f"{sampling.fps:g} frames per second, or {sampling.num_frames} spread evenly",
        }
        return policy[sampling.policy]
    return f"{seconds:.6g} s: the frames at {_moments(sampling.times(seconds))}"


def _moments(times: np.ndarray) -> str:
    shown = [f"{time:.2f}" for time in times.tolist()]
    if len(shown) <= SHOWN_TIMES:
        return f"{', '.join(shown)} s"
    return f"{', '.join([*shown[: SHOWN_TIMES - 1], '...', shown[-1]])} s ({len(shown)} moments)"


def _most_frequent(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: -item[1])[:MAX_FREQUENT]
