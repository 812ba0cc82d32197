"""Export a model, or adapters, as a folder for `from_pretrained`: at the end of a run, or from a sealed checkpoint."""

import tempfile
from pathlib import Path

import torch.distributed as dist
import yaml
from torch.distributed.tensor import DTensor

from crosslmm import storage
from crosslmm.config import BadConfig, LoraConfig, RunConfig, validate_run
from crosslmm.inference.publish import CARD_FILE, model_card
from crosslmm.model import CrossLMMForConditionalGeneration, CrossLMMProcessor
from crosslmm.model.adapters import lora
from crosslmm.model.adapters.base import Base, open_base
from crosslmm.model.loading import build_model, build_processor
from crosslmm.run_folder import CONFIG_FILE, MODEL_CONFIG_FILE, has_run, read_run
from crosslmm.train.checkpoint import shards
from crosslmm.train.checkpoint.read import read_base
from crosslmm.train.checkpoint.seals import Checkpoint
from crosslmm.train.checkpoint.state import State, load_weights, weights_of


def export(
    folder: Path,
    model: CrossLMMForConditionalGeneration,
    processor: CrossLMMProcessor,
    adapters: LoraConfig | None = None,
    base: Base | None = None,
) -> None:
    """Gather all shards and write one folder on rank 0: for `from_pretrained`, or of adapters if there is a base. All
    ranks call it.

    Args:
        folder: local folder.
        model, processor: what is written.
        adapters, base: of a model with adapters, their settings and, on rank 0, the model that they belong to.
    """
    weights = {}
    for name, tensor in weights_of(model).items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if dist.get_rank() == 0:
            weights[name] = whole.detach().cpu()
    if dist.get_rank() == 0:
        if adapters and base:
            lora.save(folder, weights, adapters, base)
        else:
            model.save_pretrained(folder, state_dict=weights)
        processor.save_pretrained(folder)


def export_sealed(checkpoint: Checkpoint, folder: str, merged: bool = False) -> list[str]:
    """Verify a checkpoint's weights and export them, in one CPU process, however many ranks wrote it.

    Args:
        checkpoint: from `seals`.
        folder: path or URI of an empty folder, which gets what `export` writes.
        merged: of a run that trains adapters, export the whole model instead.

    Returns:
        What is damaged; empty if the model was exported.

    Raises:
        BadConfig: the configuration is not one that this version builds, or the weights belong to another model; or
            there are no adapters to merge.
    """
    try:
        data = shards.read_verified(checkpoint, CONFIG_FILE)
        recorded = read_base(checkpoint)
        state = shards.read(checkpoint, 0, 1, lambda name: name.startswith("model/"))
    except shards.Damaged as error:
        return [str(error)]
    if merged and recorded is None:
        raise BadConfig(f"--merge: {checkpoint.uri} has the whole model and no adapters; leave --merge out")
    config = validate_run(yaml.safe_load(data))
    # The machine that trained may have had flash attention; this one need not have it.
    config = config.model_copy(update={"model": config.model.model_copy(update={"attention": "sdpa"})})
    processor, run = build_processor(config.model, config.data), storage.parent(checkpoint.uri)
    with tempfile.TemporaryDirectory() as exported:
        if recorded is None or merged:
            if recorded is None:
                model = build_model(config.model, processor, config.seed, weights=False)
                load_weights(state, model)
            else:
                model = _merged(state, config, run, processor, recorded)
            model.save_pretrained(exported)
            write_card(Path(exported), model, config, run, checkpoint.step, checkpoint.metrics)
        else:
            weights = {name.removeprefix("model/"): tensor for name, tensor in state.items()}
            lora.save(Path(exported), weights, config.train.lora, recorded.located(run))
        processor.save_pretrained(exported)
        (Path(exported) / MODEL_CONFIG_FILE).write_bytes(data)
        storage.upload(exported, folder)
    return []


def write_card(
    folder: Path,
    model: CrossLMMForConditionalGeneration,
    config: RunConfig,
    run: str,
    step: int,
    metrics: dict[str, float],
) -> None:
    """Write the model card of an exported model.

    Args:
        folder: local folder.
        model: the exported model.
        config: of the run.
        run: the run's folder.
        step: training steps.
        metrics: of the last validation.
    """
    datasets = read_run(run).get("datasets", []) if has_run(run) else []
    parameters = sum(parameter.numel() for parameter in model.parameters())
    (folder / CARD_FILE).write_text(model_card(config, model.config, parameters, datasets, step, metrics))


def _merged(
    state: State, config: RunConfig, run: str, processor: CrossLMMProcessor, recorded: Base
) -> CrossLMMForConditionalGeneration:
    """Return a run's model with the adapters merged into it."""
    with open_base(config, run, processor, recorded) as (_, model_config):
        model = build_model(model_config, processor, config.seed)
    lora.prepare_training(model, config.train)
    load_weights(state, model)
    lora.merge(model)
    return model
