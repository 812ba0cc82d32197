"""The checks that every run makes before it starts workers."""

import pytest

from crosslmm.config import BadConfig
from crosslmm.preflight import checks, cluster_probe, node_probe


def test_require_ready_refuses_in_the_doctors_words(tmp_path, monkeypatch, config):
    """On a cluster of one node all checks run in this process, and leave nothing behind."""
    monkeypatch.setattr(cluster_probe, "other_nodes", dict)
    config = config.model_copy(update={"storage": str(tmp_path / "runs")})
    token = tmp_path / "token"
    token.write_text("0" * 64)
    monkeypatch.setattr(node_probe, "token", lambda: (True, str(token), 0o600))
    checks.require_ready(config, [])
    assert list((tmp_path / "runs").iterdir()) == []

    monkeypatch.setattr(node_probe, "token", lambda: (True, str(token), 0o644))
    with pytest.raises(BadConfig, match=r"token \(driver\): other users of the machine may read .*; chmod 600 /"):
        checks.require_ready(config, [])
    (tmp_path / "file").touch()
    below = config.model_copy(update={"storage": str(tmp_path / "file" / "runs")})
    with pytest.raises(BadConfig, match=r"chmod 600 .*; and 1 more, which jobs/doctor\.py shows"):
        checks.require_ready(below, [])
