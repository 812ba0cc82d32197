"""Plotly figures of a sweep's trials, Optuna's own where it has one; a sentence where a figure cannot be drawn."""

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
import plotly.colors
import plotly.graph_objects as go
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState, create_trial

from crosslmm.sweep import trials as selection
from crosslmm.sweep.trials import State, Trial

Distributions = Mapping[str, BaseDistribution]
"""Dotted key -> distribution."""

# The palette of Okabe and Ito, distinguishable for the colour-blind.
COLOURS: dict[State, str] = {
    "finished": "#0072B2",
    "stopped early": "#E69F00",
    "out of budget": "#CC79A7",
    "failed": "#D55E00",
    "running": "#009E73",
}
BEST, KNEE = "#D55E00", "#009E73"
ACCURACY_SCALE = ["#9ecae1", "#4292c6", "#08306b"]
"""One hue, darker for higher accuracy; the lightest is still visible on white."""
INK, GRID = "#222222", "#e3e3e3"
MIN_IMPORTANCE_TRIALS = 4
"""Number of finished trials that importances need at least."""


def draw(distributions: Distributions, trials: Sequence[Trial]) -> dict[str, go.Figure | str]:
    """Return all figures by name, in the order of the page; instead of one that cannot be drawn, the reason."""
    study = _study(distributions, trials)
    return {
        "front": front(trials),
        "importance": importance(study, distributions, trials),
        "parallel": parallel(study, trials),
        "curves": curves(study, trials),
    }


def front(trials: Sequence[Trial]) -> go.Figure | str:
    """Draw accuracy against prefill MACs without the encoder, with the Pareto front, its best trial and its knee."""
    done = selection.finished(trials)
    if not done:
        return "No trial has finished, so there is no front."
    pareto, best, knee = selection.front(trials), selection.best(trials), selection.knee(trials)
    early = [trial for trial in trials if trial.state == "stopped early" and trial.last]
    figure = go.Figure()
    if early:
        faint = {"symbol": "circle-open", "size": 9, "color": COLOURS["stopped early"]}
        figure.add_trace(_points("stopped early", early, mode="markers", marker=faint, opacity=0.75))
    blue = COLOURS["finished"]
    figure.add_trace(_points("finished", done, mode="markers", marker={"size": 8, "color": blue}, opacity=0.55))
    line = {"color": blue, "width": 2}
    figure.add_trace(_points("front", pareto, mode="lines+markers", line=line, marker={"size": 9, "color": blue}))
    if knee and knee is not best:
        figure.add_trace(_named("knee", knee, KNEE, "diamond", "bottom right"))
    if best:
        figure.add_trace(_named("best and knee" if knee is best else "best", best, BEST, "star", "top center"))
    macs = [math.log10(trial.macs) for trial in [*done, *early]]
    # Room for a label at the right end of a narrow page.
    room = 0.12 * (max(macs) - min(macs)) + 0.08
    low, high = min(macs) - room, max(macs) + room
    ticks = _round_numbers(low, high)
    figure.update_xaxes(
        title="prefill compute [MACs per sample]",
        type="log",
        range=[low, high],
        tickvals=ticks,
        ticktext=[quantity(tick) for tick in ticks],
    )
    accuracies = [trial.last.accuracy for trial in [*done, *early] if trial.last]
    room = 0.12 * (max(accuracies) - min(accuracies)) or 0.05
    figure.update_yaxes(title="accuracy (exact match)", range=[min(accuracies) - room, max(accuracies) + 1.3 * room])
    return _styled(figure, 460)


