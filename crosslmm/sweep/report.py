"""Writes a sweep's report, one self-contained HTML page: how few visual tokens are enough?"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
import plotly.io
import plotly.offline
from optuna.distributions import BaseDistribution

from crosslmm.html_page import document, escaped
from crosslmm.run_folder import REPORT_FILE
from crosslmm.sweep import figures, paper
from crosslmm.sweep import trials as selection
from crosslmm.sweep.figures import number, quantity, tokens
from crosslmm.sweep.paper import ABSENT
from crosslmm.sweep.trials import Point, Trial

MAX_REASONS = 10
"""Number of different reasons for rejection that the page lists at most."""


@dataclass(frozen=True)
class Sweep:
    """What a report shows besides the trials."""

    name: str
    space: str
    """Name of the search space."""
    facts: dict[str, str]
    """Shown at the top: label -> value."""
    distributions: dict[str, BaseDistribution]
    """Dotted key -> distribution; a trial's point lacks keys that a condition excludes."""
    command: str
    """Command line that continues the sweep, without the arguments of the trials' configuration."""
    rejected: Sequence[tuple[Point, str]] = ()
    """Points that were rejected before they became trials, with the reason."""


def write(folder: Path, sweep: Sweep, trials: Sequence[Trial]) -> Path:
    """Write the page into a folder -> its path."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / REPORT_FILE
    page.write_text(_page(sweep, trials, figures.draw(sweep.distributions, trials)), encoding="utf-8")
    return page


def headline(sweep: Sweep, trials: Sequence[Trial]) -> str:
    """Answer "how few tokens are enough?" in two or three sentences, as far as the trials allow."""
    best, knee, front = selection.best(trials), selection.knee(trials), selection.front(trials)
    done = selection.finished(trials)
    if not (best and best.last and knee and knee.last):
        return f"No trial has finished ({_states(trials)}), so how few tokens are enough is open."
    accuracy = best.last.accuracy
    if len(done) == 1:
        answer = (
            f"The only finished trial, with {tokens(best.tokens_per_frame)} per frame, reaches accuracy {accuracy:.3f}."
        )
        return f"{answer} More trials are needed to see how few are enough."
    answer = f"{tokens(best.tokens_per_frame)} per frame {_reach(best)} accuracy {accuracy:.3f}"
    # Where the best trial is the knee, the cheapest trial of the front shows what less compute costs.
    other = knee if knee is not best else front[0]
    if other is not best and other.last:
        answer += "; knee: " if other is knee else "; "
        if other.tokens_per_frame == best.tokens_per_frame:
            answer += "the same number with other settings reaches"
        else:
            answer += f"{tokens(other.tokens_per_frame)} {_reach(other)}"
        answer += (
            f" {other.last.accuracy:.3f} at {other.macs / best.macs:.2g} of the compute (vision encoder not counted)."
        )
    else:
        answer += ", and no trial with more compute was more accurate."
    if len({trial.tokens_per_frame for trial in done}) == 1:
        answer += (
            " All finished trials have the same number of tokens, so this sweep does not answer how few are enough."
        )
    seeds = sweep.distributions.get("seed")
    seeds_used = "the best seed of each setting counts" if seeds and not seeds.single() else "one seed per setting"
    asked = f", each asked {best.last.asked:,} held-out questions" if best.last.asked else ""
    return f"{answer} Based on {len(done)} finished of {len(trials)} trials on this data{asked}; {seeds_used}."


def _reach(trial: Trial) -> str:
    return "reaches" if trial.tokens_per_frame == 1 else "reach"


def _states(trials: Sequence[Trial]) -> str:
    counts = {state: sum(trial.state == state for trial in trials) for state in figures.COLOURS}
    return ", ".join(f"{count}\u00a0{state}" for state, count in counts.items() if count) or "there are none yet"


def _page(sweep: Sweep, trials: Sequence[Trial], drawn: dict[str, go.Figure | str]) -> str:
    facts = {"Sweep": sweep.name, "Space": sweep.space, "Trials": f"{len(trials)}: {_states(trials)}"} | sweep.facts
    facts_html = "".join(
        f"<div><dt>{escaped(label)}</dt><dd>{escaped(value)}</dd></div>" for label, value in facts.items()
    )
    body = f"""<h1>How few tokens are enough?</h1>
