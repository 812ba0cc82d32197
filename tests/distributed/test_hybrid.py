"""Hybrid sharding in real gloo processes: two copies of the model on two ranks each learn what one process learns, and
a checkpoint passes between any numbers of ranks and shards."""

import contextlib
import functools
import unittest.mock
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from crosslmm.config import RunConfig
from crosslmm.model.loading import build_model, build_processor
from crosslmm.model.param_groups import fsdp_units
from crosslmm.planning import cost
from crosslmm.planning import hybrid as planning
from crosslmm.train import loop, worker
from crosslmm.train.checkpoint import seals
from crosslmm.train.checkpoint.read import read_newest
from crosslmm.train.checkpoint.save import Saver
from crosslmm.train.checkpoint.state import load_state, state_of
from crosslmm.train.distributed.parallel import parallelize
from crosslmm.train.optim import build_optimizer
from tests.distributed.test_fsdp import BATCH, forbid_pickles, leave, run_config
from tests.support.common import conversation, open_gates, random_frames

RANKS, SAVE_AT = 4, 2
FRAMES = (
    ((9, 2), (0, 0), (1, 0), (3, 1)),
    ((4, 0), (1, 0), (2, 0), (0, 0)),
    ((1, 1), (0, 5), (2, 2), (1, 0)),
)
"""Frames of each sample, by step and rank of four: text only on a rank, and on all of them in a step's last pass."""
ARMS = {
    "whole": (),
    "frozen": ("--train.learning_rate.vision=0", "--train.learning_rate.decoder=0"),
    "adapters": ("--train.lora.rank=4", "--train.lora.targets=[decoder,v2v,vision]"),
    "recomputed": ("--train.activation_checkpointing=selective",),
    "bf16": ("--train.precision=bf16",),
}
TOLERANCES = dict.fromkeys(ARMS, 1e-5) | {"bf16": 1e-2}
"""Between two copies on two ranks each and one process: bf16 rounds the same samples differently in another batch."""
HYBRID = "--scaling.workers_per_replica=2"
OTHERS = {
    "4 ranks, 4 shards": (4, ()),
    "4 ranks, 1 shard": (4, ("--scaling.workers_per_replica=1",)),
    "3 ranks, 3 shards": (3, (HYBRID,)),
    "2 ranks, 2 shards": (2, (HYBRID,)),
    "1 rank": (1, (HYBRID,)),
}
"""What may follow on two copies of the model on two ranks each, such as fewer ranks after the loss of a node."""


def micro_batches(processor, ranks: int, rank: int, first_step: int):
    """Yield this rank's micro-batches of each step. In the last step, rank 1 of four has one and repeats it."""
    for step in range(first_step, len(FRAMES)):
        talks, videos = [], []
        for place, count in enumerate(sum(FRAMES[step], ())):
            videos.append([random_frames(count, seed=100 * step + place)] if count else [])
            talks.append(conversation(f"Question {place}?", ["circle", "a red square"][place % 2], video=count > 0))
        share = BATCH // ranks
        size = share if ranks == 1 or (rank == 1 and step == len(FRAMES) - 1) else 1
        starts = range(rank * share, (rank + 1) * share, size)
        yield loop.StepBatch([processor(talks[i : i + size], videos[i : i + size]) for i in starts], [])


@contextlib.contextmanager
def counted(name: str) -> Iterator[list[int]]:
    """Count what FSDP sends with a collective, each time, by the size of its first argument [elements]."""
    collective, sizes = getattr(dist, name), []

    def count(*arguments, group=None, **options):
        tensor = (arguments or [options["output_tensor"]])[0]
        if group is not None and tensor.is_floating_point():  # neither the loop's own, nor those of a checkpoint
            sizes.append(tensor.numel())
        return collective(*arguments, group=group, **options)

    with unittest.mock.patch.object(dist, name, count):
        yield sizes


