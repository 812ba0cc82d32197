import html
import io
import re
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from optuna.distributions import CategoricalDistribution
from rich.console import Console

from crosslmm.sweep import figures, paper
from crosslmm.sweep.progress import SweepProgress
from crosslmm.sweep.report import duration, headline, write
from crosslmm.sweep.run import reproduce_command
from crosslmm.sweep.settings import SweepSettings
from tests.support import sweeps
from tests.support.sweeps import ABLATION, EVERY, JOINT, STRIDE

FIGURES = ["front", "importance", "parallel", "curves"]
SEED = {"seed": CategoricalDistribution([0, 1, 2])}


def page(folder, distributions, trials, **changed) -> tuple[str, list[str]]:
    """Write a report -> the page without plotly.js, and the names of the figures on it."""
    text = write(folder, sweeps.sweep(distributions, **changed), trials).read_text()
    body = text[text.index("<body>") :]
    return body, [name for name in FIGURES if f'id="{name}"' in body]


def absent(text: str) -> list[str]:
    return re.findall(r'<p class="absent">(.*?)</p>', text)


def test_joint_space_gets_every_plot(tmp_path):
    text, drawn_figures = page(tmp_path / "new", JOINT, sweeps.joint())
    assert drawn_figures == FIGURES
    assert not absent(text)
    assert text.count("Plotly.newPlot") == 4
    order = [text.index(f"<h2>{title}") for title in re.findall("<h2>(.*?)</h2>", text)]
    assert order == sorted(order)
    assert len(order) == 6
    assert "Table 2" not in text


def test_text_from_elsewhere_is_shown_as_it_is(tmp_path):
    """Markup, control characters, halves of surrogate pairs (bytes of a file's name), and a password."""
    error = "OSError: \x1b[31m \ud800 <script>alert(1)</script> [/bold] \u202e http://user:s3cr3t/x@host:5000/y"
    trials = [sweeps.trial(0, state="failed", steps=0, error=error), sweeps.trial(1)]
    rejected = [({STRIDE: 1}, error)]
    body, _ = page(tmp_path, JOINT, trials, name="a<b>\x00", rejected=rejected)
    assert (
        body.count(r"\x1b[31m \ud800 &lt;script&gt;alert(1)&lt;/script&gt; [/bold] \u202e http://***@host:5000/y") == 3
    )
    assert not {"\x1b", "\x00", "\u202e"} & set(body)
    assert "<script>alert" not in body


def test_a_point_is_no_markup_of_the_terminal(tmp_path):
    point = {"model.vision_weights": "s3://bucket/[/x][red]", "model.tokenizer": "\x1b[2J"}
    search = SimpleNamespace(trials=[sweeps.trial(point=point)], by_id={})
    console = Console(width=200, file=io.StringIO())
    console.print(SweepProgress(str(tmp_path), search, None, 4, 1, None).table())
    assert r"vision_weights s3://bucket/[/x][red], tokenizer \x1b[2J" in console.file.getvalue()


def test_headline_names_the_best_and_the_knee():
    points = [(1, 10**8, 0.6), (4, 3 * 10**8, 0.95), (16, 10**9, 0.97), (9, 9 * 10**8, 0.5)]
    trials = [sweeps.trial(i, a, macs, tokens=t) for i, (t, macs, a) in enumerate(points)]
    trials.append(sweeps.trial(4, 0.99, 10, "stopped early", steps=1))
    assert headline(sweeps.sweep(), trials) == (
        "16 tokens per frame reach accuracy 0.970; knee: 4 tokens reach 0.950 at 0.3 of the compute "
        "(vision encoder not counted). Based on 4 finished of 5 trials on this data; one seed per setting."
    )


@pytest.mark.parametrize(
    ("trials", "expected"),
    [
        ([], "No trial has finished (there are none yet)"),
        ([sweeps.trial(state="failed", steps=0), sweeps.trial(1, state="failed", steps=0)], "finished (2\u00a0failed)"),
        ([sweeps.trial(tokens=1)], "The only finished trial, with 1 token per frame, reaches accuracy 0.900."),
        ([sweeps.trial(i, macs=10 + i, tokens=1 + i) for i in range(3)], "1 token per frame reaches accuracy 0.900"),
        ([sweeps.trial(i, 0.9 + i / 100, 10 + i) for i in range(3)], "so this sweep does not answer"),
    ],
)  # fmt: skip
def test_headline_claims_only_what_trials_show(trials, expected):
    assert expected in headline(sweeps.sweep(), trials)


