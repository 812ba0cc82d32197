"""Encoder work balanced between ranks: frames are dealt evenly, not with their samples.

The vision encoder is most of a step's cost, and FSDP makes all ranks wait for the one with the most frames. So ranks
with more frames than the mean send the pixels of the surplus to ranks with fewer, and get the features back; a frame
attends to no other, so that it does not matter where it is encoded. Everything after the encoder stays with its sample.

A pass is one micro-batch of each rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Transfer(NamedTuple):
    """Frames that one rank encodes for another."""

    source: int
    """Rank that has them."""
    target: int
    """Rank that encodes them."""
    frames: int
    """How many, at least 1."""


def even_loads(frames: Sequence[int]) -> list[int]:
    """Return how many frames each rank encodes if they are dealt evenly.

    Args:
        frames: of each rank, in one pass.

    Returns:
        Numbers with the same sum, at most one apart. The larger ones go to the ranks with the most frames, so that as
        few frames as possible move.
    """
    share, left = divmod(sum(frames), len(frames))
    by_frames = sorted(range(len(frames)), key=lambda rank: -frames[rank])
    more = set(by_frames[:left])
    return [share + (rank in more) for rank in range(len(frames))]


def plan_transfers(frames: Sequence[int]) -> list[Transfer]:
    """Return what has to move so that every rank encodes its even load; fewer transfers than ranks.

    All ranks compute the same plan from the same numbers.

    Args:
        frames: of each rank, in one pass.
    """
    surplus = [have - load for have, load in zip(frames, even_loads(frames), strict=True)]
    targets = [rank for rank, of_rank in enumerate(surplus) if of_rank < 0]
    transfers = []
    for source, of_rank in enumerate(surplus):
        while of_rank > 0:
            moved = min(of_rank, -surplus[targets[0]])
            transfers.append(Transfer(source, targets[0], moved))
            of_rank -= moved
            surplus[targets[0]] += moved
            if not surplus[targets[0]]:
                targets.pop(0)
    return transfers


@dataclass(frozen=True)
class FrameExchange:
    """One rank's part in the exchange of one pass: what `forward` takes as `frame_exchange`.

    The numbers are Python integers, so the host never waits for the device.

    The collectives run in the default process group, which is also FSDP's: a communicator runs its collectives in the
    order in which the host issues them. That order is the same on all ranks, because it follows from what depends on
    what: the backward exchange comes after the decoder's backward pass with its reductions, and before the encoder's.
    With a communicator of its own, an exchange could occupy one GPU while FSDP's all-gather occupies another, each
    waiting for its peer. Hybrid sharding gives that guarantee up: shards and replicas have communicators of their own,
    and a GPU needs room for the kernels of all three at once, as with FSDP beside expert parallelism.
    """

    kept: int
    """Own frames that this rank encodes: its first ones."""
    sent: list[int]
    """Further own frames that go to each rank, in order."""
    received: list[int]
    """Frames that come from each rank."""

    @classmethod
    def of_pass(cls, frames: Sequence[int], rank: int) -> "FrameExchange | None":
        """Return a rank's part; None if no rank has anything to move, so that no collective runs.

        Args:
            frames: of each rank, in this pass.
            rank: this rank's.
        """
        transfers = plan_transfers(frames)
        if not transfers:
            return None
        sent, received = [0] * len(frames), [0] * len(frames)
        for source, target, moved in transfers:
            if source == rank:
                sent[target] = moved
            elif target == rank:
                received[source] = moved
        return cls(frames[rank] - sum(sent), sent, received)

    def __call__(self, encode: Callable[[Tensor], Tensor], pixels_FCHW: Tensor) -> Tensor:
        """Return the features of this rank's frames, in order; all ranks call it, and all or none differentiate it.

        Args:
            encode: uint8 (frames, 3, H, W) -> (frames, P, D), of any number of frames.
            pixels_FCHW: uint8 (F, 3, H, W), this rank's frames.

        Returns:
            (F, P, D), differentiable if `encode` is: gradients go back the way that the pixels went.
        """
        dealt_FCHW = _move(pixels_FCHW, self.kept, self.sent, self.received)
        return _Return.apply(encode(dealt_FCHW), self)


class _Return(torch.autograd.Function):
    """Sends the features of other ranks' frames home; backward, their gradients follow the pixels."""

    @staticmethod
    def forward(ctx: Any, encoded_FPD: Tensor, exchange: FrameExchange) -> Tensor:
        ctx.exchange = exchange
        return _move(encoded_FPD, exchange.kept, exchange.received, exchange.sent)

    @staticmethod
    def backward(ctx: Any, grad_FPD: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        return _move(grad_FPD, exchange.kept, exchange.sent, exchange.received), None


def _move(x: Tensor, kept: int, sent: list[int], received: list[int]) -> Tensor:
    """Return the first `kept` rows and, behind them, what came from each rank; the other rows go to the ranks in turn.

    Args:
        x: (kept + sum(sent), ...) in any dtype.
        kept: rows that stay.
        sent, received: rows to and from each rank.
    """
    out = x.new_empty(kept + sum(received), *x.shape[1:])
    out[:kept] = x[:kept]
    dist.all_to_all_single(out[kept:], x[kept:].contiguous(), received, sent)
    return out
