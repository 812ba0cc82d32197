"""Three ranks, which do not divide the batch, learn what one process learns: two of them have a sample fewer."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from crosslmm.data.collate import Sample, collate, micro_batches
from crosslmm.data.dataset import BlockLayout
from crosslmm.data.sampler import PADDING, DeterministicSampler
from crosslmm.train import loop
from crosslmm.train.optim import build_optimizer
from tests.distributed.test_fsdp import forbid_pickles, leave, run_config, sample, sharded

BATCH, STEPS, ROWS = 7, 3, 30
ORDER = DeterministicSampler((ROWS,), BATCH, seed=0)


def sample_at(position: int) -> Sample:
    """Return the sample at a position of the run, or what `ReadSamples` makes of padding."""
    if position == PADDING:
        return Sample(PADDING, "", 0, "", [], [], kind=None, weight=0.0, error=None)
    (row,), _ = ORDER.rows_at(np.array([position]))
    messages, videos = sample(int(row))
    return Sample(position, "m", int(row) + 1, str(row), messages, videos, kind=None, weight=1.0, error=None)


def train(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", category=UserWarning, module=r"torch\.distributed\.fsdp.*")
    forbid_pickles()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{ranks}", rank=rank, world_size=ranks)
    config = run_config(1, "--scaling.num_workers=[1, 3]", f"--train.global_batch_size={BATCH}")
    model, processor = sharded(config, gates=0.3)
    layout, seen = BlockLayout(ORDER, ranks, 0, STEPS, rows_per_block=2), []

    class RecordingCallbacks(loop.Callbacks):
        def log(self, step, metrics):
            seen.append((metrics["loss"], metrics["grad_norm"], metrics["labelled_tokens"]))

    def steps():
        for step in range(STEPS):
            positions = layout.rank_positions(rank, step * layout.samples_per_rank + np.arange(layout.samples_per_rank))
            samples = [sample_at(position) for position in positions.tolist()]
            yield loop.StepBatch([collate(part, processor) for part in micro_batches(samples, 2)], [])

    loop.train(config, model, build_optimizer(model, config.train), steps(), range(STEPS), RecordingCallbacks())
    (folder / f"seen-{ranks}-{rank}.json").write_text(json.dumps(seen))
    leave()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uneven")
    for ranks in (1, 3):
        torch.multiprocessing.spawn(train, (ranks, folder), nprocs=ranks)
    return folder


def test_losses_and_gradients_are_those_of_one_process(folder):
    alone, *others = (json.loads((folder / f"seen-{of}.json").read_text()) for of in ("1-0", "3-0", "3-1", "3-2"))
    assert len(alone) == STEPS
    for metrics in others:
        for ours, theirs in zip(metrics, alone, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
