"""Outages of an object store: transient ones cost time only, permanent ones are reported at once.

With Swift alone: s3rver writes an object in place, so an upload that breaks off leaves half of it, and it keeps the
framing of Arrow's chunked uploads as content, as no S3 would.
"""

import shutil
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace

import boto3
import numpy as np
import pyarrow.fs
import pytest
from boto3.s3.transfer import TransferConfig
from s3fs import S3FileSystem

from crosslmm import storage
from crosslmm.storage import RetryPolicy, retry
from crosslmm.storage.retry import keep_policy
from tests.support.common import ROOT
from tests.support.flaky_store import FlakyStore
from tests.support.object_store import running_object_store

pytestmark = pytest.mark.fault

DATA = np.random.default_rng(0).bytes(12_000_000)
PART = 5 * 2**20
"""Smallest part that S3 accepts [bytes]."""
FAST = RetryPolicy(waits_s=(0.2,), read_timeout_s=2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with running_object_store(tmp_path_factory.mktemp("store") / "swift", venv=ROOT / ".cache" / "swift-venv") as store:
        store.make_bucket("runs")
        yield store


@pytest.fixture
def flaky(store, monkeypatch):
    with FlakyStore(int(store.endpoint.rsplit(":", 1)[1])) as flaky:
        for name, value in (store.environment() | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{flaky.port}"}).items():
            monkeypatch.setenv(name, value)
        S3FileSystem.clear_instance_cache()
        with storage.retrying(FAST):
            yield flaky


def break_store(flaky, seconds, **modes):
    """Make the store fail from now on for `seconds`; return the time at which it recovers."""
    vars(flaky).update(modes)
    threading.Timer(seconds, lambda: vars(flaky).update(dict.fromkeys(modes))).start()
    return time.monotonic() + seconds


@pytest.mark.parametrize("mode", ["503", "reset", 3.0])
def test_reads_survive_an_outage(flaky, tmp_path, mode):
    storage.write_bytes("s3://runs/r/a/data", DATA)
    storage.write_bytes("s3://runs/r/b", b"b")
    for read, expected in {
        lambda: storage.read_bytes("s3://runs/r/a/data"): DATA,
        lambda: storage.read_bytes("s3://runs/r/a/data", 10, 100_000): DATA[10:100_000],
        lambda: storage.open_read("s3://runs/r/a/data").read(): DATA,
        lambda: storage.names_in("s3://runs/r"): ["a/data", "b"],
        lambda: storage.exists("s3://runs/r/b"): True,
        lambda: storage.exists("s3://runs/r/c"): False,
        lambda: storage.size_and_version("s3://runs/r/b")[0]: 1,
        lambda: storage.download("s3://runs/r", str(tmp_path / "r")): None,
    }.items():
        recovery = break_store(flaky, 1.5, reads=mode)
        assert read() == expected
        assert time.monotonic() > recovery - 0.5
        flaky.reads = None
    assert (tmp_path / "r/a/data").read_bytes() == DATA
    assert (tmp_path / "r/b").read_bytes() == b"b"


@pytest.fixture
def short_writes(flaky):
    with storage.retrying(replace(FAST, write_timeout_s=2)):
        yield


@pytest.mark.parametrize("mode", ["503", "reset", "lost", 3.0])
def test_writes_survive_an_outage(flaky, short_writes, tmp_path, mode):
    (tmp_path / "w/x").mkdir(parents=True)
    (tmp_path / "w/x/data").write_bytes(DATA)
    (tmp_path / "w/small").write_bytes(b"small")

    def chunks():
        for at in range(0, len(DATA), 1_000_000):
            if at == 7_000_000:
                break_store(flaky, 1.5, writes=mode)
            yield DATA[at : at + 1_000_000]

    storage.write_chunks("s3://runs/w/chunks", chunks(), PART)
    flaky.writes = None
    assert storage.read_bytes("s3://runs/w/chunks") == DATA
    for name in ("small", "large"):
        break_store(flaky, 1.5, writes=mode)
        storage.write_bytes(f"s3://runs/w/{name}", b"1" if name == "small" else DATA, PART)
        flaky.writes = None
    break_store(flaky, 1.5, writes=mode)
    storage.upload(str(tmp_path / "w"), "s3://runs/w/folder", PART)
    flaky.writes = None
    assert storage.read_bytes("s3://runs/w/small") == b"1"
    assert storage.read_bytes("s3://runs/w/large") == DATA
    assert storage.names_in("s3://runs/w/folder") == ["small", "x/data"]
    assert storage.read_bytes("s3://runs/w/folder/x/data") == DATA
    break_store(flaky, 1.5, writes=mode)
    storage.remove_folder("s3://runs/w")
    flaky.writes = None
    assert storage.names_in("s3://runs/w") == []


@pytest.mark.parametrize("mode", ["503", "reset"])
def test_arrow_survives_an_outage(flaky, mode):
    filesystem, path = storage.arrow_filesystem("s3://runs/arrow")
    break_store(flaky, 3, reads=mode, writes=mode)
    with filesystem.open_output_stream(f"{path}/data") as file:
        file.write(DATA)
    break_store(flaky, 3, reads=mode, writes=mode)
    with filesystem.open_input_file(f"{path}/data") as file:
        assert file.read() == DATA
    break_store(flaky, 3, reads=mode, writes=mode)
    assert [info.base_name for info in filesystem.get_file_info(pyarrow.fs.FileSelector(path))] == ["data"]


def test_a_store_that_stays_down_is_named_in_the_error(flaky):
    flaky.reads = flaky.writes = "503"
    for call in (lambda: storage.read_bytes("s3://runs/x"), lambda: storage.write_bytes("s3://runs/x", DATA, PART)):
        began = time.monotonic()
        with (
            storage.retrying(replace(FAST, deadline_s=2)),
            pytest.raises(storage.Unavailable, match=r"^s3://runs/x: .*(Slow down|Service Unavailable)") as raised,
        ):
            call()
        assert "\n" not in str(raised.value)
        assert 1 < time.monotonic() - began < 10


def test_an_interrupted_write_leaves_the_old_object(flaky):
    storage.write_bytes("s3://runs/old", b"old")
    flaky.writes = "reset"
    for data in (b"new", DATA):
        with storage.retrying(replace(FAST, deadline_s=0)), pytest.raises(storage.Unavailable):
            storage.write_bytes("s3://runs/old", data, PART)
    flaky.writes = None

    def interrupted():
        yield DATA
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.write_chunks("s3://runs/old", interrupted(), PART)
    assert storage.read_bytes("s3://runs/old") == b"old"


def test_an_upload_whose_last_response_is_lost_is_complete(flaky):
    completing = flaky.hold(lambda method, path: method == "POST" and "uploadId=" in path)
    thread = threading.Thread(target=keep_policy(storage.write_bytes), args=("s3://runs/unheard", DATA, PART))
    thread.start()
    completing.wait(30)
    flaky.writes = "lost"
    completing.release()
    while sum("uploadId=" in path for method, path in flaky.requests if method == "POST") < 2:
        time.sleep(0.05)
    flaky.writes = None
    thread.join(60)
    assert storage.read_bytes("s3://runs/unheard") == DATA


def test_a_request_that_is_dropped_half_way_is_retried(flaky):
    held = flaky.hold(lambda method, path: method == "PUT" and path.endswith("/held"), after=1000)
    thread = threading.Thread(target=keep_policy(storage.write_bytes), args=("s3://runs/held", DATA[:PART]))
    thread.start()
    assert held.wait(30) == ("PUT", "/runs/held")
    assert not storage.exists("s3://runs/held")
    held.drop()
    thread.join(60)
    assert storage.read_bytes("s3://runs/held") == DATA[:PART]
    assert flaky.requests.count(("PUT", "/runs/held")) == 2
    with pytest.raises(TimeoutError):
        flaky.hold(lambda method, path: False).wait(0.1)


def test_flaky_store_passes_multipart_uploads_of_boto(flaky, store, tmp_path):
    (tmp_path / "data").write_bytes(DATA)
    client = boto3.client("s3")
    client.upload_file(
        str(tmp_path / "data"),
        "runs",
        "boto",
        Config=TransferConfig(multipart_threshold=PART, multipart_chunksize=PART),
    )
    assert client.get_object(Bucket="runs", Key="boto")["Body"].read() == DATA
    assert sum(method == "PUT" for method, _ in flaky.requests) == 3


@pytest.fixture
def no_waiting():
    with storage.retrying(replace(FAST, sleep=lambda seconds: pytest.fail("it waited"))):
        yield


def test_permanent_errors_are_raised_without_a_retry(flaky, no_waiting, monkeypatch):
    wrong = {
        "s3://nowhere/x": (storage.Refused, "there is no bucket nowhere"),
        "s3://runs/missing": (FileNotFoundError, "no such object"),
        "s3://No_Such!/x": (storage.BadLocation, "Invalid bucket name"),
    }
    for uri, (kind, says) in wrong.items():
        with pytest.raises(kind, match=f"^{uri}: .*{says}") as raised:
            storage.read_bytes(uri)
        assert "\n" not in str(raised.value)
    for data in (b"", DATA):
        with pytest.raises(storage.Refused, match=r"^s3://nowhere/x: there is no bucket nowhere$"):
            storage.write_bytes("s3://nowhere/x", data, PART)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    S3FileSystem.clear_instance_cache()
    for call in (storage.read_bytes, storage.exists, lambda uri: storage.write_bytes(uri, b"")):
        with pytest.raises(
            PermissionError, match=r"^s3://runs/x: permission denied; check AWS_\* or the machine's role$"
        ):
            call("s3://runs/x")


def test_a_full_disk_fails_at_once_and_leaves_no_file(tmp_path):
    """Writes to a file system of 1 MB."""
    code = textwrap.dedent(f"""\
        import os
        from crosslmm import storage
        with storage.retrying(storage.RetryPolicy(sleep=None)):
            for write in (storage.write_bytes, lambda uri, data: storage.write_chunks(uri, [data])):
                try:
                    write("{tmp_path}/folder/big", bytes(2_000_000))
                except OSError as error:
                    print(error, os.listdir("{tmp_path}/folder"))
        """)
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    script = f"mount -t tmpfs -o size=1m none {tmp_path} && exec {sys.executable} -c '{code}'"
    if not shutil.which("unshare") or subprocess.run([*mount, "mount -t tmpfs none /mnt"]).returncode:
        pytest.skip("users cannot mount file systems on this machine")
    output = subprocess.run([*mount, script], cwd=ROOT, capture_output=True, text=True).stdout
    assert output == f"[Errno 28] no space left for {tmp_path}/folder/big; free some, or write elsewhere []\n" * 2


@pytest.mark.parametrize("deadline_s", [0, 0.25, 180])
def test_waits_grow_until_the_deadline(monkeypatch, deadline_s):
    now, waits = [0.0], []

    def sleep(seconds):
        waits.append(seconds)
        now[0] += seconds

    def fail():
        raise storage.Unavailable("down")

    monkeypatch.setattr(retry.time, "monotonic", lambda: now[0])
    policy = RetryPolicy(deadline_s=deadline_s, sleep=sleep)
    with storage.retrying(policy), pytest.raises(storage.Unavailable, match="down"):
        storage.with_retries(fail)
    assert waits == ([1, 2, 4, 8, *[15] * 11] if deadline_s == 180 else [])
