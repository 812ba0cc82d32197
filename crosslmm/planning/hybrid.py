"""Recommend hybrid sharding: does a node hold a copy of the model, and what does that keep off the network?"""

from dataclasses import dataclass

from torch.nn import Parameter

from crosslmm.config import RunConfig
from crosslmm.model.cross_attention import GatedCrossAttention, leave_out_closed_branches
from crosslmm.model.modeling import CrossLMMForConditionalGeneration
from crosslmm.model.param_groups import fsdp_units
from crosslmm.planning import cost, peak_memory
from crosslmm.planning.assumptions import Assumptions
from crosslmm.planning.meta_trace import Trace


@dataclass(frozen=True)
class Hybrid:
    """What changes if each node holds a copy of the model."""

    nodes: int
    gpus_per_node: int
    peak_memory_bytes: int
    """Peak memory of one GPU."""
    micro_batches: int
    """Micro-batches of one GPU in a step."""
    received_bytes: int
    """What a node receives from others in a step, at least, with one copy of the model over all workers: weights, which
    FSDP gathers for each micro-batch, and gradients."""
    received_bytes_hybrid: int
    """The same with a copy in each node: gradients, once a step."""


def recommend(config: RunConfig, assumptions: Assumptions, traced: Trace, available: float) -> Hybrid | None:
    """Return what hybrid sharding would change; None if it is set already, would change nothing, or a copy does not fit
    a node.

    Args:
        config: the run, with micro-batches counted in samples.
        assumptions: may say how many GPUs a node has.
        traced: the `training_trace` of the run.
        available: memory of a GPU [bytes].
    """
    workers, node = config.scaling.most_workers, _gpus_per_node(config, assumptions)
    if config.scaling.workers_per_replica or node is None or workers % node or workers <= node:
        return None
    scaling = config.scaling.model_copy(update={"workers_per_replica": node})
    memory = peak_memory.training_memory(config.model_copy(update={"scaling": scaling}), traced).total
    if memory > available:
        return None
    nodes, learning = workers // node, peak_memory.FLOAT32 * cost.learning(config)
    weights = peak_memory.compute_bytes(config) * count_gathered(config)
    # A node has 1 / nodes of everything itself. Gradients are summed (reduce-scatter) or summed and sent back.
    sizes = config.accumulation * (weights + learning), 2 * learning
    return Hybrid(nodes, node, memory, config.accumulation, *(size * (nodes - 1) // nodes for size in sizes))


def _gpus_per_node(config: RunConfig, assumptions: Assumptions) -> int | None:
    """Return the number of GPUs of the smallest node that may train; None if nothing says it."""
    wanted = config.scaling.train_on.items()
    counts = [int(kind.resources.get("GPU", 0)) for kind in config.scaling.node_types if wanted <= kind.labels.items()]
    return assumptions.gpus_per_node or min(filter(None, counts), default=None)


def count_gathered(config: RunConfig) -> int:
    """Return the number of parameters that FSDP gathers for a micro-batch.

    In the forward pass, these are all that are used; in the backward pass, those of FSDP units again (the root stays
    gathered), except those of a frozen encoder, which has no backward pass.
    """
    model = cost.training_model(config)
    encoder = set(model.vision_tower.encoder.layers.parameters())
    forward = set(model.parameters()) - _unused(model, config) - (encoder if config.data.features else set())
    backward = forward & {parameter for unit in fsdp_units(model) for parameter in unit.parameters()}
    if not any(parameter.requires_grad for parameter in encoder):
        backward -= encoder
    return sum(parameter.numel() for parameter in [*forward, *backward])


def _unused(model: CrossLMMForConditionalGeneration, config: RunConfig) -> set[Parameter]:
    """Return the parameters of cross-attentions that are left out in training."""
    if config.model.init_from is None:
        leave_out_closed_branches(model)
    branches = [module for module in model.modules() if isinstance(module, GatedCrossAttention) and module.left_out]
    return {parameter for branch in branches for parameter in branch.parameters()}
