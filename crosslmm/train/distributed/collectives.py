"""Collectives for small plain data. torch.distributed's object collectives exchange pickles, with which whoever gets
into a process group could run code on every rank."""

import json
from typing import Any

import torch
import torch.distributed as dist


def gather_json(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the value of every rank, by rank; all ranks of the group call it.

    Args:
        value: what JSON can represent; tuples arrive as lists.
        group: by default, all ranks.
    """
    world_size = dist.get_world_size(group)
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = torch.empty(world_size, dtype=torch.int64, device=device)
    dist.all_gather_single(sizes, torch.tensor([len(data)], device=device), group=group)
    padded = torch.zeros(int(sizes.max()), dtype=torch.uint8, device=device)
    padded[: len(data)] = data
    texts = torch.empty(world_size, len(padded), dtype=torch.uint8, device=device)
    dist.all_gather_single(texts, padded[None], group=group)
    rows = zip(texts.cpu(), sizes.tolist(), strict=True)
    return [json.loads(row[:size].numpy().tobytes()) for row, size in rows]


def broadcast_json(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Return rank 0's value on every rank; all ranks call it, and the values of the others are ignored."""
    return gather_json(value if dist.get_rank(group) == 0 else None, group)[0]