<p class="answer">{escaped(headline(sweep, trials))}</p>
<dl>{facts_html}
<div class="wide"><dt>Reproduce</dt><dd><code>{escaped(sweep.command)}</code><br>{REPRODUCE_NOTE}</dd></div>
</dl>
{_section("Accuracy and compute", FRONT_NOTE, "front", drawn["front"])}
{_section("Which settings matter", IMPORTANCE_NOTE, "importance", drawn["importance"])}
{_section("All settings at once", PARALLEL_NOTE, "parallel", drawn["parallel"])}
{_section("Learning curves", CURVES_NOTE, "curves", drawn["curves"])}
{paper.tables(sweep.distributions, trials)}
{_rejected_points(sweep)}
{_failed_trials(trials)}
{_all_trials(sweep, trials)}"""
    title = f"{sweep.name}: how few tokens are enough?"
    return document(title, body, style=STYLE, script=SORT, library=plotly.offline.get_plotlyjs())


def _section(title: str, note: str, name: str, drawn: go.Figure | str) -> str:
    if isinstance(drawn, str):
        return f'<section><h2>{title}</h2><p class="absent">{escaped(drawn)}</p></section>'
    plot = plotly.io.to_html(
        drawn,
        full_html=False,
        include_plotlyjs=False,
        config={"responsive": True, "displaylogo": False, "displayModeBar": False},
        default_height=f"{drawn.layout.height}px",
        div_id=name,
    )
    min_width = f' style="min-width:{drawn.layout.meta["min_width"]}px"' if drawn.layout.meta else ""
    return f'<section><h2>{title}</h2><p>{note}</p><div class="box"><div{min_width}>{plot}</div></div></section>'


def _rejected_points(sweep: Sweep) -> str:
    if not sweep.rejected:
        return ""
    counts = Counter(reason for _, reason in sweep.rejected)
    items = [f"{escaped(reason)} ({count})" for reason, count in counts.most_common(MAX_REASONS)]
    note = f"Rejected before they started, by reason, most frequent first: {len(sweep.rejected)} in total."
    if len(counts) > MAX_REASONS:
        note += f" {len(counts) - MAX_REASONS} more reasons are not shown."
    return _list("Rejected points", f"{note} The MLflow run's left_out.jsonl has every point.", items)


def _failed_trials(trials: Sequence[Trial]) -> str:
    failed = [trial for trial in trials if trial.state == "failed"]
    items = [f"trial {trial.number}: {escaped(trial.error or 'no cause was recorded')}" for trial in failed]
    return _list("Failed trials", "First cause of each failure.", items) if failed else ""


def _list(title: str, note: str, items: Sequence[str]) -> str:
    return f"<section><h2>{title}</h2><p>{note}</p><ul>{''.join(f'<li>{item}</li>' for item in items)}</ul></section>"


def _all_trials(sweep: Sweep, trials: Sequence[Trial]) -> str:
    # The space may have changed since a trial ran; its values are shown all the same.
    paths = list(dict.fromkeys([*sweep.distributions, *(path for trial in trials for path in trial.point)]))
    units = ["tokens per frame", "prefill MACs", "memory per worker", "steps", "loss", "accuracy", "n", "time"]
    header = "".join(
        f'<th><button type="button">{escaped(name)}</button></th>' for name in ["trial", "state", *paths, *units]
    )
    special = {id(selection.best(trials)): "best", id(selection.knee(trials)): "knee"}
    rows = "".join(_row(trial, paths, special.get(id(trial), "")) for trial in trials)
    return f"""<section><h2>All trials</h2>
