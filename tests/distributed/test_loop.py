"""What all ranks do together when one of them has something to say: stop, or a gradient that is no number."""

import itertools
import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from crosslmm.train import checkpoint, checkpoint_store, loop
from crosslmm.train.optim import build_optimizer
from tests.distributed.test_fsdp import STEPS, batches, leave, run_config, sharded

RANKS, POISONED, TOLD_AFTER = 2, 2, 4
"""Rank 1 has a broken sample in the second step, and is told to stop in the fourth."""


def train(rank: int, folder: Path, not_finite: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", category=UserWarning, module=r"torch\.distributed\.fsdp.*")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    features = "--data.features=somewhere", "--train.learning_rate.vision=0"
    config = run_config(RANKS, f"--train.not_finite={not_finite}", "--train.checkpoint_every=100", *features)
    model, processor = sharded(config, gates=0.3)
    optimizer = build_optimizer(model, config.train)
    saver = checkpoint.Saver(str(folder), config, "test", dist.new_group(backend="gloo"))
    seen: dict = {"logged": {}, "saved": [], "not_finite": [], "raised": None}
    asked = itertools.count(1)

    def weights() -> list[torch.Tensor]:
        return [parameter.to_local().clone() for parameter in model.parameters()]

    def given():
        for step, micro in enumerate(batches(processor, config, RANKS, rank, 0), start=1):
            if rank == 1 and step == POISONED:
                micro[0]["features"] *= float("nan")
            seen_before.append(weights())
            yield loop.StepBatch(micro, [f"{step}-of-{rank}"])

    class RecordingCallbacks(loop.Callbacks):
        def stop_requested(self):
            return rank == 1 and next(asked) == TOLD_AFTER

        def log(self, step, metrics):
            seen["logged"][step] = metrics

        def save(self, step):
            seen["saved"].append(step)
            saver.save(step, model, optimizer, {}, [])

        def not_finite(self, step, ids, grad_norm):
            seen["not_finite"].append((step, ids, str(grad_norm)))

    seen_before: list[list[torch.Tensor]] = []
    try:
        seen["done"] = loop.train(config, model, optimizer, given(), range(STEPS), RecordingCallbacks())
    except FloatingPointError as error:
        seen["raised"] = str(error)
        seen_before.append(weights())
    seen["changed"] = [
        not all(map(torch.equal, one, two)) for one, two in itertools.pairwise(seen_before[: POISONED + 2])
    ]
    saver.close()
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))
    leave()


def seen_by_both(folder: Path, not_finite: str) -> list[dict]:
    torch.multiprocessing.spawn(train, (folder, not_finite), nprocs=RANKS)
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def skipping(tmp_path_factory):
    folder = tmp_path_factory.mktemp("skip")
    return seen_by_both(folder, "skip"), folder


BROKEN = [[POISONED, ["2-of-0", "2-of-1"], "nan"]]


def test_a_step_that_is_no_number_is_skipped_and_its_samples_named_on_every_rank(skipping):
    for seen in skipping[0]:
        assert seen["not_finite"] == BROKEN
        assert seen["changed"] == [True, False, True]
        skipped = seen["logged"][str(POISONED)]
        assert skipped["skipped"] == 1
        assert "loss" not in skipped
        assert all("loss" in metrics for step, metrics in seen["logged"].items() if step != str(POISONED))


def test_what_one_rank_is_told_stops_all_after_the_same_step_with_a_checkpoint(skipping):
    seen, folder = skipping
    assert [(s["done"], s["saved"], len(s["logged"])) for s in seen] == [(TOLD_AFTER, [TOLD_AFTER], TOLD_AFTER)] * 2
    assert [one.step for one in checkpoint_store.list_sealed(str(folder))] == [TOLD_AFTER]


def test_a_step_that_is_no_number_stops_the_run_on_every_rank(tmp_path):
    for seen in seen_by_both(tmp_path, "stop"):
        assert seen["raised"] == "the gradient's norm is nan; the weights were left as they were"
        assert seen["not_finite"] == BROKEN
        assert seen["changed"] == [True, False]
        assert (list(seen["logged"]), seen["saved"]) == (["1"], [])
