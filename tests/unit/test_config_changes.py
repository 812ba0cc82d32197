"""Which changes of the configuration a resume reports."""

import pytest

from crosslmm.cli import parse_run
from crosslmm.config import changes


def changed(*overrides: str, before: tuple[str, ...] = ()) -> dict:
    before, now = (parse_run(list(argv), "").model_dump(mode="json") for argv in (before, (*before, *overrides)))
    return changes(before, now)


def test_changed_learning_rate_is_named_with_both_values():
    assert changed("--train.learning_rate.decoder=2e-5") == {"train.learning_rate.decoder": (1e-3, 2e-5)}


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("--seed=5", "seed"),
        ("--model.pool_stride=4", "model.pool_stride"),
        ("--data.num_frames=9", "data.num_frames"),
        ("--train.global_batch_size=32", "train.global_batch_size"),
        ("--train.max_steps=7", "train.max_steps"),
        ("--train.precision=bf16", "train.precision"),
    ],
)
def test_fixed_keys_are_reported(override, key):
    assert list(changed(override)) == [key]


@pytest.mark.parametrize(
    "override",
    [
        "--scaling.num_workers=1",
        "--scaling.workers_per_replica=1",
        "--scaling.decode_workers=3",
        "--watchdog.step_s=5",
        "--train.micro_batch_size=4",
        "--train.checkpoint_every=7",
        "--train.keep_checkpoints=5",
        "--train.keep_best=validation/loss",
        "--train.not_finite=skip",
        "--storage=elsewhere",
        "--data.manifest=moved.jsonl",
    ],
)
def test_free_keys_may_change(override):
    assert changed(override) == {}


def test_a_run_goes_on_with_float8_and_without():
    assert changed("--train.float8=true", before=("--train.precision=bf16",)) == {}


def test_key_missing_in_an_older_version_is_reported():
    now = parse_run([], "").model_dump(mode="json")
    before = now | {"train": {key: value for key, value in now["train"].items() if key != "weight_decay"}}
    assert changes(before, now) == {"train.weight_decay": (None, 0.01)}
