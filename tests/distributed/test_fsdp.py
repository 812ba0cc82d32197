"""FSDP in real gloo processes equals one process, through kill, resume, resharding and export."""

import functools
import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText

from crosslmm.cli import parse_run
from crosslmm.config import RunConfig
from crosslmm.data.collate import Sample, collate_for_validation
from crosslmm.data.feature_format import to_bf16
from crosslmm.model.compilation import compile_blocks
from crosslmm.model.loading import build_model, build_processor
from crosslmm.train import loop
from crosslmm.train.checkpoint.export import export
from crosslmm.train.checkpoint.read import read_newest
from crosslmm.train.checkpoint.save import Saver
from crosslmm.train.checkpoint.state import load_state
from crosslmm.train.distributed import parallel
from crosslmm.train.distributed.parallel import parallelize
from crosslmm.train.optim import build_optimizer
from tests.support.common import conversation, open_gates, random_frames

STEPS, STOP_AFTER, BATCH = 6, 3, 8


def run_config(ranks: int, *overrides: str) -> RunConfig:
    sizes = [f"--scaling.num_workers={ranks}", f"--train.global_batch_size={BATCH}", "--train.micro_batch_size=2"]
    return parse_run([*sizes, "--train.warmup_steps=2", f"--train.checkpoint_every={STOP_AFTER}", *overrides], "")


def sample(place: int):
    """Return a sample; a quarter of them is text only, so that a rank can have a micro-batch without video."""
    videos = [] if place % 8 in (2, 3) else [random_frames(1 + place % 4, seed=place)]
    answer = ["circle", "a red square", "left"][place % 3]
    return conversation(f"Question {place}?", answer, video=bool(videos)), videos


def to_batch(processor, config: RunConfig, talks, videos):
    """Return the batch; in a run from features with random features in bfloat16 for each video."""
    if config.data.features is None:
        return processor(talks, videos)
    size = (64, 64)
    features = [
        [to_bf16(np.random.default_rng(int(video.sum())).normal(0, 1, (len(video), *size))) for video in of_sample]
        for of_sample in videos
    ]
    return processor(talks, features, features=size)


def batches(processor, config: RunConfig, ranks: int, rank: int, first_step: int):
    """Yield this rank's micro-batches of each step, of two samples each. In every other step the second rank has fewer
    micro-batches than the first, as can happen where they are counted in tokens."""
    share = BATCH // ranks
    for step in range(first_step, STEPS):
        size = 4 if rank == 1 and step % 2 else 2
        micro = []
        for start in range(step * BATCH + rank * share, step * BATCH + (rank + 1) * share, size):
            talks, videos = zip(*[sample(place) for place in range(start, start + size)], strict=True)
            micro.append(to_batch(processor, config, talks, videos))
        yield micro


def fixed_batch(processor, config: RunConfig):
    talks, videos = zip(*[sample(place) for place in (100, 101, 102)], strict=True)
    return to_batch(processor, config, talks, videos)


def sharded(config: RunConfig, gates: float, device: str = "cpu"):
    """Return the run's model, sharded over all ranks, with open gates, and its processor."""
    processor = build_processor(config.model)

    def build(weights: bool):
        model = build_model(config.model, processor, seed=0)
        if weights:
            open_gates(model, gates)
        return model

    return parallelize(build, config.train, torch.device(device)), processor


def forbid_pickles() -> None:
    """Fail if anything, torch included, exchanges pickled objects between ranks."""

    def refuse(*arguments, **options):
        raise AssertionError("an object collective")

    for name in ("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"):
        setattr(dist, name, refuse)
        setattr(dist.distributed_c10d, name, refuse)


def leave() -> None:
    """End this process at once. At an ordinary exit one of hundreds aborted with "terminate called without an active
    exception": a thread of torch's that nobody had joined."""
    dist.barrier()
    os._exit(0)


