"""Who owns a folder that a job writes; see `lease.py`."""

from crosslmm.lease.lease import BEAT_S, LEASE_S, Claim, Fence, FolderInUse, LeaseLost, claim
from crosslmm.lease.owners import process_tags

__all__ = ["BEAT_S", "LEASE_S", "Claim", "Fence", "FolderInUse", "LeaseLost", "claim", "process_tags"]
