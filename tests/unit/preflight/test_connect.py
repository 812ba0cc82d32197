"""A cluster that refuses this process's token is reported at once, with the remedy."""

import grpc
import pytest

from crosslmm import ray_runtime
from crosslmm.config import BadConfig
from crosslmm.preflight import connect


class Refusal(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAUTHENTICATED


@pytest.fixture
def refusing_cluster(monkeypatch):
    def ping(address, timeout_s):
        raise Refusal

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    monkeypatch.setattr(ray_runtime, "ping_gcs", ping)
    monkeypatch.setattr(ray_runtime, "token_available", lambda: False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)


@pytest.mark.parametrize(("enabled", "message"), [(True, "refuses the one that is set"), (False, "none is set")])
def test_a_refused_token_names_reason_and_remedy(enabled, message, refusing_cluster, monkeypatch):
    monkeypatch.setattr(ray_runtime, "token_auth_enabled", lambda: enabled)
    with pytest.raises(
        connect.AccessRefused, match=f"127.0.0.1:6379 requires a token, and {message}; export "
    ) as error:
        connect.connect()
    assert isinstance(error.value, BadConfig)
    assert (error.value.finding.name, error.value.finding.node) == ("token", "driver")


def test_a_token_that_ray_finds_by_itself_is_left_to_ray(refusing_cluster, monkeypatch):
    monkeypatch.setattr(ray_runtime, "token_available", lambda: True)
    connect.check_token()


@pytest.mark.parametrize("address", ["", "auto", "ray://127.0.0.1:10001"])
def test_only_addresses_of_a_control_store_are_checked(address, refusing_cluster, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    connect.check_token()