@pytest.mark.parametrize("trials", [[], [sweeps.trial(i, state="failed", steps=0, error="bad") for i in range(3)]])
def test_sentences_replace_plots_without_finished_trials(tmp_path, trials):
    text, drawn_figures = page(tmp_path, JOINT, trials)
    assert drawn_figures == []
    assert len(absent(text)) == 4


def test_one_trial_gets_no_importances(tmp_path):
    text, drawn_figures = page(tmp_path, JOINT, sweeps.joint(1))
    assert drawn_figures == ["front", "parallel", "curves"]
    assert absent(text) == ["Importances need 4 finished trials; this sweep has 1."]


def test_one_setting_gets_no_importances(tmp_path):
    drawn = {STRIDE: JOINT[STRIDE]}
    trials = [sweeps.trial(i, 0.9 + i / 100, point={STRIDE: stride}) for i, stride in enumerate([27, 9, 7, 9])]
    text, drawn_figures = page(tmp_path, drawn, trials)
    assert drawn_figures == [name for name in FIGURES if name != "importance"]
    assert absent(text) == ["Only one setting was searched, so it explains all differences between the trials."]


@pytest.mark.parametrize("better", [0, 1])
def test_equal_accuracies_explain_nothing(tmp_path, better):
    trials = [sweeps.trial(i, 0.9 + 0.01 * (i < better), 10**8, point=t.point) for i, t in enumerate(sweeps.joint(20))]
    text, drawn_figures = page(tmp_path, JOINT, trials)
    assert drawn_figures == [name for name in FIGURES if name != "importance"]
    assert "nothing to explain" in absent(text)[0]


def test_hundred_trials_with_running_ones_are_shown(tmp_path):
    trials = sweeps.joint(100)
    trials[-1].state, trials[-2].state = "running", "out of budget"
    text, drawn_figures = page(tmp_path, JOINT, trials)
    assert drawn_figures == FIGURES
    assert text.count("<tr") == 101
    assert "1\u00a0running" in text


def test_choices_may_be_lists_or_none(tmp_path):
    with pytest.warns(UserWarning, match="persistent storage"):
        drawn = {"model.cross_attention_layers": CategoricalDistribution([None, (0, 4)]), **SEED}
    layers = [None, [0, 4], None, [0, 4]]
    trials = [
        sweeps.trial(i, 0.9 + i / 100, point={"model.cross_attention_layers": x, "seed": 0})
        for i, x in enumerate(layers)
    ]
    text, drawn_figures = page(tmp_path, drawn, trials)
    assert "parallel" in drawn_figures
    assert ">[0, 4]</td>" in text


