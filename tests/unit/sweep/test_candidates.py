"""Points become trials: their costs, rejections, budgets, rungs, and the checks of a resume."""

import json
from types import SimpleNamespace

import pytest
from mlflow.tracking import MlflowClient
from ray import tune

from crosslmm.cli import parse_run
from crosslmm.config import BadConfig, validate_run
from crosslmm.planning import cost
from crosslmm.sweep import trials, tuner
from crosslmm.sweep.resume import begin_sweep
from crosslmm.sweep.search import Search, TrialFactory, prefill_macs
from crosslmm.sweep.settings import UNSUPPORTED_SCHEDULERS, SweepSettings
from crosslmm.sweep.trials import Trial, Validation
from crosslmm.sweep.tuner import BudgetStopper, build_scheduler
from crosslmm.tracking import MlflowRun

SPACE = {"model.pool_stride": tune.grid_search([1, 2, 4, 8, 9])}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("candidates")
    places = (f"--tracking.uri=sqlite:///{folder}/mlflow.db", f"--storage={folder}")
    return parse_run(["--config=tiny", "--config=tiny-sweep", *places], "")


@pytest.fixture(scope="module")
def record(base):
    return MlflowRun.create(base.tracking, "sweep", "a test")


def candidates(base, record, **changed):
    return TrialFactory(base, SweepSettings(**changed), SPACE, record)


def test_trial_has_planned_costs_and_a_child_run(base, record):
    trial = candidates(base, record)(7, {"model.pool_stride": 4})
    model = cost.meta_model(base.model.model_copy(update={"pool_stride": 4}))
    macs = cost.macs(model, 4, 60)
    assert trial.macs + trial.encoder_macs == macs.linear + macs.attention_products
    # Each of the two layers: scores and values of 64 patches with one another, 64 wide, in each of the four frames.
    assert trial.encoder_macs == macs.encoder + 4 * 2 * (2 * 64 * 64 * 64)
    assert trial.tokens_per_frame == 4
    assert trials.read(base.storage) == [trial]
    run = MlflowClient(record.uri).get_run(trial.run_id)
    assert run.data.tags["mlflow.parentRunId"] == record.run_id
    assert run.data.params == {"trial.number": "7", "trial.model.pool_stride": "4"}
    assert run.data.metrics["cost/memory_bytes"] == trial.memory_bytes


def test_invalid_or_too_costly_points_are_rejected(base, record):
    with pytest.raises(BadConfig, match=r"pool_stride is 9; a 8 x 8 grid takes 1 to 8"):
        candidates(base, record)(0, {"model.pool_stride": 9})
    few, _ = prefill_macs(base.model_copy(update={"model": base.model.model_copy(update={"pool_stride": 4})}))
    assert candidates(base, record, max_macs=few)(0, {"model.pool_stride": 4}).macs == few
    with pytest.raises(BadConfig, match=r"MACs without the vision encoder; --max_macs allows"):
        candidates(base, record, max_macs=few)(0, {"model.pool_stride": 2})
    paper = parse_run(
        [
            "--config=paper-2b",
            "--config=stage-2",
            "--data.num_frames=4",
            "--scaling.num_workers=1",
            "--tracking.uri=sqlite:////nowhere/mlflow.db",
        ],
        "",
    )
    with pytest.raises(BadConfig, match=r"training needs [\d.]+ GB, more than is usable of the 24 GB of --gpu l4"):
        TrialFactory(paper, SweepSettings(gpu="l4"), SPACE, record)(0, {"model.pool_stride": 9})


def test_a_trials_run_is_named_by_its_point(base, record):
    trial = candidates(base, record)(0, {"model.pool_stride": 2})
    assert record.client.get_run(trial.run_id).info.run_name == "pool_stride 2"


def test_search_skips_rejected_points_with_the_reason(base, record):
    search = Search(SPACE, base, [], candidates(base, record), max_trials=5)
    suggested = 0
    while search.suggest(str(suggested)) != search.FINISHED:
        suggested += 1
    assert suggested == len(search.trials) == 4
    ((point, reason),) = search.rejected
    assert point == {"model.pool_stride": 9}
    assert "grid takes 1 to 8" in reason


@pytest.mark.parametrize("name", UNSUPPORTED_SCHEDULERS)
def test_schedulers_that_clone_trials_are_rejected(base, name):
    with pytest.raises(BadConfig, match=rf"--scheduler {name}: .*choose asha or none"):
        SweepSettings(scheduler=name).check(base)


