"""Which parameter belongs to which component, and which components learn."""

from torch import nn

from crosslmm.config import LearningRates

COMPONENTS = ("vision", "projector", "v2v", "t2v", "decoder")


def component_of(name: str) -> str:
    """Parameter name -> one of `COMPONENTS`, the rows of the paper's Table 3."""
    if name.startswith("vision_tower."):
        return "vision"
    if name.startswith("projector."):
        return "projector"
    for branch in ("v2v", "t2v"):
        if f".{branch}." in name:
            return branch
    return "decoder"


def freeze(model: nn.Module, rates: LearningRates) -> None:
    """Take the gradient from every component whose learning rate is zero."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(getattr(rates, component_of(name)) > 0)
