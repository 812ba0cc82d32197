"""AdamW with a learning rate per component, and its schedule."""

import math

import torch
from torch import nn

from crosslmm.config import TrainConfig
from crosslmm.model.param_groups import component_of


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW with up to two parameter groups per component: matrices, which decay, and vectors, which do not.

    Args:
        model: parameters that need no gradient are left out.
        config: peak learning rates and weight decay.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((component_of(name), parameter.ndim >= 2), []).append(parameter)
    rates = config.learning_rate.model_dump()
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": rates[component],
                "weight_decay": config.weight_decay if is_matrix else 0.0,
                "component": component,
            }
            for (component, is_matrix), parameters in groups.items()
        ],
        betas=(0.9, 0.98),
        fused=True,
    )


def learning_rate_factor(step: int, total_steps: int, config: TrainConfig) -> float:
    """Return the share of the peak learning rate at step `step` (from 0): linear warm-up, then cosine to a floor."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    floor = config.final_learning_rate_share
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def warmup_warning(total_steps: int, config: TrainConfig) -> str | None:
    """Return a warning for a run that ends within the warm-up of its learning rates; None for others."""
    if config.warmup_steps < total_steps:
        return None
    return (
        f"train.warmup_steps is {config.warmup_steps}, and the run has {total_steps} steps: it ends within the "
        "warm-up of its learning rates; lower it, or take more steps with a lower train.global_batch_size"
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, total_steps: int, config: TrainConfig) -> None:
    """Set every group's learning rate for step `step`: a function of the step, so a resume needs no schedule state."""
    factor = learning_rate_factor(step, total_steps, config)
    rates = config.learning_rate.model_dump()
    for group in optimizer.param_groups:
        group["lr"] = rates[group["component"]] * factor
