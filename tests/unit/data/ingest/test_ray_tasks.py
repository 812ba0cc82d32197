import pytest
import ray

from crosslmm.data.ingest import ray_tasks


def test_tasks_that_no_node_has_memory_for_are_refused_in_one_line(monkeypatch):
    """Ray would wait for such a node forever."""
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0, "memory": 3 * 2**30}},
        {"Alive": False, "Resources": {"CPU": 8.0, "memory": 64 * 2**30}},
    ]
    monkeypatch.setattr(ray_tasks, "start_ray", lambda: None)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    with pytest.raises(
        ray_tasks.IngestError,
        match=r"^data\.decode_memory_gib: .* up to 4 GiB together, .* more than 3\.0 GiB .*lower it$",
    ):
        next(ray_tasks.run_tasks(len, {0: ("a",)}, memory_gib=4))