def train(
    rank: int, ranks: int, folder: Path, resume: bool, stop: bool, overrides: tuple[str, ...] = (), device: str = "cpu"
) -> None:
    torch.set_num_threads(1)
    # pytest's filters do not apply here. FSDP's warning about a module's output means wrong gradients.
    warnings.filterwarnings("error", category=UserWarning, module=r"torch\.distributed\.fsdp.*")
    forbid_pickles()
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous-{ranks}-{resume}-{stop}", rank=rank,
                            world_size=ranks)  # fmt: skip
    config = run_config(ranks, *overrides)
    parallel.compile_blocks = functools.partial(compile_blocks, backend="aot_eager")  # inductor takes four minutes
    model, processor = sharded(config, 0.3, device)
    optimizer = build_optimizer(model, config.train)
    group, losses, first = dist.new_group(backend="gloo"), {}, 0
    if resume and (found := read_newest(str(folder), group)):
        newest, state = found
        load_state(state, model, optimizer)
        first = newest.step
    saver = Saver(str(folder), config, f"{ranks}{resume:d}", group)

    class RecordingCallbacks(loop.Callbacks):
        def log(self, step, metrics):
            losses[step] = metrics["loss"], metrics["grad_norm"]

        def save(self, step):
            if step == STOP_AFTER:
                saver.save(step, model, optimizer, {}, [])
                if stop:
                    saver.wait()
                    dist.barrier()
                    os._exit(0)  # like a spot node that is reclaimed

    step_batches = (
        loop.StepBatch([loop.pinned(batch, torch.device(device)) for batch in micro], [])
        for micro in batches(processor, config, ranks, rank, first)
    )
    loop.train(config, model, optimizer, step_batches, range(first, STEPS), RecordingCallbacks())
    saver.close()
    model.eval()
    with torch.no_grad():
        loss = float(model(**fixed_batch(processor, config).to(device)).loss)
    export(folder / "export", model, processor)
    if rank == 0:
        (folder / "sharded-loss.json").write_text(json.dumps(loss))
        (folder / f"losses-{ranks}.json").write_text(json.dumps(losses))
    leave()


def spawn(
    ranks: int, folder: Path, resume: bool = False, stop: bool = False, overrides: tuple[str, ...] = (),
    device: str = "cpu",
) -> dict:  # fmt: skip
    folder.mkdir(exist_ok=True)
    torch.multiprocessing.spawn(train, (ranks, folder, resume, stop, overrides, device), nprocs=ranks)
    written = folder / f"losses-{ranks}.json"
    return {int(k): v for k, v in json.loads(written.read_text()).items()} if written.exists() else {}


def processor_of_the_run():
    return build_processor(run_config(1).model)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return spawn(1, folder), folder


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return spawn(2, folder), folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForImageTextToText.from_pretrained(folder / "export").state_dict()


def test_two_ranks_equal_one_process(one_process, two_ranks):
    one, two = one_process[0], two_ranks[0]
    assert sorted(one) == list(range(1, STEPS + 1))
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-5, abs=1e-5)
    ours, theirs = weights(one_process[1]), weights(two_ranks[1])
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, atol=1e-5, rtol=1e-4)


@pytest.fixture
def killed(two_ranks, tmp_path_factory, tmp_path):
    """Return a copy of the folder of two ranks that were killed after step 3."""
    folder = tmp_path_factory.getbasetemp() / "killed"
    if not folder.exists():
        assert spawn(2, folder, stop=True) == {}
    return Path(shutil.copytree(folder, tmp_path / "killed"))


def test_resume_after_a_kill_equals_an_uninterrupted_run(two_ranks, killed):
    resumed = spawn(2, killed, resume=True)
    assert sorted(resumed) == list(range(STOP_AFTER + 1, STEPS + 1))
    assert resumed == {step: two_ranks[0][step] for step in resumed}
    theirs = weights(two_ranks[1])
    assert all(torch.equal(value, theirs[name]) for name, value in weights(killed).items())


def test_one_rank_resumes_a_checkpoint_of_two(two_ranks, killed):
    resumed = spawn(1, killed, resume=True)
    assert sorted(resumed) == list(range(STOP_AFTER + 1, STEPS + 1))
    for step, values in resumed.items():
        assert values == pytest.approx(two_ranks[0][step], rel=1e-5, abs=1e-5)


