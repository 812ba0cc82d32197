"""Adapters (LoRA): injected by PEFT, and stored as PEFT stores them.

    adapter_config.json          rank, alpha, the layers with an adapter, the modules that are stored whole
    adapter_model.safetensors    lora_A and lora_B of each of these layers, and the weights of these modules
    base.json                    the model that the adapter belongs to (`base`)

PEFT alone reads the first two as well. We read and write them ourselves, because training has the weights in shards,
and because an adapter may come from a stranger: PEFT's own loader also takes pickles, regular expressions that take
exponential time, and settings that make it open other files.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from crosslmm import storage
from crosslmm.config import BadConfig, LoraConfig, TrainConfig
from crosslmm.model.adapters.base import Base
from crosslmm.model.modeling import CrossLMMForConditionalGeneration
from crosslmm.model.param_groups import component_of, freeze, is_of_adapter
from crosslmm.run_folder import ADAPTER_CONFIG_FILE, ADAPTER_FILE, BASE_FILE

PREFIX = "base_model.model."
"""What PEFT's names of weights begin with."""
PLAIN_LORA = {"peft_type", "r", "lora_alpha", "target_modules", "modules_to_save", "use_rslora"}
"""Keys of adapter_config.json that we follow."""
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "init_lora_weights", "lora_dropout",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "task_type",
}  # fmt: skip
"""Keys that do not change what a trained adapter computes."""
MAX_MODULES = 10_000
"""Largest number of names in a list of adapter_config.json."""


def prepare_training(model: CrossLMMForConditionalGeneration, train: TrainConfig) -> None:
    """Inject the adapters that a run trains, if any, and freeze what does not learn.

    Args:
        model: on the CPU, where the adapters get their initial weights from torch's generator (B is zero, so the model
            computes what it did), or on the meta device.
        train: learning rates and adapters.
    """
    if train.adapted:
        layers = [name for name in _linear_layers(model) if ".layers." in name and component_of(name) in train.adapted]
        _inject(model, layers, train.lora.rank, train.lora.alpha, train.lora.dropout)
    freeze(model, train.learning_rate, train.adapted)


def require_open_gates(model: CrossLMMForConditionalGeneration, train: TrainConfig) -> None:
    """Raise BadConfig if an adapter belongs to a cross-attention that was never trained: behind a gate at zero, which
    no adapter opens, nothing has a gradient."""
    for branch in sorted({"v2v", "t2v"} & train.adapted):
        gates = [gate for name, gate in model.named_parameters() if name.endswith(f".{branch}.gate")]
        if not any(gate.any() for gate in gates):
            raise BadConfig(
                f"train.lora.targets: {branch} was never trained, its gates are zero; leave it out to train all of it"
            )


def is_adapted(model: nn.Module) -> bool:
    """Return whether the model has adapters."""
    return any(is_of_adapter(name) for name, _ in model.named_parameters())


