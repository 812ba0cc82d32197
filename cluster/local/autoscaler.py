"""Ray's autoscaler on this machine: Ray's fake node provider, which here starts nodes as a local cluster does."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from ray._private.ray_constants import LABELS_ENVIRONMENT_VARIABLE
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)
from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

from cluster.local.nodes import LocalNode, NodeGroup, worker_options

EMPTY_STEPS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter",
)  # fmt: skip
"""Steps of Ray's cluster launcher, which the autoscaler's configuration must have, and which are empty here."""


class LocalProvider(FakeMultiNodeProvider):
    """Starts and stops nodes for the autoscaler; runs in the autoscaler's process, a child of the head.

    Ray's own fake nodes listen on the machine's external address, and its type of provider needs a file that Ray's
    wheel lacks.
    """

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: dict[str, str], count: int, resources: dict[str, int], labels: dict[str, str]
    ) -> None:
        with self.lock:
            name, kind = self._next_hex_node_id(), tags[TAG_RAY_USER_NODE_TYPE]
            environment = {
                **os.environ,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": name,
                "RAY_CLOUD_INSTANCE_ID": name,
                "RAY_NODE_TYPE_NAME": kind,
            }
            environment.pop(LABELS_ENVIRONMENT_VARIABLE, None)
            options = worker_options(self.provider_config["gcs_address"], resources, labels)
            node = LocalNode(options, environment, Path(self.provider_config["logs"]) / f"{kind}-{name[-5:]}.log")
            node.wait()
            nodes: dict[str, Any] = self._nodes
            nodes[name] = {"tags": {TAG_RAY_NODE_KIND: NODE_KIND_WORKER, **tags}, "node": node}

    def _terminate_node(self, node: dict[str, Any]) -> None:
        node["node"].stop()


def head_environment(environment: dict[str, str]) -> dict[str, str]:
    """Return the head's environment: it runs version 2 of the autoscaler, which knows labels, with this provider."""
    root = str(Path(__file__).resolve().parents[2])
    return environment | {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [environment.get("PYTHONPATH")])]),
    }


def config(gcs_address: str, head_cpus: int, groups: Sequence[NodeGroup], idle_s: float, logs: Path) -> dict[str, Any]:
    """Return the contents of the file for `ray start --autoscaling-config`.

    Args:
        gcs_address: HOST:PORT of the head's control store.
        head_cpus: CPUs of the head.
        groups: node types that the autoscaler may add.
        idle_s: idle time after which it removes a node [s].
        logs: folder for the nodes' logs.
    """
    types = {
        group.role: {
            "min_workers": group.min_nodes,
            "max_workers": group.nodes,
            # A request for memory starts no node whose type says nothing of it; Ray says it itself in clouds only.
            "resources": {"memory": psutil.virtual_memory().total // 2, **group.resources},
            "labels": group.labels,
            "node_config": {},
        }
        for group in groups
    }
    head = {"max_workers": 0, "resources": {"CPU": head_cpus}, "node_config": {}}
    return {
        "cluster_name": "local",
        "max_workers": sum(group.nodes for group in groups),
        "idle_timeout_minutes": idle_s / 60,
        "provider": {
            "type": "external",
            "module": f"{__name__}.{LocalProvider.__name__}",
            "gcs_address": gcs_address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "logs": str(logs),
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "available_node_types": {FAKE_HEAD_NODE_TYPE: head, **types},
        # Ray supplies defaults for these only for cloud providers.
        **{key: [] for key in EMPTY_STEPS},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
    }