def test_sweep_ends_when_its_budget_is_spent():
    watch = SimpleNamespace(out_of_budget=False, worker_seconds=lambda: 1800.0)
    assert not BudgetStopper(SweepSettings(), watch).stop_all()
    assert not BudgetStopper(SweepSettings(hours=1, dollars=2, price=3), watch).stop_all()
    assert not watch.out_of_budget
    assert BudgetStopper(SweepSettings(dollars=1.5, price=3), watch).stop_all()
    assert watch.out_of_budget
    assert BudgetStopper(SweepSettings(hours=1e-12), watch).stop_all()


def rungs(base, **changed):
    search = SimpleNamespace(trials=[])
    (bracket,) = build_scheduler(SweepSettings(**changed), search, 100, base)._brackets
    return [milestone for milestone, _ in bracket._rungs]


def test_rungs_count_steps_or_compute_before_the_end(base):
    assert rungs(base, first_rung=0.25, keep_one_in=2) == [50, 25]
    total_macs = 100 * base.train.global_batch_size * prefill_macs(base)[0]
    assert rungs(base, rung="compute", first_rung=0.5, keep_one_in=2) == [pytest.approx(total_macs / 2)]


def test_resumed_asha_remembers_rungs_and_spares_the_last(base):
    curve = [Validation(30, 2.0, 0.3), Validation(60, 1.0, 0.5), Validation(100, 0.9, 0.6)]
    ended = Trial(0, {}, {}, 4, 100, 10, 1, state="finished", curve=curve)
    running = Trial(1, {}, {}, 4, 100, 10, 1, curve=curve[:1])
    scheduler = build_scheduler(SweepSettings(), SimpleNamespace(trials=[ended, running]), 100, base)
    (bracket,) = scheduler._brackets
    assert [list(recorded.values()) for _, recorded in bracket._rungs] == [[-1.0], [-2.0]]
    late = SimpleNamespace(trial_id="late")
    scheduler.on_trial_add(None, late)
    worse_at_the_end = tuner._tune_metrics(running, Validation(100, 9.0, 0.0), base, total_steps=100)
    assert scheduler.on_trial_result(None, late, worse_at_the_end) == "CONTINUE"
    worse_before = tuner._tune_metrics(running, Validation(60, 9.0, 0.0), base, total_steps=100)
    assert scheduler.on_trial_result(None, late, worse_before) == "STOP"


def restart(base, tmp_path, space=SPACE, manifests=(), **changed):
    """Begin a sweep, then resume it with changes -> its MLflow run, and the content of sweep.json."""
    folder = str(tmp_path / "sweep")
    begin_sweep(base, folder, "own", SPACE, SweepSettings(), [SimpleNamespace(uri="a", digest="1")])
    config = validate_run(merge(base.model_dump(), changed))
    manifests = list(manifests) or [SimpleNamespace(uri="a", digest="1")]
    return begin_sweep(config, folder, "own", space, SweepSettings(), manifests)


def merge(values, changed):
    return {
        key: merge(value, changed.get(key, {})) if isinstance(value, dict) else changed.get(key, value)
        for key, value in values.items()
    }


def test_a_sweep_resumes_under_its_mlflow_run(base, tmp_path):
    first, begun = restart(base, tmp_path)
    assert first.run_id == begun["run_id"]


def test_sweep_rejects_another_space(base, tmp_path):
    space = {"train.learning_rate.decoder": tune.choice([1.0, 2.0])}
    with pytest.raises(BadConfig, match=r"begun with .* None now; undo that, or give another --name"):
        restart(base, tmp_path, space=space)


def test_sweep_rejects_a_changed_manifest(base, tmp_path):
    with pytest.raises(BadConfig, match=r"begun with digest of manifest 0 1, which is 2 now"):
        restart(base, tmp_path, manifests=[SimpleNamespace(uri="a", digest="2")])


@pytest.mark.parametrize("changed", [{"seed": 1}, {"train": {"validate_every": 7}}])
def test_sweep_rejects_changes_that_affect_trials(changed, base, tmp_path):
    with pytest.raises(BadConfig, match=r"-> .*continue with --accept_changes true"):
        restart(base, tmp_path, **changed)


@pytest.mark.parametrize(
    "changed",
    [
        {"watchdog": {"step_s": 5.0}},
        {"data": {"roots": ["/elsewhere"]}},
        {"data": {"decode_timeout_s": 5.0}},
        {"data": {"max_bad_share": 0.5}},
        {"accept_changes": True},
    ],
)
def test_sweep_resumes_with_changes_free_for_runs(changed, base, tmp_path):
    restart(base, tmp_path, **changed)


def test_accepted_change_of_a_sweep_is_recorded(base, tmp_path):
    restart(base, tmp_path, seed=1, accept_changes=True)
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["config"]["seed"] == 1