<p>Click a column's heading to sort by it. Memory is the peak per worker that the planner predicts. Loss and accuracy
are those of the last validation, which came earlier for trials that were stopped early; n is the number of questions
that the accuracy is a share of.</p>
<div class="box"><table id="trials"><thead><tr>{header}<th>error</th></tr></thead><tbody>{rows}</tbody></table></div>
</section>"""


def _row(trial: Trial, paths: Sequence[str], special: str) -> str:
    last = trial.last
    # Text, and the value that the column sorts by.
    cells: list[tuple[str, object]] = [(f"{trial.number} {special}".strip(), trial.number), (trial.state, trial.state)]
    for path in paths:
        value = trial.point.get(path)
        cells.append((number(value) if path in trial.point else ABSENT, "" if value is None else value))
    cells += [
        (str(trial.tokens_per_frame), trial.tokens_per_frame),
        (quantity(trial.macs), trial.macs),
        (f"{trial.memory_bytes / 2**30:.3g} GiB", trial.memory_bytes),
        (f"{last.step:,}", last.step) if last else (ABSENT, ""),
        (f"{last.loss:.3f}", last.loss) if last else (ABSENT, ""),
        (f"{last.accuracy:.3f}", last.accuracy) if last else (ABSENT, ""),
        (f"{last.asked:,}", last.asked) if last and last.asked else (ABSENT, ""),
        (duration(trial.seconds), trial.seconds),
    ]
    tds = "".join(f'<td data-by="{escaped(by)}">{escaped(text)}</td>' for text, by in cells)
    mark = f'<span class="state" style="background:{figures.COLOURS[trial.state]}"></span>'
    tds = tds.replace(f">{trial.state}</td>", f">{mark}{trial.state}</td>", 1)
    faint = "" if trial.state == "finished" else ' class="unfinished"'
    return f'<tr{faint}>{tds}<td class="error">{escaped(trial.error or "")}</td></tr>'


def duration(seconds: float) -> str:
    """Format a duration for people.

    >>> duration(4000)
    '1 h 07 min'
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60:,} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.3g} s"


REPRODUCE_NOTE = """Add the arguments of the configuration; <code>sweep.json</code> in the sweep's folder and the
parameters of the MLflow run have its values. The same name continues this sweep, and another one runs it again."""
FRONT_NOTE = """Each point is a trial. The line is the Pareto front: trials that no other finished trial beats in both
accuracy and compute. Beyond the knee, each doubling of compute gains less accuracy. Compute is the prefill of one
sample without the vision encoder, which all trials share. Hollow points were stopped early, after fewer steps."""
IMPORTANCE_NOTE = """How much the best finished trials differ from all finished ones in a setting (Optuna's PED-ANOVA).
With few trials, this can be mere chance. A setting that only one trial has, or only one lacks, is left out."""
PARALLEL_NOTE = """Each line is a finished trial; darker is more accurate. "None": a condition excluded it."""
CURVES_NOTE = "Validation loss of every trial; the colour shows how the trial ended."

STYLE = """
#trials th:nth-child(2),#trials td:nth-child(2),th:last-child,td.error{text-align:left}
.paper th:last-child{text-align:right}
th button{font:inherit;color:inherit;background:none;border:0;padding:0;cursor:pointer;text-decoration:underline dotted}
tr.unfinished td{color:#595959}
td.error{white-space:normal;min-width:26ch;max-width:60ch;overflow-wrap:anywhere}
.state{display:inline-block;width:10px;height:10px;border-radius:5px;margin-right:7px}
"""

SORT = """
for (const [column, button] of document.querySelectorAll("#trials th button").entries()) {
  button.addEventListener("click", () => {
    const body = document.querySelector("#trials tbody"), by = row => row.cells[column].dataset.by;
    const sign = button.dataset.sign = button.dataset.sign === "1" ? -1 : 1;
    const compare = (a, b) => (a === "") - (b === "") || sign * (a - b || (isNaN(a - b) ? a.localeCompare(b) : 0));
    body.append(...[...body.rows].sort((a, b) => compare(by(a), by(b))));
  });
}
"""
