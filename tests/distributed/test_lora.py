"""Adapters over FSDP: two ranks equal one process, a killed run resumes exactly, and PEFT loads what is exported."""

import json
import os
import shutil
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel

from crosslmm.cli import parse_run
from crosslmm.model import CrossLMMForConditionalGeneration
from crosslmm.model.loading import build_model, build_processor
from crosslmm.planning.assumptions import Assumptions
from crosslmm.planning.plan import plan
from crosslmm.run_folder import BASE_FILE, BASE_FOLDER
from crosslmm.train import loop, worker
from crosslmm.train.checkpoint import seals, shards
from crosslmm.train.checkpoint.export import export, export_sealed
from crosslmm.train.checkpoint.read import read_base, read_newest
from crosslmm.train.checkpoint.save import Saver
from crosslmm.train.checkpoint.state import load_state
from crosslmm.train.optim import build_optimizer
from tests.distributed.test_fsdp import BATCH, STEPS, STOP_AFTER, batches, fixed_batch, forbid_pickles, leave
from tests.support.common import open_gates

ADAPTERS = ("--train.lora.rank=4", "--train.lora.targets=[decoder,v2v,vision]", "--train.lora.alpha=8")
"""The projector and T2V train whole."""
DROPOUT = (*ADAPTERS[:1], "--train.lora.targets=[decoder,vision]", "--train.lora.dropout=0.2")


def run_config(ranks: int, *overrides: str):
    sizes = [f"--scaling.num_workers={ranks}", f"--train.global_batch_size={BATCH}", "--train.micro_batch_size=2"]
    return parse_run([*sizes, "--train.warmup_steps=2", *overrides], "")


def train(rank: int, ranks: int, folder: Path, resume: bool, stop: bool, overrides: tuple[str, ...]) -> None:
    """Train as a worker does, without Ray."""
    torch.set_num_threads(1)
    warnings.filterwarnings("error", category=UserWarning, module=r"torch\.distributed\.fsdp.*")
    forbid_pickles()
    method = f"file://{folder}/rendezvous-{ranks}-{resume}-{stop}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=ranks)
    config, losses, first = run_config(ranks, *overrides), {}, 0
    processor, group = build_processor(config.model, config.data), dist.new_group(backend="gloo")
    newest, state = read_newest(str(folder), group) or (None, {})
    job = types.SimpleNamespace(config=config, folder=str(folder), recipe=None)
    model, base = worker._build_sharded(job, processor, newest, torch.device("cpu"), ranks)
    optimizer = build_optimizer(model, config.train)
    if newest:
        load_state(state, model, optimizer)
        first = newest.step
    saver = Saver(str(folder), config, f"{ranks}{resume:d}", group, base)

    class RecordingCallbacks(loop.Callbacks):
        def log(self, step, metrics):
            losses[step] = metrics["loss"], metrics["grad_norm"]

        def save(self, step):
            saver.save(step, model, optimizer, {}, [])
            if stop and step == STOP_AFTER:
                saver.wait()
                dist.barrier()
                os._exit(0)  # like a spot node that is reclaimed

    config = config.model_copy(update={"train": config.train.model_copy(update={"checkpoint_every": STOP_AFTER})})
    steps = (loop.StepBatch(micro, []) for micro in batches(processor, config, ranks, rank, first))
    loop.train(config, model, optimizer, steps, range(first, STEPS), RecordingCallbacks())
    saver.close()
    model.eval()
    with torch.no_grad():
        logits = model(**without_labels(fixed_batch(processor, config))).logits
    exported = folder / "export"
    exported.mkdir(exist_ok=True)
    export(exported, model, processor, config.train.lora, base and base.located(str(folder)))
    if rank == 0:
        torch.save(logits, folder / "logits.pt")
        learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        (folder / "run.json").write_text(json.dumps({"losses": losses, "learning": learning}))
    leave()


