"""Read the newest intact checkpoint, each rank its own part."""

import logging
from dataclasses import asdict

import torch.distributed as dist

from crosslmm.model.adapters.base import Base
from crosslmm.run_folder import BASE_FILE, CONFIG_FILE
from crosslmm.train.checkpoint import seals, shards
from crosslmm.train.checkpoint.seals import Checkpoint
from crosslmm.train.checkpoint.state import State
from crosslmm.train.distributed.collectives import broadcast_json, gather_json

log = logging.getLogger(__name__)


def read_newest(run: str, group: dist.ProcessGroup, shards_now: int | None = None) -> tuple[Checkpoint, State] | None:
    """Read this rank's part of the newest intact checkpoint; None if there is none.

    A collective: all ranks call it and get the same checkpoint. Each reads and verifies the chunks of its rows. A
    damaged checkpoint is reported and skipped, and its seal is broken.

    Args:
        run: the run's folder.
        group: a gloo group of all ranks.
        shards_now: number of shards into which `parallelize` splits the model, however many wrote the checkpoint;
            None: one for each rank.
    """
    rank, shards_now = dist.get_rank(), shards_now or dist.get_world_size()
    for checkpoint in _list_on_rank_0(run, group):
        state: State = {}
        damage = None
        try:
            if rank == 0:
                shards.read_verified(checkpoint, CONFIG_FILE)
                read_base(checkpoint)
            state = shards.read(checkpoint, rank % shards_now, shards_now, _is_state)
        except shards.Damaged as error:
            damage = str(error)
        of_all_ranks = [reason for reason in gather_json(damage, group) if reason]
        if not of_all_ranks:
            return checkpoint, state
        if rank == 0:
            reason = "; ".join(dict.fromkeys(of_all_ranks))
            log.warning("checkpoint %s is damaged: %s; trying the one before it", checkpoint.uri, reason)
            seals.break_seal(checkpoint, reason)
    return None


def _is_state(name: str) -> bool:
    """Return whether a tensor is part of the state; earlier versions stored the random states of the ranks, too."""
    return not name.startswith("random/")


def read_base(checkpoint: Checkpoint) -> Base | None:
    """Return the model that the adapters in a checkpoint belong to; None if it has the whole model.

    Raises:
        shards.Damaged: the file is not what was written.
    """
    if BASE_FILE not in checkpoint.files:
        return None
    try:
        return Base.from_json(shards.read_verified(checkpoint, BASE_FILE))
    except ValueError as error:
        raise shards.Damaged(str(error)) from None


def _list_on_rank_0(run: str, group: dist.ProcessGroup) -> list[Checkpoint]:
    """Return the sealed checkpoints as rank 0 lists them; rank 0 logs those that are skipped."""
    sealed: list[Checkpoint] = []
    if dist.get_rank() == 0:
        sealed = seals.list_sealed(run)
        for uri in seals.list_unsealed(run, sealed):
            reason = seals.unsealed_reason(uri) or "it was never finished"
            log.warning("checkpoint %s is skipped: %s", uri, reason)
    return [Checkpoint.from_fields(fields) for fields in broadcast_json([asdict(one) for one in sealed], group)]
