import pytest
import ray

from crosslmm.data.ingest import ray_tasks


@pytest.mark.parametrize(
    "nodes",
    [
        [
            {"Alive": True, "Resources": {"CPU": 8.0, "memory": 3 * 2**30}},
            {"Alive": False, "Resources": {"CPU": 8.0, "memory": 64 * 2**30}},
        ],
        [],
    ],
    ids=["small nodes", "no nodes"],
)
def test_waiting_for_a_node_with_enough_memory_is_said(nodes, monkeypatch, caplog):
    """An autoscaler may add one; without it, Ray would wait in silence forever."""

    class Submitted(Exception):
        pass

    def submit(**options):
        raise Submitted

    monkeypatch.setattr(ray_tasks, "start_ray", lambda: None)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "remote", submit)
    with pytest.raises(Submitted):
        next(ray_tasks.run_tasks(len, {0: ("a",)}, memory_gib=4))
    largest = "3.0" if nodes else "0.0"
    assert f"reserve 4 GiB together, and no node has more than {largest} GiB; waiting" in caplog.text