def save(folder: Path, weights: Mapping[str, torch.Tensor], config: LoraConfig, base: Base) -> None:
    """Write the files of an adapter.

    Args:
        folder: local folder.
        weights: all weights that learn, whole, by their names in the model of `prepare_training`.
        config: the adapters.
        base: the model that they belong to, with its absolute address.
    """
    from peft import LoraConfig as PeftConfig

    adapted = sorted({name.partition(".lora_")[0] for name in weights if is_of_adapter(name)})
    whole = sorted({component_of(name) for name in weights if not is_of_adapter(name)})
    fields = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        modules_to_save=whole or None,
        base_model_name_or_path=base.uri,
        inference_mode=True,
    ).to_dict()
    # As a list: PEFT keeps a set, whose order differs from process to process.
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(fields | {"target_modules": adapted}, indent=2))
    tensors = {_name_in_file(name): weight.contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    (folder / BASE_FILE).write_bytes(base.to_json())


def load(model: CrossLMMForConditionalGeneration, folder: Path) -> None:
    """Inject an adapter, with its weights, into the model that it belongs to.

    Args:
        model: its base.
        folder: local folder with adapter_config.json and adapter_model.safetensors.

    Raises:
        ValueError: a file cannot be read, or the adapter is none of plain LoRA, or does not fit the model.
    """
    config = _read_config(folder / ADAPTER_CONFIG_FILE)
    try:
        weights = load_file(folder / ADAPTER_FILE)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{ADAPTER_FILE} cannot be read: {error}") from None
    saved_whole = config["modules_to_save"] or []
    whole = tuple(f"{name}." for name, _ in model.named_modules() if _matches(name, saved_whole))
    layers = [
        name
        for name in _linear_layers(model)
        if _matches(name, config["target_modules"]) and not name.startswith(whole)
    ]
    if not layers:
        raise ValueError(f"{ADAPTER_CONFIG_FILE}: the model has none of the layers in target_modules")
    # Without memory for weights: the rank is not trusted, and must not allocate memory, until the shapes in the file
    # have been checked.
    _inject(model, layers, config["r"], config["lora_alpha"], rslora=config["use_rslora"], on_meta=True)
    expected = {
        _name_in_file(name): (name, parameter)
        for name, parameter in model.named_parameters()
        if is_of_adapter(name) or name.startswith(whole)
    }
    if odd := sorted(expected.keys() ^ weights.keys()):
        raise ValueError(f"{ADAPTER_FILE}: its weights are not those of the model's layers: {ascii(odd[0])[1:-1]}")
    like = next(model.language_model.parameters())
    for stored, (name, parameter) in expected.items():
        if parameter.shape != weights[stored].shape:
            shapes = f"{tuple(weights[stored].shape)}, and the model has {tuple(parameter.shape)}"
            raise ValueError(f"{ADAPTER_FILE}: {stored} is {shapes}")
        owner, _, key = name.rpartition(".")
        value = weights[stored].to(dtype=like.dtype, device=like.device)
        setattr(model.get_submodule(owner), key, nn.Parameter(value, requires_grad=False))


def merge(model: CrossLMMForConditionalGeneration) -> None:
    """Add the adapters to the weights of their layers, and remove them; the model computes the same."""
    from peft.tuners.lora import LoraLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge(safe_merge=True)
            model.set_submodule(name, layer.get_base_layer())
    del model.peft_config


def _linear_layers(model: nn.Module) -> list[str]:
    return [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]


def _inject(
    model: CrossLMMForConditionalGeneration,
    layers: list[str],
    rank: int | None,
    alpha: float,
    dropout: float = 0.0,
    rslora: bool = False,
    on_meta: bool = False,
) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    config = PeftConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, use_rslora=rslora, target_modules=layers)
    device = next(model.parameters()).device
    with torch.device("meta" if on_meta else device):
        inject_adapter_in_model(config, model, low_cpu_mem_usage=on_meta)


def _name_in_file(name: str) -> str:
    """Return PEFT's name of a weight in a file, which lacks the adapter's name in the model."""
    return PREFIX + re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1.weight", name)


def _matches(name: str, wanted: Collection[str]) -> bool:
    """Return whether PEFT takes a list of names to mean this module: the last parts of a name suffice."""
    return any(name == one or name.endswith(f".{one}") for one in wanted)


def _read_config(file: Path) -> dict[str, Any]:
    """Read an adapter_config.json.

    Raises:
        ValueError: it cannot be read, or asks for more than plain LoRA.
    """
    from peft import LoraConfig as PeftConfig

    try:
        config = storage.read_json(str(file))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file.name} cannot be read: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{file.name}: it is not an adapter of the type LORA")
    defaults = PeftConfig().to_dict()
    config = {**defaults, **config}
    for key in sorted(config.keys() - PLAIN_LORA - WITHOUT_EFFECT):
        if config[key] not in (defaults.get(key), None, False, {}, []):
            raise ValueError(f"{file.name}: {ascii(key)[1:-1]} is not supported; only plain LoRA is")
    if not isinstance(config["init_lora_weights"], bool) and config["init_lora_weights"] != "gaussian":
        raise ValueError(f"{file.name}: init_lora_weights changed the base's weights; only plain LoRA is supported")
    rank, alpha, rslora = config["r"], config["lora_alpha"], config["use_rslora"]
    numbers = type(rank) is int and type(alpha) in (int, float) and isinstance(rslora, bool)
    if not numbers or not 0 < rank < 2**31 or not 0 <= alpha < 2**31:
        raise ValueError(f"{file.name}: r, lora_alpha or use_rslora is not what PEFT writes")
    for key in ("target_modules", "modules_to_save"):
        names = config[key]
        if names is None and key == "modules_to_save":
            continue
        if not isinstance(names, list) or len(names) > MAX_MODULES or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{file.name}: {key} is not a list of names")
    return config
