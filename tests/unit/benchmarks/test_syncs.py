"""What makes a GPU wait, counted at a small depth; python -m benchmarks.syncs counts at the 2B's."""

import pytest
import torch
import torch.distributed as dist

from benchmarks import syncs
from benchmarks.emulated_gpu import COUNTS, DEVICE, Emulation

SMALL = [
    "--model.vision.num_hidden_layers=1", "--model.language.num_hidden_layers=2", "--model.cross_attention_every=2",
    "--data.num_frames=3",
]  # fmt: skip


@pytest.fixture(autouse=True)
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("attention", ["sdpa", "flash"])
def test_a_training_step_waits_twice(attention):
    counted = syncs.of_step(syncs.build_run(*SMALL), attention)
    assert counted["syncs"] == {"tolist": 2}


@pytest.mark.parametrize(("attention", "padded"), [("sdpa", False), ("sdpa", True), ("flash", False)])
def test_a_token_waits_once_for_the_stopping_test(attention, padded):
    counted = syncs.of_token(syncs.build_run(*SMALL), attention, padded)
    assert counted["syncs"] == {"aten._local_scalar_dense.default": 1}


def test_what_a_gpu_waits_for_is_counted():
    with Emulation():
        x = torch.arange(6.0).view(2, 3).to(DEVICE)
        COUNTS.take()
        assert x.sum().item() == 15
        assert x.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert x[x > 2].cpu().tolist() == [3, 4, 5]
        torch.tensor([1.0], device=DEVICE)
        x.new_tensor([2.0])
        (x @ x.T).view(4)
    counted = COUNTS.take()
    assert counted["syncs"] == {
        "aten._local_scalar_dense.default": 1,
        "tolist": 1,
        "aten.index.Tensor": 1,
        "aten._to_copy.default to the host": 1,
        "aten._to_copy.default to the GPU": 2,
    }
    assert counted["copies"] == {"aten._to_copy.default": 2}
    assert counted["launches"] == {
        "aten.sum.default": 1,
        "aten.gt.Scalar": 1,
        "aten.index.Tensor": 1,
        "aten.mm.default": 1,
    }
