"""The heat map: a page with a table for each number of hops, and the same on the terminal."""

from collections.abc import Sequence

import rich
from rich.table import Table

from crosslmm.data.samples.needles import chance
from crosslmm.evaluate.needle.cell import Cell
from crosslmm.evaluate.needle.settings import NeedleSettings
from crosslmm.evaluate.scores.intervals import Estimate
from crosslmm.html_page import document, escaped
from crosslmm.progress import cell as shown

STYLE = """
.map td{text-align:center;min-width:110px;border:2px solid #fff;color:#111}
.map td span{display:block;font-size:.75rem}
.map td b{display:block;font-size:1.1rem}
.map .dark{color:#fff}
"""
LIGHT, DARK = (247, 251, 255), (8, 81, 156)
"""Colours of an accuracy of 0 and of 1: one hue, for all kinds of sight."""


def page(cells: Sequence[Cell], estimate: Estimate, model: str, settings: NeedleSettings) -> str:
    """Return the page."""
    haystack = ", ".join(settings.haystack) or "noise"
    off = [branch.upper() for branch in ("v2v", "t2v") if not getattr(settings, branch)]
    parts = [
        f"<h1>Needles in {escaped(haystack)}</h1>",
        f"<p>{escaped(model)}{escaped(', without ' + ' and '.join(off)) if off else ''}</p>",
        f'<p class="answer">{estimate.value:.3f} right, 95 % interval {estimate.low:.3f} to {estimate.high:.3f}, '
        f"{estimate.count:,} questions</p>",
        f"<p>{settings.videos} questions a cell; below each accuracy the seconds of a question, without the encoding "
        "of the haystack, and the largest memory.</p>",
    ]
    for hops in settings.hops:
        parts.append(f"<h2>{hops} hop{'s' * (hops > 1)} (by chance {chance(hops):.2f})</h2>")
        parts.append(_table([cell for cell in cells if cell.hops == hops], settings))
    return document("Needles", "\n".join(parts), STYLE)


def _table(cells: Sequence[Cell], settings: NeedleSettings) -> str:
    head = "".join(f"<th>{frames:,} frames</th>" for frames in settings.frames)
    rows = []
    for depth in settings.depths:
        of_row = {cell.frames: cell for cell in cells if cell.depth == depth}
        columns = "".join(_table_cell(of_row[frames]) for frames in settings.frames)
        rows.append(f"<tr><th>depth {depth:g} %</th>{columns}</tr>")
    return f'<div class="box"><table class="map"><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


def _table_cell(cell: Cell) -> str:
    if not cell.answers:
        return f'<td title="{escaped(cell.error)}">too long</td>'
    mixed = [round(a + (b - a) * cell.share) for a, b in zip(LIGHT, DARK, strict=True)]
    colour = "#{:02x}{:02x}{:02x}".format(*mixed)
    dark = ' class="dark"' if cell.share > 0.6 else ""
    beside = f"<span>{cell.seconds:.2f} s</span><span>{cell.memory_bytes / 1e9:.2f} GB</span>"
    return f'<td style="background:{colour}"{dark}><b>{cell.share:.2f}</b>{beside}</td>'


def print_map(cells: Sequence[Cell], settings: NeedleSettings) -> None:
    """Print the tables."""
    for hops in settings.hops:
        title = f"{hops} hop{'s' * (hops > 1)}, by chance {chance(hops):.2f}: accuracy, s, GB"
        table = Table("depth [%]", *(f"{frames:,} frames" for frames in settings.frames), title=title)
        for depth in settings.depths:
            of_row = {cell.frames: cell for cell in cells if (cell.hops, cell.depth) == (hops, depth)}
            table.add_row(f"{depth:g}", *(shown(_text(of_row[frames])) for frames in settings.frames))
        rich.get_console().print(table)


def _text(cell: Cell) -> str:
    return f"{cell.share:.2f}  {cell.seconds:.2f}  {cell.memory_bytes / 1e9:.2f}" if cell.answers else "too long"