def without_labels(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def spawn(ranks: int, folder: Path, *overrides: str, resume: bool = False, stop: bool = False) -> dict:
    folder.mkdir(exist_ok=True)
    torch.multiprocessing.spawn(train, (ranks, folder, resume, stop, overrides), nprocs=ranks)
    written = folder / "run.json"
    return json.loads(written.read_text()) if written.exists() else {}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Return a stage's exported model, whose gates are open."""
    folder = tmp_path_factory.mktemp("stage")
    config = run_config(1).model
    model = build_model(config, build_processor(config), seed=5)
    open_gates(model, 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def one_process(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return spawn(1, folder, *ADAPTERS, f"--model.init_from={base}"), folder


@pytest.fixture(scope="module")
def two_ranks(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return spawn(2, folder, *ADAPTERS, f"--model.init_from={base}"), folder


def logits_of(model, folder: Path) -> torch.Tensor:
    config = run_config(1)
    with torch.no_grad():
        return model.eval()(**without_labels(fixed_batch(build_processor(config.model), config))).logits


def load_with_peft(base: Path, adapter: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT with Transformers 5.23
        return PeftModel.from_pretrained(CrossLMMForConditionalGeneration.from_pretrained(base), adapter)


def test_two_ranks_equal_one_process(one_process, two_ranks):
    one, two = one_process[0]["losses"], two_ranks[0]["losses"]
    assert sorted(one) == [str(step) for step in range(1, STEPS + 1)]
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-5, abs=1e-5)
    logits = [torch.load(folder / "logits.pt") for _, folder in (one_process, two_ranks)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_the_planner_counts_what_learns(two_ranks):
    config = run_config(2, *ADAPTERS)
    planned = plan(config, [4], Assumptions()).parameters
    assert planned.trainable["as configured"] == two_ranks[0]["learning"] < planned.total / 4


def test_peft_loads_the_export_with_the_same_logits(base, two_ranks):
    _, folder = two_ranks
    expected = torch.load(folder / "logits.pt")
    model = load_with_peft(base, folder / "export")
    torch.testing.assert_close(logits_of(model, folder), expected, atol=1e-5, rtol=1e-5)
    untrained = logits_of(CrossLMMForConditionalGeneration.from_pretrained(base), folder)
    assert (untrained - expected).abs().max() > 0.1


def test_a_merged_export_computes_the_same(two_ranks, tmp_path):
    _, folder = two_ranks
    (newest, _) = seals.list_sealed(str(folder))
    assert export_sealed(newest, str(tmp_path / "whole"), merged=True) == []
    model = CrossLMMForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert not any("lora" in name for name in model.state_dict())
    expected = torch.load(folder / "logits.pt")
    torch.testing.assert_close(logits_of(model, folder), expected, atol=1e-5, rtol=1e-5)


def test_an_export_of_a_checkpoint_equals_the_run_s_own(two_ranks, tmp_path):
    _, folder = two_ranks
    (newest, _) = seals.list_sealed(str(folder))
    assert export_sealed(newest, str(tmp_path / "adapter")) == []
    ours = {path.name: path.read_bytes() for path in (folder / "export").iterdir()}
    theirs = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in ours
    assert {name: theirs[name] for name in ours} == ours


def test_a_checkpoint_holds_what_learns_and_names_the_base(base, two_ranks):
    newest, _ = seals.list_sealed(str(two_ranks[1]))
    assert not (two_ranks[1] / BASE_FOLDER).exists()
    assert BASE_FILE in newest.files
    assert read_base(newest).uri == str(base)
    weights = {name.removeprefix("model/") for name in shards.read_index(newest) if name.startswith("model/")}
    assert weights
    for name in weights:
        assert ".lora_" in name or name.startswith("projector.") or ".t2v." in name
    assert newest.size < 0.8 * (base / "model.safetensors").stat().st_size


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return spawn(2, folder, *DROPOUT), folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    assert spawn(2, folder, *DROPOUT, stop=True) == {}
    return folder


def assert_resumes_exactly(uninterrupted, folder: Path) -> None:
    resumed = spawn(2, folder, *DROPOUT, resume=True)["losses"]
    assert sorted(resumed) == [str(step) for step in range(STOP_AFTER + 1, STEPS + 1)]
    losses, theirs = uninterrupted[0]["losses"], uninterrupted[1]
    assert resumed == {step: losses[step] for step in resumed}
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        ours = (folder / "export" / name).read_text("latin1").replace(str(folder), str(theirs))
        assert ours == (theirs / "export" / name).read_text("latin1")


def test_a_killed_run_with_dropout_resumes_exactly(uninterrupted, killed, tmp_path):
    folder = Path(shutil.copytree(killed, tmp_path / "run"))
    assert (folder / BASE_FOLDER / "model.safetensors").exists()
    assert_resumes_exactly(uninterrupted, folder)


def test_recomputed_layers_drop_the_same(uninterrupted, tmp_path):
    losses = spawn(2, tmp_path, *DROPOUT, "--train.activation_checkpointing=true")["losses"]
    for step, values in uninterrupted[0]["losses"].items():
        assert losses[step] == pytest.approx(values, rel=1e-5, abs=1e-5)


def test_a_lost_base_of_the_run_is_written_again(uninterrupted, killed, tmp_path):
    folder = Path(shutil.copytree(killed, tmp_path / "run"))
    shutil.rmtree(folder / BASE_FOLDER)
    assert_resumes_exactly(uninterrupted, folder)
    assert (folder / BASE_FOLDER / "model.safetensors").exists()
