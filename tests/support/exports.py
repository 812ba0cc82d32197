"""Exported models and adapters, as runs leave them."""

from pathlib import Path

import torch

from crosslmm.config import RunConfig, to_yaml
from crosslmm.model import CrossLMMForConditionalGeneration, CrossLMMProcessor
from crosslmm.model.adapters import lora
from crosslmm.model.adapters.base import Base, weights_digest
from crosslmm.model.loading import build_model
from crosslmm.run_folder import MODEL_CONFIG_FILE
from tests.support.common import open_gates


def save_exported(
    folder: Path, model: CrossLMMForConditionalGeneration, processor: CrossLMMProcessor, config: RunConfig
) -> None:
    """Save a model as the folder that a run exports."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / MODEL_CONFIG_FILE).write_text(to_yaml(config))


def export_model(folder: Path, config: RunConfig, processor: CrossLMMProcessor, seed: int = 0) -> Path:
    """Write the `model` folder of a run that trained a whole model."""
    model = build_model(config.model, processor, seed)
    open_gates(model, 0.4)
    save_exported(folder, model, processor, config)
    return folder


def export_adapter(folder: Path, base: Path, config: RunConfig, processor: CrossLMMProcessor, seed: int) -> Path:
    """Write the `model` folder of a run that trained adapters in the decoder, and the projector, over `base`."""
    rates = dict.fromkeys(("vision", "v2v", "t2v"), 0)
    update = {
        "lora": config.train.lora.model_copy(update={"rank": 4}),
        "learning_rate": config.train.learning_rate.model_copy(update=rates),
    }
    config = config.model_copy(update={"train": config.train.model_copy(update=update)})
    model = CrossLMMForConditionalGeneration.from_pretrained(base)
    lora.prepare_training(model, config.train)
    torch.manual_seed(seed)
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = {name: parameter.detach() + 0.1 * torch.randn_like(parameter) for name, parameter in learning.items()}
    folder.mkdir(parents=True)
    lora.save(folder, weights, config.train.lora, Base(str(base), weights_digest(base)))
    processor.save_pretrained(folder)
    (folder / MODEL_CONFIG_FILE).write_text(to_yaml(config))
    return folder
