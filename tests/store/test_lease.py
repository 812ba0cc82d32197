"""One owner per folder, on stores that refuse a second writer (Swift) and that do not (s3rver)."""

import os
import signal
import time

import pytest
from s3fs import S3FileSystem

from crosslmm import lease, storage
from crosslmm.lease import lease as module
from tests.support.flaky_store import FlakyStore
from tests.support.s3rver import STORES, running_store
from tests.support.twins import Contenders


@pytest.fixture(scope="module", params=STORES)
def store(request, tmp_path_factory):
    with running_store(request.param, tmp_path_factory.mktemp("store") / request.param) as store:
        store.make_bucket("runs")
        yield store


def use(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()


def test_create_says_whether_the_store_takes_conditions(store, monkeypatch):
    use(monkeypatch, store.environment())
    assert storage.create_bytes("s3://runs/created", b"1")
    assert storage.create_bytes("s3://runs/created", b"2") == (store.make == "s3rver")
    assert storage.read_bytes("s3://runs/created") == (b"2" if store.make == "s3rver" else b"1")


def test_of_twins_exactly_one_owns_the_folder_ten_times(store, tmp_path):
    with Contenders(tmp_path, store.environment(), beat_s=0.5, lease_s=4.0, elsewhere=True) as contenders:
        contenders.require_one_owner_each([f"s3://runs/twin-{number}" for number in range(10)], seed=11)


def test_an_owner_that_was_stopped_and_continued_ends_without_having_written(store, tmp_path):
    with Contenders(tmp_path, store.environment(), beat_s=0.5, lease_s=3.0) as contenders:
        stopped = contenders.start("s3://runs/stopped")
        contenders.await_lines(stopped)
        os.kill(stopped.pid, signal.SIGSTOP)
        before = contenders.lines(stopped)
        follower = contenders.start("s3://runs/stopped")
        contenders.await_lines(follower)
        os.kill(stopped.pid, signal.SIGCONT)
        assert stopped.wait() == 1
        assert f"process {follower.pid}" in stopped.result["message"]
        assert len(contenders.lines(stopped)) <= len(before) + 1  # the write that the stop came into
        follower.release()
        assert follower.wait() == 0


def test_an_owner_survives_an_outage_of_the_store(store, monkeypatch, caplog):
    for name, value in {"BEAT_S": 0.3, "LEASE_S": 2.0, "POLL_S": 0.1}.items():
        monkeypatch.setattr(module, name, value)
    with FlakyStore(int(store.endpoint.rsplit(":", 1)[1])) as flaky:
        use(monkeypatch, store.environment() | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{flaky.port}"})
        with lease.claim("s3://runs/away", "training", "wait").take() as fence:
            flaky.reads = flaky.writes = "503"
            time.sleep(6)
            fence.require_unless_recent()
            flaky.heal()
            time.sleep(1)
            fence.require()
    assert "the lease cannot be renewed" in caplog.text