def test_importance_is_highest_for_the_decisive_setting():
    trials = []
    for i in range(27):
        stride, seed = [27, 9, 7][i % 3], (i // 3) % 3
        # The stride determines the best trials, the seed the worst.
        accuracy = 0.9 if stride == 7 else 0.5 if seed else 0.1
        trials.append(sweeps.trial(i, accuracy + i / 1000, point={STRIDE: stride, "seed": seed}))
    drawn = figures.draw({STRIDE: JOINT[STRIDE], **SEED}, trials)["importance"]
    shares = dict(zip(drawn.data[0].y, drawn.data[0].x, strict=True))
    assert shares["model.pool_stride"] > 0.9


def test_front_is_a_line_with_best_and_knee_named():
    points = [(10**8, 0.6), (3 * 10**8, 0.95), (10**9, 0.97), (9 * 10**8, 0.5)]
    trials = [sweeps.trial(i, accuracy, macs) for i, (macs, accuracy) in enumerate(points)]
    trials.append(sweeps.trial(4, 0.99, 10, "stopped early", steps=1))
    drawn = {trace.name: trace for trace in figures.front(trials).data}
    assert list(drawn) == ["stopped early", "finished", "front", "knee: 4 tokens", "best: 4 tokens"]
    assert list(drawn["front"].x) == [10**8, 3 * 10**8, 10**9]
    assert (*drawn["knee: 4 tokens"].x, *drawn["best: 4 tokens"].x) == (3 * 10**8, 10**9)


def test_curves_have_the_colour_of_the_trial_state():
    trials = sweeps.joint()
    drawn = figures.draw(JOINT, trials)["curves"]
    assert drawn.layout.showlegend
    assert {trace.name for trace in drawn.data if trace.showlegend} == {"finished", "stopped early", "failed"}
    trials[0].curve = []
    drawn = figures.draw(JOINT, trials)["curves"]
    with_curve = trials[1:]
    assert [trace.line.color for trace in drawn.data] == [figures.COLOURS[trial.state] for trial in with_curve]
    assert [list(trace.y) for trace in drawn.data] == [[rung.loss for rung in trial.curve] for trial in with_curve]


def test_parallel_axes_carry_full_key_names():
    drawn = figures.draw(JOINT, sweeps.joint())["parallel"]
    names = [label.replace("<br>", "") for label in drawn.layout.xaxis.ticktext]
    assert names == ["accuracy", *sorted(JOINT)]
    assert [label for label, _ in drawn.data[0].customdata] == names


def test_ablation_shows_the_tables_of_the_paper(tmp_path):
    text, _ = page(tmp_path, ABLATION, sweeps.ablation())
    rows = [
        re.findall("<td>(.*?)</td>", row)
        for row in re.findall("<tr>.*?</tr>", paper.tables(ABLATION, sweeps.ablation()))
    ]
    assert "Table 2a: which branches, K = 4" in text
    assert rows[1] == ["none", "0.660 (0.650 to 0.670)", "0.400 (0.390 to 0.410)", "2", "47.2", "47.5"]
    assert [row[0] for row in rows[1:5]] == ["none", "T2V", "V2V", "both"]
    assert [row[1][:5] for row in rows[1:5]] == ["0.660", "0.910", "0.970", "0.980"]
    assert [row[0] for row in rows[6:]] == ["none", "K = 1", "K = 2", "K = 4", "K = 8"]
    assert [row[1][:5] for row in rows[6:]] == ["0.660", "\u2013", "0.960", "0.980", "\u2013"]
    assert "the best seed of each setting counts" in html.unescape(text)


def test_depth_grid_shows_only_table_2b():
    trials = [sweeps.trial(every, point={EVERY: every}) for every in (0, 1, 2)]
    text = paper.tables({EVERY: CategoricalDistribution([0, 1, 2])}, trials)
    assert "Table 2b" in text
    assert "Table 2a" not in text


def test_foreign_text_is_escaped(tmp_path):
    bad = "<script>alert(1)</script><b>&"
    drawn = {"a<i>": CategoricalDistribution([bad, "x"]), **SEED}
    trials = [sweeps.trial(i, 0.9 + i / 100, point={"a<i>": [bad, "x"][i % 2], "seed": 0}, error=bad) for i in range(4)]
    text, _ = page(tmp_path, drawn, trials, name=bad, space=bad, facts={bad: bad})
    assert "<script>alert" not in text
    assert "<i>" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;&lt;b&gt;&amp;") >= 4 + 4 + 2


def test_page_loads_nothing_from_the_network(tmp_path):
    file = write(tmp_path, sweeps.sweep(), sweeps.joint())
    assert file.read_text().count("plotly.js v") == 1
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=", file.read_text())


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (7, "7"), (1_300_000, "1.3 M"), (999_999, "1 M"), (2.4e12, "2.4 T"), (7.5e15, "7.5 P")],
)
def test_quantities_are_readable(value, expected):
    assert figures.quantity(value) == expected


def test_durations_are_readable():
    assert [duration(s) for s in (0.42, 61.5, 119.9, 4000)] == ["0.42 s", "1 min 02 s", "2 min 00 s", "1 h 06 min"]


def test_rejected_points_are_listed_by_frequency(tmp_path):
    rejected = [({"seed": 1}, "too big"), ({"seed": 2}, "tried < before"), ({"seed": 3}, "tried < before")]
    text, _ = page(tmp_path, JOINT, sweeps.joint(), rejected=rejected)
    items = re.search("<h2>Rejected points</h2>.*?<ul>(.*?)</ul>", text, re.S)[1]
    assert items == "<li>tried &lt; before (2)</li><li>too big (1)</li>"
    assert "Rejected points" not in page(tmp_path, JOINT, sweeps.joint())[0]


def test_failed_trials_are_listed_with_their_cause(tmp_path):
    text, _ = page(tmp_path, JOINT, sweeps.joint())
    assert "<li>trial 6: RuntimeError: loss is nan at step 12</li>" in text
    assert text.index("<h2>Failed trials") < text.index("<h2>All trials")
    assert "Failed trials" not in page(tmp_path, ABLATION, sweeps.ablation())[0]


def test_page_shows_the_command_that_continues_the_sweep(tmp_path):
    command = reproduce_command("how few", "my space.py", SweepSettings(trials=12, promote="best"))
    assert command == "python jobs/tune.py --space 'my space.py' --trials 12 --promote best --name 'how few'"
    assert f"<code>{html.escape(command)}</code>" in page(tmp_path, JOINT, [], command=command)[0]


def test_reports_may_be_written_by_several_threads(tmp_path):
    with ThreadPoolExecutor(3) as pool:
        drawn = list(pool.map(lambda i: page(tmp_path / str(i), JOINT, sweeps.joint())[1], range(3)))
    assert drawn == [FIGURES] * 3