class Rank:
    """Model and optimizer of one rank, sharded as the run's settings have it."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.shards = worker._count_shards(config.scaling)
        self.processor = build_processor(config.model)
        self.model = parallelize(self._build, config.train, torch.device("cpu"), self.shards)
        self.optimizer = build_optimizer(self.model, config.train)
        self.group = dist.new_group(backend="gloo")

    def _build(self, weights: bool):
        model = build_model(self.config.model, self.processor, seed=0)
        if weights:
            open_gates(model, 0.3)
        return model

    def train(self, folder: Path, first_step: int = 0) -> dict:
        """Return what was learnt in each step; save in `folder` after the step `SAVE_AT`."""
        seen: dict = {"metrics": [], "gradients": [], "units": len(fsdp_units(self.model)) + 1}

        def keep_gradients(*_) -> None:
            learning = (
                (name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad
            )
            seen["gradients"].append({name: parameter.grad.full_tensor() for name, parameter in learning})

        def save_state() -> None:
            seen["state"] = self.state()
            self.save(folder)

        class RecordingCallbacks(loop.Callbacks):
            def log(self, step, metrics):
                seen["metrics"].append((metrics["loss"], metrics["grad_norm"]))

            def save(self, step):
                if step == SAVE_AT:
                    save_state()

        self.optimizer.register_step_pre_hook(keep_gradients)
        steps = micro_batches(self.processor, dist.get_world_size(), dist.get_rank(), first_step)
        with counted("all_reduce") as seen["reduced"], counted("all_gather_single") as seen["gathered"]:
            loop.train(
                self.config, self.model, self.optimizer, steps, range(first_step, len(FRAMES)), RecordingCallbacks()
            )
        seen["local"] = [parameter.to_local() for parameter in self.model.parameters()]
        return seen

    def state(self) -> dict[str, torch.Tensor]:
        """Return the whole weights and moments."""
        state = state_of(self.model, self.optimizer)
        return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in state.items()}

    def save(self, folder: Path) -> None:
        saver = Saver(str(folder), self.config, "test", self.group)
        saver.save(SAVE_AT, self.model, self.optimizer, {}, [])
        saver.close()

    def load(self, folder: Path) -> dict[str, torch.Tensor]:
        """Return the whole state that the model and the optimizer have after they loaded a checkpoint."""
        for parameter in self.model.parameters():
            parameter.detach().to_local().zero_()
        newest, state = read_newest(str(folder), self.group, self.shards)
        assert newest.step == SAVE_AT
        load_state(state, self.model, self.optimizer)
        return self.state()


def phases(folder: Path):
    """Yield the name and the number of ranks of each process group, and its task, which returns what a rank saw."""

    def config(ranks: int, *overrides: str) -> RunConfig:
        return run_config(ranks, "--train.micro_batch_size=1", f"--train.checkpoint_every={SAVE_AT}", *overrides)

    def train(ranks: int, *overrides: str) -> dict:
        return {arm: Rank(config(ranks, *overrides, *ARMS[arm])).train(folder / f"{arm}, {ranks}") for arm in ARMS}

    def pass_on(other: str) -> dict:
        _, overrides = OTHERS[other]
        there = Rank(config(4, *overrides))
        loaded = there.load(folder / "whole, 4")
        there.save(folder / other)
        return loaded

    def take_back() -> dict:
        there = Rank(config(4, HYBRID))
        loaded = {other: there.load(folder / other) for other in OTHERS}
        return {"loaded": loaded, "resumed": there.train(folder, SAVE_AT)}

    yield "one", 1, functools.partial(train, 1)
    yield "hybrid", 4, functools.partial(train, 4, HYBRID)
    for other, (ranks, _) in OTHERS.items():
        yield other, ranks, functools.partial(pass_on, other)
    yield "back", 4, take_back


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", category=UserWarning, module=r"torch\.distributed\.fsdp.*")
    forbid_pickles()
    for number, (name, ranks, task) in enumerate(phases(folder)):
        if rank < ranks:
            method = f"file://{folder}/rendezvous-{number}"
            dist.init_process_group("gloo", init_method=method, rank=rank, world_size=ranks)
            torch.save(task(), folder / f"{name}-{rank}.pt")
            dist.barrier()
            if name != "back":
                dist.destroy_process_group()
    leave()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hybrid")
    torch.multiprocessing.spawn(work, (folder,), nprocs=RANKS)
    return folder


def seen(folder: Path, name: str, rank: int = 0):
    return torch.load(folder / f"{name}-{rank}.pt")


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


@pytest.mark.parametrize("arm", ARMS)
def test_two_copies_on_two_ranks_learn_what_one_process_learns(folder, arm):
    one, hybrid, tolerance = seen(folder, "one")[arm], seen(folder, "hybrid")[arm], TOLERANCES[arm]
    assert len(one["metrics"]) == len(hybrid["metrics"]) == len(FRAMES)
    for step in range(len(FRAMES)):
        assert hybrid["metrics"][step] == pytest.approx(one["metrics"][step], rel=tolerance)
        assert one["gradients"][step].keys() == hybrid["gradients"][step].keys()
        for name, gradient in one["gradients"][step].items():
            if arm != "bf16":
                torch.testing.assert_close(hybrid["gradients"][step][name], gradient, atol=tolerance, rtol=tolerance)
        ours, theirs = (torch.cat([g.flatten() for g in run["gradients"][step].values()]) for run in (hybrid, one))
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_replicas_stay_equal_and_half_as_large_as_the_model(folder):
    local = [seen(folder, "hybrid", rank)["whole"]["local"] for rank in range(RANKS)]
    for rank in (0, 1):
        assert all(map(torch.equal, local[rank], local[rank + 2]))
    sizes = [sum(tensor.numel() for tensor in of_rank) for of_rank in local]
    assert sizes[0] + sizes[1] == sum(t.numel() for t in seen(folder, "one")["whole"]["local"])
    assert max(sizes) < 1.1 * min(sizes)


def test_gradients_pass_between_copies_once_a_step(folder):
    """A step of two micro-batches reduces those of each FSDP unit once."""
    hybrid = seen(folder, "hybrid")["whole"]
    assert len(hybrid["reduced"]) == len(FRAMES) * hybrid["units"]


@pytest.mark.parametrize("arm", ["whole", "frozen", "bf16"])
def test_the_planner_counts_what_fsdp_sends(folder, arm):
    """FSDP pads shards to equal sizes, and prefetches a layer of the frozen encoder that the backward pass does not
    reach."""
    config, of_run = run_config(4, *ARMS[arm]), seen(folder, "hybrid")[arm]
    layer = cost.training_model(config).vision_tower.encoder.layers[-1]
    prefetched = sum(parameter.numel() for parameter in layer.parameters()) if arm == "frozen" else 0
    gathered, passes = planning.count_gathered(config), 2 * len(FRAMES)
    assert sum(of_run["gathered"]) / passes == pytest.approx(gathered + prefetched, rel=0.001)
    assert sum(of_run["reduced"]) / len(FRAMES) == pytest.approx(cost.learning(config) / 2, rel=0.001)


def test_every_rank_saves_a_quarter(folder):
    (sealed,) = seals.list_sealed(str(folder / "whole, 4"))
    sizes = [size for name, (size, _) in sealed.files.items() if name.startswith("rank-")]
    assert len(sizes) == sealed.world_size == RANKS
    assert max(sizes) < 0.3 * sum(sizes)


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_passes_to_other_ranks_and_shards_and_back(folder, other):
    written = seen(folder, "hybrid")["whole"]["state"]
    assert any(name.startswith("optimizer/") for name in written)
    for rank in range(OTHERS[other][0]):
        assert_equal(seen(folder, other, rank), written)
    for rank in range(RANKS):
        assert_equal(seen(folder, "back", rank)["loaded"][other], written)


def test_a_resumed_run_equals_an_undisturbed_one(folder):
    undisturbed, resumed = seen(folder, "hybrid")["whole"], seen(folder, "back")["resumed"]
    assert resumed["metrics"] == undisturbed["metrics"][SAVE_AT:]
    assert all(map(torch.equal, resumed["local"], undisturbed["local"]))
