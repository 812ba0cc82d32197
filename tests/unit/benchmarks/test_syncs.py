"""What makes a GPU wait, counted at a small depth; python -m benchmarks.syncs counts at the 2B's."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import torch.distributed as dist

from benchmarks import syncs
from benchmarks.emulated_gpu import COUNTS, DEVICE, Emulation

SMALL = [
    "--model.vision.num_hidden_layers=1", "--model.language.num_hidden_layers=2", "--model.cross_attention_every=2",
    "--data.num_frames=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def process():
    """A process of its own: torch counts devices when a process first differentiates."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=join_alone) as pool:
        yield pool


def join_alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@pytest.mark.parametrize("attention", ["sdpa", "flash"])
def test_a_training_step_waits_twice(process, attention):
    counted = process.submit(syncs.of_step, syncs.build_run(*SMALL), attention).result()
    assert counted["syncs"] == {"tolist": 2}


@pytest.mark.parametrize(("attention", "padded"), [("sdpa", False), ("sdpa", True), ("flash", False)])
def test_a_token_waits_once_for_the_stopping_test(process, attention, padded):
    counted = process.submit(syncs.of_token, syncs.build_run(*SMALL), attention, padded).result()
    assert counted["syncs"] == {"aten._local_scalar_dense.default": 1}


def test_what_a_gpu_waits_for_is_counted(process):
    counted = process.submit(count_some).result()
    assert counted["syncs"] == {
        "aten._local_scalar_dense.default": 1,
        "tolist": 1,
        "aten.index.Tensor": 1,
        "aten._to_copy.default to the host": 1,
        "aten._to_copy.default to the GPU": 2,
    }
    assert counted["copies"] == {"aten._to_copy.default": 2}
    launched = {"aten.sum.default", "aten.gt.Scalar", "aten.index.Tensor", "aten.mm.default"}
    assert counted["launches"] == dict.fromkeys(launched, 1)


def count_some():
    with Emulation():
        x = torch.arange(6.0).view(2, 3).to(DEVICE)
        COUNTS.take()
        assert x.sum().item() == 15
        assert x.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert x[x > 2].cpu().tolist() == [3, 4, 5]
        torch.tensor([1.0], device=DEVICE)
        x.new_tensor([2.0])
        (x @ x.T).view(4)
    return COUNTS.take()
