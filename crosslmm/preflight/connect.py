"""Connect to a Ray cluster, and say what to do if the cluster refuses this process."""

import os

import grpc
from ray.exceptions import AuthenticationError

from crosslmm import ray_runtime
from crosslmm.config import BadConfig
from crosslmm.preflight import findings
from crosslmm.preflight.findings import Finding

GCS_TIMEOUT_S = 5.0
"""Deadline for the cluster's control store to answer the check of the token [s]."""


class AccessRefused(BadConfig):
    """The cluster does not accept this process; `finding` names the reason and the remedy."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.line)
        self.finding = finding


def connect() -> None:
    """Connect to the cluster in reach, or start one on this machine.

    Raises:
        AccessRefused: wrong or missing token, or other versions of Ray or Python.
        ConnectionError: the cluster does not answer.
    """
    try:
        check_token()
        ray_runtime.start_ray()
    except AuthenticationError as error:
        raise AccessRefused(_refusal("token", str(error).partition(". ")[0], findings.TOKEN)) from error
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        raise AccessRefused(_refusal("versions", " ".join(str(error).split()), findings.SAME_VERSIONS)) from error


def check_token() -> None:
    """Check that the cluster at RAY_ADDRESS accepts this process's token. `ray.init` itself would retry for twenty
    seconds, and then not name the reason.

    Raises:
        AccessRefused: the cluster refuses the token, or none is set.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if ":" not in address or "://" in address:
        return
    try:
        ray_runtime.ping_gcs(address, GCS_TIMEOUT_S)
    except grpc.RpcError as error:
        # Without RAY_AUTH_MODE, `ray.init` turns token authentication on by itself if it finds a token.
        ray_tries_token = "RAY_AUTH_MODE" not in os.environ and ray_runtime.token_available()
        if error.code() is not grpc.StatusCode.UNAUTHENTICATED or ray_tries_token:
            return
        reason = "refuses the one that is set" if ray_runtime.token_auth_enabled() else "none is set"
        message = f"the cluster at {address} requires a token, and {reason}"
        raise AccessRefused(_refusal("token", message, findings.TOKEN)) from error


def _refusal(name: str, message: str, remedy: str) -> Finding:
    return Finding(name, "driver", False, message, remedy)