def test_export_has_the_loss_of_the_sharded_model(two_ranks):
    _, folder = two_ranks
    exported = AutoModelForImageTextToText.from_pretrained(folder / "export")
    assert exported.get_input_embeddings().weight is exported.get_output_embeddings().weight
    loss = exported.eval()(**fixed_batch(processor_of_the_run(), run_config(1))).loss.item()
    assert loss == pytest.approx(json.loads((folder / "sharded-loss.json").read_text()), rel=1e-5)
    fresh = build_model(run_config(1).model, processor_of_the_run(), seed=0)
    assert not torch.equal(exported.get_input_embeddings().weight, fresh.get_input_embeddings().weight)
    frequencies = "language_model.model.rotary_emb.inv_freq"
    assert torch.equal(exported.get_buffer(frequencies), fresh.get_buffer(frequencies))


def test_frozen_components_stay_in_bf16_with_checkpointing(tmp_path):
    frozen = ("--train.learning_rate.vision=0", "--train.learning_rate.decoder=0", "--train.learning_rate.t2v=0")
    losses = spawn(2, tmp_path, overrides=(*frozen, "--train.precision=bf16", "--train.activation_checkpointing=true"))
    assert sorted(losses) == list(range(1, STEPS + 1))
    config = run_config(2)
    start = build_model(config.model, build_processor(config.model), seed=0)
    open_gates(start, 0.3)
    trained = weights(tmp_path)
    changed = {name for name, value in start.state_dict().items() if not torch.equal(value, trained[name])}
    assert changed
    assert all(name.startswith("projector.") or ".v2v." in name for name in changed)


def test_compiled_blocks_train_like_eager_ones(tmp_path, two_ranks):
    # On one rank: two would compile the same blocks side by side.
    compiled = spawn(1, tmp_path, overrides=("--train.compile=true", "--train.activation_checkpointing=true"))
    for step, values in two_ranks[0].items():
        assert compiled[step] == pytest.approx(values, rel=1e-4)


def test_recomputed_layers_train_like_kept_ones(tmp_path, two_ranks):
    by_part = "--train.activation_checkpointing={encoder: selective, decoder: selective}"
    recomputed = spawn(2, tmp_path, overrides=(by_part,))
    for step, values in two_ranks[0].items():
        assert recomputed[step] == pytest.approx(values, rel=1e-6)


def test_two_ranks_from_features_equal_one_process(tmp_path):
    """A rank whose micro-batch is text only takes the same path through the model as one with features."""
    features = ("--data.features=somewhere", "--train.learning_rate.vision=0")
    one, two = (spawn(ranks, tmp_path / str(ranks), overrides=features) for ranks in (1, 2))
    assert sorted(one) == list(range(1, STEPS + 1))
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-5, abs=1e-5)


def validate(rank: int, ranks: int, folder: Path) -> None:
    """Validate two samples on one rank or on two: one with a video and one question, one of text only with three."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/validate-{ranks}", rank=rank, world_size=ranks)
    model, processor = sharded(run_config(ranks), gates=0.5)
    talks = [conversation("What is it?", "red circle"), conversation("And?", "it", video=False) * 3]
    samples = [
        Sample(0, "m", 1, "first", talks[0], [random_frames(3)], "first", 1.0, None),
        Sample(1, "m", 2, "words", talks[1], [], "words", 1.0, None),
    ]
    require_room = functools.partial(processor.require_room, new_tokens=6)
    batches = [collate_for_validation([sample], processor, require_room) for sample in samples]
    metrics = loop.validate(model, processor, batches[rank::ranks] if ranks > 1 else batches, 6)
    if rank == 0:
        (folder / f"metrics-{ranks}.json").write_text(json.dumps(metrics))
    leave()


def test_validation_on_two_ranks_equals_one_process(tmp_path):
    for ranks in (1, 2):
        torch.multiprocessing.spawn(validate, (ranks, tmp_path), nprocs=ranks)
    one, two = (json.loads((tmp_path / f"metrics-{ranks}.json").read_text()) for ranks in (1, 2))
    assert two == pytest.approx(one, rel=1e-5)
    assert (one["validation/count/first"], one["validation/count/words"], one["validation/count"]) == (1, 3, 4)
