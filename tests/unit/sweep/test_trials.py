"""Trial files, the Pareto front and its knee, and the points that the search suggests."""

import math

import optuna
import pytest
from ray import tune
from ray.tune.search import Searcher

from crosslmm import run_folder
from crosslmm.cli import parse_run
from crosslmm.config import BadConfig
from crosslmm.sweep import trials
from crosslmm.sweep.search import Search
from crosslmm.sweep.trials import Trial, Validation


def trial(number, macs, accuracy=None, state="finished", loss=1.0, point=None):
    point = point or {"model.pool_stride": number + 1}
    curve = [] if accuracy is None else [Validation(10, 2.0, accuracy / 2), Validation(20, loss, accuracy)]
    return Trial(number, point, point, 4, macs, 10, 100, state=state, curve=curve)


def test_trial_survives_a_write_and_a_read(tmp_path):
    written = [trial(1, 5, 0.5), trial(0, 7, state="running")]
    for one in written:
        trials.write(str(tmp_path), one)
    assert trials.read(str(tmp_path)) == written[::-1]
    written[1].state = "failed"
    trials.write(str(tmp_path), written[1])
    assert trials.read(str(tmp_path))[0].state == "failed"


def test_run_name_depends_on_the_point():
    one, other = trial(3, 5, point={"seed": 1}), trial(3, 5, point={"seed": 2})
    assert one.name != other.name
    assert one.name.startswith("003-")


def test_a_title_says_the_point_in_few_words():
    point = {"model.pool_stride": 9, "model.cross_attention_every": 4, "train.learning_rate.v2v": 1e-3}
    assert trial(3, 5, point=point).title == "pool_stride 9, cross_attention_every 4, v2v 0.001"
    assert trial(3, 5, point={"a.x": 1, "b.x": 0.25}).title == "a.x 1, b.x 0.25"


def test_front_holds_only_unbeaten_finished_trials():
    known = [
        trial(0, 10, 0.5), trial(1, 20, 0.4), trial(2, 30, 0.8), trial(3, 30, 0.7), trial(4, 80, 0.8),
        trial(5, 90, 0.9), trial(6, 5, 0.95, state="stopped early"), trial(7, 1, state="failed"),
    ]  # fmt: skip
    assert [t.number for t in trials.front(known)] == [0, 2, 5]
    best, knee = trials.best(known), trials.knee(known)
    assert best.number == 5
    assert knee.number == 2
    assert trials.knee(known[:2]).number == 0
    assert trials.best([]) is None
    assert trials.knee([known[-1]]) is None


def test_ties_go_to_lower_loss_then_lower_cost():
    known = [trial(0, 30, 0.8, loss=0.5), trial(1, 20, 0.8, loss=0.4), trial(2, 10, 0.8, loss=0.4)]
    assert trials.best(known).number == 2
    assert [t.number for t in trials.front(known)] == [2]


@pytest.fixture
def config():
    return parse_run(["--config=tiny", "--config=tiny-sweep"], "")


def make(number, point):
    if point.get("model.pool_stride") == 3:
        raise BadConfig("three is too many")
    return Trial(number, point, point, 4, 100, 10, 1)


def walk(search):
    """Take trials until there are no more, ending each before the next."""
    seen = []
    while (suggestion := search.suggest(name := f"tune-{len(seen)}")) != Searcher.FINISHED:
        seen.append(trials.from_json(suggestion["trial"]))
        search.by_id[name].state = "finished"
        search.by_id[name].curve = [Validation(10, 1.0, 0.5)]
        search.on_trial_complete(name, {"finished": True})  # the last that a trial reports
    return seen


def test_grid_search_covers_all_but_rejected_points(config):
    space = {"model.pool_stride": tune.grid_search([1, 2, 3, 4])}
    search = Search(space, config, [], make, max_trials=4)
    assert [t.point["model.pool_stride"] for t in walk(search)] == [1, 2, 4]
    assert search.rejected == [({"model.pool_stride": 3}, "three is too many")]


def test_resume_takes_unfinished_trials_first(config):
    space = {"model.pool_stride": tune.grid_search([1, 2, 4])}
    known = [trial(0, 5, 0.5), trial(1, 5, 0.5, state="running")]
    search = Search(space, config, known, make, max_trials=3)
    assert [(t.number, t.point["model.pool_stride"]) for t in walk(search)] == [(1, 2), (2, 4)]
    assert len(search.trials) == 3


def test_search_draws_no_point_twice(config):
    space = {"model.pool_stride": tune.choice([1, 2, 4]), "model.pooling": tune.choice(["bilinear", "max"])}
    drawn = walk(Search(space, config, [], make, max_trials=4))
    assert [t.number for t in drawn] == [0, 1, 2, 3]
    assert len({tuple(t.point.items()) for t in drawn}) == 4
    everything = walk(Search(space, config, [], make, max_trials=20))
    assert len(everything) == 6


def test_resumed_search_remembers_earlier_points(config):
    space = {"train.learning_rate.decoder": tune.loguniform(1e-4, 1e-2)}
    first = Search(space, config, [], make, max_trials=3)
    walk(first)
    again = Search(space, config, first.trials, make, max_trials=6)
    completed = [t for t in again._study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert [t.params for t in completed] == [t.point for t in first.trials]
    drawn = walk(again)
    assert [t.number for t in drawn] == [3, 4, 5]
    rates = [t.point["train.learning_rate.decoder"] for t in again.trials]
    assert len(set(rates)) == 6


def test_optuna_gets_accuracy_and_compute(config):
    space = {"train.learning_rate.decoder": tune.loguniform(1e-4, 1e-2)}
    search = Search(space, config, [], make, max_trials=3)
    for name, result in {
        "a": {"loss": 1.0, "accuracy": 0.5},
        "b": {"loss": math.nan, "accuracy": 0.1},
        "c": None,
    }.items():
        search.suggest(name)
        search.on_trial_complete(name, result, error=result is None)
    states = [t.state.name for t in search._study.trials]
    assert states == ["COMPLETE", "FAIL", "FAIL"]
    assert search._study.trials[0].values == pytest.approx([0.5, math.log(100)])


def test_grid_search_survives_many_rejections(config):
    def only_the_last(number, point):
        if point["seed"] < 79:
            raise BadConfig("no")
        return make(number, point)

    space = {"seed": tune.grid_search(list(range(80)))}
    search = Search(space, config, [], only_the_last, max_trials=80)
    assert [t.point["seed"] for t in walk(search)] == [79]
    assert len(search.rejected) == 79


def test_lower_trial_limit_adds_no_trials(config):
    known = [trial(number, 5, 0.5) for number in range(3)]
    space = {"train.learning_rate.decoder": tune.loguniform(1e-4, 1e-2)}
    assert walk(Search(space, config, known, make, max_trials=2)) == []


def test_partial_trial_files_are_skipped(tmp_path):
    trials.write(str(tmp_path), trial(0, 5, 0.5))
    (tmp_path / run_folder.TRIALS_FOLDER / "001.json.ab12.part").write_text('{"number": 1, "poi')
    assert [t.number for t in trials.read(str(tmp_path))] == [0]
