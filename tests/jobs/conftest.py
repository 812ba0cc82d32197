"""One object store and one cluster for all tests of the entry points: each takes 8 to 15 s to start."""

import pytest

from cluster.local.cluster import LocalCluster
from tests.support.common import ROOT
from tests.support.object_store import object_store_in_use


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """OpenStack Swift on loopback, with an empty bucket `videos`; its credentials are in the environment."""
    root = tmp_path_factory.mktemp("store") / "swift"
    with object_store_in_use(root, venv=ROOT / ".cache" / "swift-venv", bucket="videos") as store:
        yield store


@pytest.fixture(scope="session")
def cluster(store):
    """A Ray cluster of two CPUs that reaches the store."""
    with LocalCluster(num_cpus=2, environment=store.environment()) as cluster:
        yield cluster
