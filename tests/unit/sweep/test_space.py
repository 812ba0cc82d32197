"""Search spaces: the stock ones with every preset, conditions, grids, and rejected spaces."""

from collections import Counter
from pathlib import Path

import optuna
import pytest
from ray import tune

from crosslmm.cli import parse_run
from crosslmm.config import BadConfig
from crosslmm.sweep import space as spaces
from crosslmm.sweep.space import OnlyIf
from tests.support.common import ROOT
from tune_spaces import branches

SPACES = ROOT / "tune_spaces"
NAMES = ["ablation", "branches", "depth", "joint", "learning_rate", "pooling", "tokens"]


@pytest.fixture(scope="module")
def tiny():
    return parse_run(["--config=tiny", "--config=tiny-sweep"], "")


def file(folder, text):
    path = Path(folder) / "user_space.py"
    path.write_text("from ray import tune\nfrom crosslmm.sweep.space import OnlyIf\n" + text)
    return str(path)


def points(space, config, count=20):
    if spaces.is_grid(space):
        return spaces.grid(space, config)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [spaces.suggest(space, config, study.ask()) for _ in range(count)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("preset", [["tiny"], ["tiny", "tiny-sweep"], ["paper-2b", "stage-2"]])
def test_every_point_of_stock_spaces_is_valid(name, preset):
    config = parse_run([f"--config={part}" for part in preset], "")
    space = spaces.load(name, SPACES, config)
    some = points(space, config)
    assert len(some) > 1
    for point in some:
        spaces.apply(config, spaces.settings(space, config, point))
        assert point.keys() <= space.keys()


def test_pooling_has_each_token_count_once(tiny):
    grid = spaces.grid(spaces.load("pooling", SPACES, tiny), tiny)
    sides = [-(-8 // point["model.pool_stride"]) for point in grid]
    assert sides == [1, 2, 3, 4, 8]
    paper = parse_run(["--config=paper-2b"], "")
    strides = [p["model.pool_stride"] for p in spaces.grid(spaces.load("pooling", SPACES, paper), paper)]
    assert {27, 9, 7, 2, 1} <= set(strides)


def test_tokens_pairs_each_count_with_and_without_attention(tiny):
    grid = spaces.grid(spaces.load("tokens", SPACES, tiny), tiny)
    pairs = [(-(-8 // p["model.pool_stride"]), p["model.cross_attention_every"]) for p in grid]
    assert sorted(pairs) == [(side, every) for side in (1, 2, 3, 4) for every in (0, 2)]
    rates = [f"--train.learning_rate.{branch}=0" for branch in ("v2v", "t2v")]
    without = parse_run(["--config=tiny", "--model.cross_attention_every=0", *rates], "")
    with pytest.raises(BadConfig, match="--space tokens: needs"):
        spaces.load("tokens", SPACES, without)


def test_absent_branches_have_no_learning_rate(tiny):
    space = spaces.load("joint", SPACES, tiny)
    some = points(space, tiny, 40)
    without = [point for point in some if point["model.cross_attention_every"] == 0]
    assert 0 < len(without) < len(some)
    for point in some:
        has_rates = {"train.learning_rate.v2v", "train.learning_rate.t2v"} <= point.keys()
        assert has_rates == (point["model.cross_attention_every"] > 0)
    rates = spaces.apply(tiny, spaces.settings(space, tiny, without[0])).train.learning_rate
    assert (rates.v2v, rates.t2v) == (0, 0)
    assert rates.decoder == without[0]["train.learning_rate.decoder"]


def test_ablation_has_the_arms_of_tables_2a_and_2b(tiny):
    space = spaces.load("ablation", SPACES, tiny)
    arms = set()
    for point in spaces.grid(space, tiny):
        model = spaces.apply(tiny, spaces.settings(space, tiny, point)).model
        arms.add((model.cross_attention_every, model.v2v, model.t2v))
    every = tiny.model.cross_attention_every
    assert arms == {(0, True, True), (1, True, True), (4, True, True), (every, True, True),
                    (every, True, False), (every, False, True)}  # fmt: skip


def test_branches_are_those_of_table_2a_with_three_seeds(tiny, tmp_path):
    pretrained = tiny.model_copy(update={"model": tiny.model.model_copy(update={"vision_weights": str(tmp_path)})})
    space = spaces.load("branches", SPACES, pretrained)
    every = tiny.model.cross_attention_every
    arms = Counter(
        (p["model.cross_attention_every"], p.get("model.v2v"), p.get("model.t2v"))
        for p in spaces.grid(space, pretrained)
    )
    assert arms == dict.fromkeys(
        [(0, None, None), (every, True, True), (every, True, False), (every, False, None)], len(branches.SEEDS)
    )
    assert len(spaces.grid(spaces.load("branches", SPACES, tiny), tiny)) == 4  # a seed would change a random encoder
    with pytest.raises(BadConfig, match=r"model\.v2v true"):
        branches.space(tiny.model_copy(update={"model": tiny.model.model_copy(update={"t2v": False})}))


@pytest.mark.parametrize("name", ["ablation", "branches", "depth", "tokens"])
def test_spaces_over_k_refuse_listed_layers(tiny, name):
    listed = tiny.model_copy(update={"model": tiny.model.model_copy(update={"cross_attention_layers": [0]})})
    with pytest.raises(BadConfig, match="so K has no effect"):
        spaces.load(name, SPACES, listed)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{'model.pool_strid': tune.choice([1])}", "no such key; did you mean model.pool_stride?"),
        ("{'model.pool_stride': tune.choice([0, 1])}", "model.pool_stride: Input should be greater"),
        ("{'train.learning_rate.decoder': tune.uniform(-1, 1)}", "train.learning_rate.decoder: Input"),
        ("{'model.pooling': OnlyIf(lambda v: True, tune.choice(['max']), 'median')}", "model.pooling: Input"),
        ("{'model.v2v': OnlyIf(lambda v: v['model.depth'] > 0, tune.choice([True]), False)}", "model.depth: "),
        ("{'model.pool_stride': [1, 2]}", "neither a Tune domain nor a grid_search"),
        ("{'model.pool_stride': tune.sample_from(lambda spec: 1)}", "model.pool_stride"),
        ("{'storage': tune.choice(['a'])}", "storage cannot be searched"),
        ("{'model.pool_stride': tune.grid_search([1]), 'seed': tune.choice([1])}", "grid_search mixed with other"),
        ("{}", "the space is empty"),
    ],
)  # fmt: skip
def test_invalid_space_is_rejected_in_one_line(tmp_path, tiny, body, message):
    with pytest.raises(BadConfig) as error:
        spaces.load(file(tmp_path, f"def space(config):\n    return {body}\n"), SPACES, tiny)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_names_and_files_without_space_are_rejected(tmp_path, tiny):
    with pytest.raises(BadConfig, match=f"neither a file nor one of {', '.join(NAMES)}"):
        spaces.load("pool", SPACES, tiny)
    with pytest.raises(BadConfig, match="no function space"):
        spaces.load(file(tmp_path, "SPACE = 1\n"), SPACES, tiny)


def test_user_file_may_import_stock_spaces(tmp_path, tiny):
    text = "from tune_spaces import pooling\ndef space(config):\n    return pooling.space(config)\n"
    assert spaces.load(file(tmp_path, text), SPACES, tiny).keys() == {"model.pool_stride"}


def test_spaces_that_change_features_are_detected(tiny):
    choice = tune.choice([1, 2])
    for path in ("model.pool_stride", "train.learning_rate.decoder", "train.epochs"):
        assert not spaces.changes_features({path: choice}, tiny)
    for path in ("data.num_frames", "data.fps", "train.learning_rate.vision", "train.precision",
                 "model.vision.hidden_size", "model.vision_weights", "seed"):  # fmt: skip
        assert spaces.changes_features({path: choice}, tiny) == [path]
    published = parse_run(["--config=paper-2b"], "")
    assert not spaces.changes_features({"seed": choice}, published)


def test_condition_sees_earlier_dimensions(tiny):
    space = {
        "model.cross_attention_every": tune.grid_search([0, 2]),
        "model.v2v_scope": OnlyIf(
            lambda v: v["model.cross_attention_every"] > 0, tune.grid_search(["video", "frame"]), "video"
        ),
    }
    assert spaces.grid(space, tiny) == [
        {"model.cross_attention_every": 0},
        {"model.cross_attention_every": 2, "model.v2v_scope": "video"},
        {"model.cross_attention_every": 2, "model.v2v_scope": "frame"},
    ]
