"""All ranks act together when one of them is asked to stop, or has a non-finite gradient."""

import itertools
import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from crosslmm.train import loop
from crosslmm.train.checkpoint import seals
from crosslmm.train.checkpoint.save import Saver
from crosslmm.train.optim import build_optimizer
from tests.distributed.test_fsdp import STEPS, batches, leave, run_config, sharded

RANKS, NAN_STEP, STOP_STEP = 2, 2, 4
"""Rank 1 has a sample of NaN in the second step, and is asked to stop in the fourth."""


def train(rank: int, folder: Path, not_finite: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", category=UserWarning, module=r"torch\.distributed\.fsdp.*")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    features = "--data.features=somewhere", "--train.learning_rate.vision=0"
    config = run_config(RANKS, f"--train.not_finite={not_finite}", "--train.checkpoint_every=100", *features)
    model, processor = sharded(config, gates=0.3)
    optimizer = build_optimizer(model, config.train)
    saver = Saver(str(folder), config, "test", dist.new_group(backend="gloo"))
    seen: dict = {"logged": {}, "saved": [], "not_finite": [], "raised": None}
    calls = itertools.count(1)

    def weights() -> list[torch.Tensor]:
        return [parameter.to_local().clone() for parameter in model.parameters()]

    def step_batches():
        for step, micro in enumerate(batches(processor, config, RANKS, rank, 0), start=1):
            if rank == 1 and step == NAN_STEP:
                micro[0]["features"] *= float("nan")
            weights_before.append(weights())
            yield loop.StepBatch(micro, [f"{step}-of-{rank}"])

    class RecordingCallbacks(loop.Callbacks):
        def stop_requested(self):
            return rank == 1 and next(calls) == STOP_STEP

        def log(self, step, metrics):
            seen["logged"][step] = metrics

        def save(self, step):
            seen["saved"].append(step)
            saver.save(step, model, optimizer, {}, [])

        def not_finite(self, step, ids, grad_norm):
            seen["not_finite"].append((step, ids, str(grad_norm)))

    weights_before: list[list[torch.Tensor]] = []
    try:
        seen["done"] = loop.train(config, model, optimizer, step_batches(), range(STEPS), RecordingCallbacks())
    except FloatingPointError as error:
        seen["raised"] = str(error)
        weights_before.append(weights())
    seen["changed"] = [
        not all(map(torch.equal, one, two)) for one, two in itertools.pairwise(weights_before[: NAN_STEP + 2])
    ]
    saver.close()
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))
    leave()


def train_both(folder: Path, not_finite: str) -> list[dict]:
    torch.multiprocessing.spawn(train, (folder, not_finite), nprocs=RANKS)
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def skipping(tmp_path_factory):
    folder = tmp_path_factory.mktemp("skip")
    return train_both(folder, "skip"), folder


NOT_FINITE = [[NAN_STEP, ["2-of-0", "2-of-1"], "nan"]]


def test_a_non_finite_step_is_skipped_and_its_samples_reported(skipping):
    for seen in skipping[0]:
        assert seen["not_finite"] == NOT_FINITE
        assert seen["changed"] == [True, False, True]
        skipped = seen["logged"][str(NAN_STEP)]
        assert skipped["skipped"] == 1
        assert "loss" not in skipped
        assert all("loss" in metrics for step, metrics in seen["logged"].items() if step != str(NAN_STEP))


def test_a_stop_of_one_rank_stops_all_after_a_checkpoint(skipping):
    seen, folder = skipping
    assert [(s["done"], s["saved"], len(s["logged"])) for s in seen] == [(STOP_STEP, [STOP_STEP], STOP_STEP)] * 2
    assert [one.step for one in seals.list_sealed(str(folder))] == [STOP_STEP]


def test_a_non_finite_step_stops_every_rank(tmp_path):
    for seen in train_both(tmp_path, "stop"):
        assert seen["raised"] == "the gradient's norm is nan; the weights were left as they were"
        assert seen["not_finite"] == NOT_FINITE
        assert seen["changed"] == [True, False]
        assert (list(seen["logged"]), seen["saved"]) == (["1"], [])
