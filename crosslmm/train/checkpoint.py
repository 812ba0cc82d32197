"""Sharded checkpoints, and the export to one ordinary model folder."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from crosslmm.config import RunConfig, to_yaml
from crosslmm.model import CrossLMMForConditionalGeneration, CrossLMMProcessor

PROGRESS = "progress.json"


def save(
    folder: Path,
    model: CrossLMMForConditionalGeneration,
    optimizer: torch.optim.Optimizer,
    step: int,
    config: RunConfig,
) -> None:
    """Write this rank's shards into `folder`; all ranks call it. Rank 0 adds the step and the full configuration.

    Each rank may give a folder of its own: together they are the checkpoint.
    """
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state_dict_saver.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    if dist.get_rank() == 0:
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / PROGRESS).write_text(json.dumps({"step": step}))


def load(folder: Path, model: CrossLMMForConditionalGeneration, optimizer: torch.optim.Optimizer) -> int:
    """Read a checkpoint of any number of ranks into the model and optimizer -> the step that it was taken after."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    state_dict_loader.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(json.loads((folder / PROGRESS).read_text())["step"])


def export(folder: Path, model: CrossLMMForConditionalGeneration, processor: CrossLMMProcessor) -> None:
    """Gather all shards and write one `from_pretrained` folder on rank 0; all ranks call it."""
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=whole)
        processor.save_pretrained(folder)