def importance(study: optuna.Study, distributions: Distributions, trials: Sequence[Trial]) -> go.Figure | str:
    """Draw how much each setting has to do with high accuracy, as shares of 1 (PED-ANOVA)."""
    done = selection.finished(trials)
    if len(distributions) < 2:
        return "Only one setting was searched, so it explains all differences between the trials."
    if len(done) < MIN_IMPORTANCE_TRIALS:
        return f"Importances need {MIN_IMPORTANCE_TRIALS} finished trials; this sweep has {len(done)}."
    accuracies = sorted((trial.last.accuracy for trial in done if trial.last), reverse=True)
    # The evaluator compares the best trials with all. A tenth is its default, and it needs at least five trials.
    share = max(0.1, min(0.5, 5 / len(done)))
    if accuracies[math.ceil(share * len(done)) - 1] == accuracies[-1]:
        return "The best trials are no more accurate than the others, so there is nothing to explain."
    # The evaluator needs at least two trials with a setting, and not just one without it.
    having = {path: sum(path in trial.point for trial in done) for path in distributions}
    explained = [path for path, count in having.items() if count >= 2 and len(done) - count != 1]
    evaluator = PedAnovaImportanceEvaluator(target_quantile=share)
    shares = get_param_importances(study, evaluator=evaluator, params=explained)
    # The evaluator returns equal shares when it detects nothing.
    if len(set(shares.values())) < 2:
        return "The finished trials do not distinguish the importances of the settings."
    figure = optuna.visualization.plot_param_importances(study, evaluator, explained, target_name="accuracy")
    figure.update_traces(
        y=[_label(path) for path in figure.data[0].y],
        hovertemplate="%{y}: %{x:.2f}<extra></extra>",
        marker={"color": COLOURS["finished"]},
    )
    figure.update_xaxes(title="importance [share of 1]", range=[0, 1.12])
    figure.update_yaxes(title=None, showgrid=False)
    return _styled(figure, 110 + 46 * len(explained))


def parallel(study: optuna.Study, trials: Sequence[Trial]) -> go.Figure | str:
    """Draw finished trials as lines through accuracy and all settings; darker is more accurate."""
    done = selection.finished(trials)
    paths = sorted({path for trial in done for path in trial.point})
    if not paths:
        return "No trial has finished, so there is nothing to draw."
    figure = optuna.visualization.plot_parallel_coordinate(study, target_name="accuracy")
    labels = ["accuracy", *map(_label, paths)]
    for trace in figure.data:
        if trace.customdata is not None:
            trace.line = {"width": 2, "color": _shade(trace.y[0])}
            trace.opacity = 0.8
            # Optuna truncates long names.
            trace.customdata = [
                [label.replace("<br>", ""), html.escape(str(text))]
                for label, (_, text) in zip(labels, trace.customdata, strict=True)
            ]
        else:
            trace.marker.colorscale, trace.marker.reversescale = _scale(), False
    figure.update_xaxes(ticktext=labels, side="top", tickangle=0)
    figure.update_layout(
        annotations=_without_overlap(figure.layout.annotations), meta={"min_width": 150 * len(labels) + 60}
    )
    return _styled(figure, 420).update_layout(margin_b=16)


def curves(study: optuna.Study, trials: Sequence[Trial]) -> go.Figure | str:
    """Draw validation loss over steps, one line per trial, coloured by its state."""
    drawn = [trial for trial in trials if trial.curve]
    if not drawn:
        return "No trial has been validated yet, so there are no learning curves."
    figure = optuna.visualization.plot_intermediate_values(study)
    seen: set[str] = set()
    for trace, trial in zip(figure.data, drawn, strict=True):
        trace.update(
            name=trial.state,
            legendgroup=trial.state,
            showlegend=trial.state not in seen,
            line={"color": COLOURS[trial.state], "width": 1.6},
            marker={"color": COLOURS[trial.state], "size": 5},
            opacity=0.75,
            hovertemplate=f"trial {trial.number}, {trial.state}<br>step %{{x}}: loss %{{y:.3f}}<extra></extra>",
        )
        seen.add(trial.state)
    figure.update_xaxes(title="optimizer steps", rangemode="tozero")
    figure.update_yaxes(title="validation loss [nats per token]")
    return _styled(figure, 420)


def quantity(value: float) -> str:
    """Format a count with three digits: 1.3 M.

    >>> quantity(1_300_000)
    '1.3 M'
    """
    steps = 0
    while value >= 999.5 and steps < 5:
        value, steps = value / 1000, steps + 1
    return f"{value:.3g} {' kMGTP'[steps]}".strip()


def _study(distributions: Distributions, trials: Sequence[Trial]) -> optuna.Study:
    """Return the trials as an Optuna study, in the same order."""
    plain = {path: _plain_choices(drawn) for path, drawn in distributions.items()}
    done = {trial.number for trial in selection.finished(trials)}
    study = optuna.create_study(direction="maximize")
    for trial in trials:
        known = {path: value for path, value in trial.point.items() if path in plain}
        study.add_trial(
            create_trial(
                # Unfinished trials count as pruned: Optuna draws no curve for failed ones.
                state=TrialState.COMPLETE if trial.number in done else TrialState.PRUNED,
                value=trial.last.accuracy if trial.last and trial.number in done else None,
                params={path: _plain(value) for path, value in known.items()},
                distributions={path: plain[path] for path in known},
                intermediate_values={rung.step: rung.loss for rung in trial.curve},
            )
        )
    return study


