"""Tables 2a and 2b of the paper beside a sweep over the same settings: which branches, and in which layers."""

import html
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import NamedTuple

from optuna.distributions import BaseDistribution, CategoricalDistribution

from crosslmm.sweep import trials as selection
from crosslmm.sweep.trials import Trial

EVERY, V2V, T2V = "model.cross_attention_every", "model.v2v", "model.t2v"

BRANCHES = {"none": (47.2, 47.5), "T2V": (47.3, 47.7), "V2V": (48.4, 48.9), "both": (48.7, 49.9)}
"""Table 2a: VideoMME and MVBench [%], one token per frame."""
LAYERS = {0: 47.2, 1: 48.5, 2: 48.5, 4: 48.7, 8: 47.7}
"""Table 2b: K -> VideoMME [%]; 0 is no cross-attention."""

ABSENT = "\u2013"
"""Placeholder of a missing value."""


class Arm(NamedTuple):
    """The cross-attentions of a trial."""

    branches: str
    """none, T2V, V2V or both."""
    every: int | None
    """K, 0 for none; None if the sweep did not vary it."""


def arm(trial: Trial) -> Arm:
    """Return a trial's cross-attentions, as far as the sweep varied them."""
    every, v2v, t2v = (trial.settings.get(path, default) for path, default in ((EVERY, None), (V2V, True), (T2V, True)))
    if every == 0 or not (v2v or t2v):
        return Arm("none", 0)
    return Arm("both" if v2v and t2v else "V2V" if v2v else "T2V", every)


def tables(distributions: Mapping[str, BaseDistribution], trials: Sequence[Trial]) -> str:
    """Return both tables as HTML if the sweep is a grid over what they compare, with or without seeds; else an
    empty string."""
    if set(distributions) - {EVERY, V2V, T2V, "seed"} or not all(
        isinstance(searched, CategoricalDistribution) for searched in distributions.values()
    ):
        return ""
    done = [(arm(trial), trial) for trial in selection.finished(trials)]
    tables_html = ""
    if {V2V, T2V} & set(distributions):
        # Single branches ran with one K; compare both branches at the same K.
        alone = [of.every for of, _ in done if of.branches in ("V2V", "T2V")]
        every = max(alone, key=alone.count, default=None)
        rows = [
            _row(name, [t for of, t in done if of.branches == name and (name == "none" or of.every == every)], figures)
            for name, figures in BRANCHES.items()
        ]
        here = f", cross-attention in every layer (K = {every})" if every == 1 else f", K = {every}" if every else ""
        tables_html += _table(f"Table 2a: which branches{here}", "branches", rows, ["VideoMME", "MVBench"])
    if EVERY in distributions:
        depths = [every for every, _ in LAYERS.items()]
        depths += sorted({of.every for of, _ in done if of.every is not None} - set(depths))
        rows = [
            _row(
                f"K = {every}" if every else "none",
                [t for of, t in done if of.every == every and of.branches in ("both", "none")],
                (LAYERS.get(every),),
            )
            for every in depths
        ]
        tables_html += _table("Table 2b: both branches in every K-th layer", "layers", rows, ["VideoMME"])
    return tables_html


def _row(name: str, trials: Sequence[Trial], figures: Sequence[float | None]) -> str:
    last = [trial.last for trial in trials if trial.last]
    cells = [name, _spread([rung.accuracy for rung in last]), _spread([rung.loss for rung in last]), str(len(last))]
    cells += [ABSENT if figure is None else f"{figure:.1f}" for figure in figures]
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ABSENT
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _table(title: str, first: str, rows: Sequence[str], benchmarks: Sequence[str]) -> str:
    heads = [first, "accuracy", "loss [nats per token]", "trials", *(f"paper: {name} [%]" for name in benchmarks)]
    header = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    return f"""<section><h2>{html.escape(title)}</h2>
<p>Mean over the seeds that finished, range in brackets. The paper measured other data and other questions: compare the
order, not the values.</p>
<div class="box"><table class="paper"><thead><tr>{header}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>
</section>"""
