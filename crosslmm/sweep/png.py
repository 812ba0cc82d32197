"""A plotly figure -> PNG, with matplotlib: cluster nodes have no browser, which plotly's own export needs.

Only what the figures of a sweep are made of: lines, markers, horizontal bars, annotations, a colour bar.
"""

import html
import re
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

DPI = 100
WIDTH = 960
MARKERS = {"circle": "o", "circle-open": "o", "diamond": "D", "star": "*"}
# Plotly's words for where a text stands -> shift in points, and the text's own edge or corner there.
UP = {"top": (6, "bottom"), "middle": (0, "center"), "bottom": (-6, "top")}
ALONG = {"left": (-6, "right"), "center": (0, "center"), "right": (6, "left")}


def write(figure: go.Figure, file: Path) -> None:
    """Draw a figure; pyplot, whose state all threads share, has no part in it."""
    size = WIDTH / DPI, figure.layout.height / DPI
    canvas = FigureCanvasAgg(Figure(figsize=size, dpi=DPI, layout="constrained"))
    axes = canvas.figure.add_subplot()
    for trace in figure.data:
        if trace.type == "bar":
            _bars(axes, trace)
        elif getattr(trace.marker, "showscale", None):
            _colour_bar(axes, trace)
        else:
            _scatter(axes, trace)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    _axis(axes, "x", figure.layout.xaxis)
    _axis(axes, "y", figure.layout.yaxis)
    for shape in figure.layout.shapes:
        axes.plot([shape.x0, shape.x1], [shape.y0, shape.y1], color=shape.line.color, linewidth=0.8, zorder=0)
    for note in figure.layout.annotations:
        axes.annotate(
            _plain(note.text), (note.x, note.y), (note.xshift or 0, 0), textcoords="offset points",
            ha=note.xanchor, va="center", fontsize=8, parse_math=False,
            bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1},
        )  # fmt: skip
    if figure.layout.showlegend:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=6, frameon=False)
    canvas.print_png(file)


def _scatter(axes: Axes, trace: go.Scatter) -> None:
    mode, colour = trace.mode, trace.line.color or trace.marker.color
    hollow = str(trace.marker.symbol).endswith("-open")
    axes.plot(
        trace.x,
        trace.y,
        color=colour,
        alpha=trace.opacity,
        linestyle="-" if "lines" in mode else "none",
        linewidth=trace.line.width,
        marker=MARKERS[trace.marker.symbol or "circle"] if "markers" in mode else "none",
        markersize=(trace.marker.size or 6) * 0.8,
        markerfacecolor="none" if hollow else trace.marker.color,
        label=trace.name if trace.showlegend is not False else None,
    )
    if "text" in mode:
        vertical, horizontal = trace.textposition.split()
        (up, bottom), (along, left) = UP[vertical], ALONG[horizontal]
        for x, y, text in zip(trace.x, trace.y, trace.text, strict=True):
            axes.annotate(
                _plain(text), (x, y), (along, up), textcoords="offset points", ha=left, va=bottom, parse_math=False
            )


def _bars(axes: Axes, trace: go.Bar) -> None:
    bars = axes.barh([_plain(label) for label in trace.y], trace.x, color=trace.marker.color, height=0.7)
    axes.bar_label(bars, trace.text, padding=4)


def _colour_bar(axes: Axes, trace: go.Scatter) -> None:
    marker = trace.marker
    colours = LinearSegmentedColormap.from_list("scale", [(at, to_rgb(colour)) for at, colour in marker.colorscale])
    scale = ScalarMappable(Normalize(marker.cmin, marker.cmax), colours)
    axes.figure.colorbar(scale, ax=axes, label=_plain(marker.colorbar.title.text), pad=0.02, aspect=30)


def _axis(axes: Axes, name: str, axis: Any) -> None:
    is_log = axis.type == "log"
    if is_log:
        axes.set(**{f"{name}scale": "log"})
        getattr(axes, f"{name}axis").set_minor_locator(NullLocator())
    if axis.range:
        axes.set(**{f"{name}lim": [10**end if is_log else end for end in axis.range]})
    elif axis.rangemode == "tozero":
        axes.set(**{f"{name}lim": (0, None)})
    if axis.tickvals is not None:
        axes.set(**{f"{name}ticks": axis.tickvals, f"{name}ticklabels": [_plain(text) for text in axis.ticktext]})
    if axis.side == "top":
        getattr(axes, f"{name}axis").tick_top()
        axes.tick_params(axis=name, labelsize=9)  # type: ignore[arg-type]
    getattr(axes, f"{name}axis").set_visible(axis.visible is not False)
    axes.set(**{f"{name}label": _plain(axis.title.text or "")})
    axes.tick_params(axis=name, length=0)  # type: ignore[arg-type]
    if axis.showgrid is not False:
        axes.grid(axis=name, color=axis.gridcolor, linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def _plain(text: str) -> str:
    """Plotly's markup as text."""
    return html.unescape(re.sub(r"</?b>", "", text.replace("<br>", "\n")))
