"""How parameters are grouped: by component (learning rates, freezing) and by FSDP unit (sharding, memory planning)."""

from collections.abc import Collection

from torch import nn

from crosslmm.config import LearningRates
from crosslmm.model.cross_attention import DualCrossAttentionLayer
from crosslmm.model.modeling import CrossLMMForConditionalGeneration

COMPONENTS = ("vision", "projector", "v2v", "t2v", "decoder")
"""The parts of the model that have a learning rate each (the rows of the paper's Table 3)."""


def component_of(name: str) -> str:
    """Return the component, one of `COMPONENTS`, that the parameter called `name` belongs to."""
    if name.startswith("vision_tower."):
        return "vision"
    if name.startswith("projector."):
        return "projector"
    for branch in ("v2v", "t2v"):
        if f".{branch}." in name:
            return branch
    return "decoder"


def is_of_adapter(name: str) -> bool:
    """Return whether the parameter called `name` belongs to an adapter (LoRA)."""
    return ".lora_A." in name or ".lora_B." in name


def freeze(model: nn.Module, rates: LearningRates, adapted: Collection[str] = ()) -> None:
    """Set `requires_grad` of every parameter.

    Args:
        model: whose parameters learn or not.
        rates: a component whose learning rate is zero is frozen.
        adapted: components of which only the adapters learn.
    """
    for name, parameter in model.named_parameters():
        component = component_of(name)
        frozen = component in adapted and not is_of_adapter(name)
        parameter.requires_grad_(getattr(rates, component) > 0 and not frozen)


def fsdp_units(model: CrossLMMForConditionalGeneration) -> list[nn.Module]:
    """Return the modules whose parameters FSDP gathers together, inner modules before those that contain them.

    They are the encoder layers, the cross-attentions and the decoder layers. A parameter belongs to the first unit
    that contains it; parameters of no unit (embeddings, projector, norms) belong to the root module.
    """
    units: list[nn.Module] = list(model.vision_tower.encoder.layers)
    for layer in model.language_model.model.layers:
        if isinstance(layer, DualCrossAttentionLayer):
            units += [branch for branch in (layer.v2v, layer.t2v) if branch is not None]
        units.append(layer)
    return units