def _plain(value: Any) -> Any:
    """Return a value that Optuna accepts as a choice; lists become text."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def _plain_choices(drawn: BaseDistribution) -> BaseDistribution:
    if isinstance(drawn, CategoricalDistribution):
        return CategoricalDistribution([_plain(choice) for choice in drawn.choices])
    return drawn


def _points(name: str, trials: Sequence[Trial], **how: Any) -> go.Scatter:
    return go.Scatter(
        name=name,
        x=[trial.macs for trial in trials],
        y=[trial.last.accuracy for trial in trials if trial.last],
        customdata=[[_hover(trial)] for trial in trials],
        hovertemplate="%{customdata[0]}<extra></extra>",
        **how,
    )


def _named(name: str, trial: Trial, colour: str, symbol: str, where: str) -> go.Scatter:
    return _points(
        f"{name}: {tokens(trial.tokens_per_frame)}",
        [trial],
        mode="markers+text",
        text=[f"<b>{name}</b>"],
        textposition=where,
        textfont={"color": INK, "size": 13},
        marker={"color": colour, "symbol": symbol, "size": 15, "line": {"color": "white", "width": 1}},
        cliponaxis=False,
    )


def tokens(count: int) -> str:
    """Return a number of tokens in words."""
    return f"{count} token{'' if count == 1 else 's'}"


def _hover(trial: Trial) -> str:
    lines = [f"trial {trial.number}, {trial.state}", f"{tokens(trial.tokens_per_frame)} per frame"]
    lines += [f"{quantity(trial.macs)} MACs, accuracy {trial.last.accuracy:.3f}"] if trial.last else []
    return "<br>".join(lines + [html.escape(f"{path} = {number(value)}") for path, value in trial.point.items()])


def number(value: Any) -> str:
    """Format a value of a point."""
    return f"{value:.3g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _label(path: str) -> str:
    """Break a dotted key into short lines."""
    lines = [""]
    for part in html.escape(path).replace(".", ".\n").split("\n"):
        if lines[-1] and len(lines[-1]) + len(part) > 22:
            lines.append("")
        lines[-1] += part
    return "<br>".join(lines)


def _shade(share: float) -> str:
    colour = plotly.colors.sample_colorscale(_scale(), [share], colortype="tuple")[0]
    return "#" + "".join(f"{round(255 * part):02x}" for part in colour)


def _scale() -> list[list[Any]]:
    return [[i / (len(ACCURACY_SCALE) - 1), colour] for i, colour in enumerate(ACCURACY_SCALE)]


def _without_overlap(annotations: Sequence[Any]) -> list[Any]:
    """Return the axes' tick labels without those that would overlap; the ends of an axis stay."""
    clear: list[Any] = []
    for label in sorted(annotations, key=lambda a: (a.x, -abs(a.y - 0.5))):
        if all(label.x != other.x or abs(label.y - other.y) >= 0.05 for other in clear):
            label.text = html.escape(label.text)
            label.font = {"size": 11, "color": INK}
            label.bgcolor = "rgba(255,255,255,0.75)"
            clear.append(label)
    return clear


def _round_numbers(low: float, high: float) -> list[float]:
    """Return round ticks between two logarithms: 1, 2, 5, 10, ..., finer if these are too few, coarser if too many."""
    ticks: list[float] = []
    for digits in ([1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 5, 7], [d / 10 for d in range(10, 100)]):
        decades = range(math.floor(low), math.ceil(high))
        ticks = [d * 10.0**decade for decade in decades for d in digits if low <= math.log10(d) + decade <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: -(-len(ticks) // 7)]


def _styled(figure: go.Figure, height: int) -> go.Figure:
    """Apply the page's style; height in px."""
    figure.update_layout(
        template="plotly_white",
        title=None,
        height=height,
        margin={"l": 56, "r": 24, "b": 56},
        font={"family": "system-ui, sans-serif", "size": 13, "color": INK},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        hoverlabel={"align": "left"},
    )
    several = len({trace.name for trace in figure.data if trace.showlegend is not False}) > 1
    figure.update_layout(showlegend=several, margin_t=40 if several else 16)
    figure.update_xaxes(automargin=True, gridcolor=GRID, zeroline=False)
    figure.update_yaxes(automargin=True, gridcolor=GRID, zeroline=False)
    return figure
