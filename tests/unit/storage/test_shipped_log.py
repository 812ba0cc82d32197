"""Logs in storage: what a process wrote, whatever becomes of it."""

import subprocess
import sys
import time

from crosslmm import storage
from crosslmm.storage import shipped_log
from crosslmm.storage.shipped_log import HEAD_BYTES, TAIL_BYTES, ShippedLog, excerpt, keep_newest

KILLED = """
import os, signal, sys, time
from crosslmm.storage.shipped_log import ShippedLog, output_files
(path,) = output_files()
with ShippedLog(path, sys.argv[1], 0.1):
    print("begins", flush=True)
    print("s3://user:secret@bucket is a place, \\x1b[31mred", file=sys.stderr, flush=True)
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_what_it_wrote_without_credentials(tmp_path):
    copy = tmp_path / "run/logs/a.log"
    with (tmp_path / "output").open("wb") as output:
        done = subprocess.run([sys.executable, "-c", KILLED, copy], stdout=output, stderr=output, timeout=60)
    assert done.returncode == -9
    first, second = copy.read_text().splitlines()
    assert first == "begins"
    assert "secret" not in second
    assert "is a place" in second
    assert second.isprintable()


def test_the_end_of_a_process_is_in_its_log(tmp_path):
    path, copy = tmp_path / "local", tmp_path / "copy"
    path.write_text("begins\n")
    with ShippedLog(path, str(copy), every_s=60):
        path.write_text("begins\nends\n")
    assert copy.read_text() == "begins\nends\n"


def test_a_long_log_keeps_its_beginning_and_its_end(tmp_path):
    path = tmp_path / "local"
    path.write_bytes(b"first" + b"x" * (HEAD_BYTES + TAIL_BYTES) + b"last")
    kept = excerpt(path)
    assert kept.startswith(b"first")
    assert kept.endswith(b"last")
    assert b"\n[9 bytes left out]\n" in kept
    assert len(kept) < HEAD_BYTES + TAIL_BYTES + 40


def test_a_store_that_fails_stops_nobody(tmp_path, monkeypatch):
    path, copy, failures = tmp_path / "local", tmp_path / "copy", []
    path.write_text("text\n")

    def write(uri, data):
        if not failures:
            failures.append(uri)
            raise storage.Unavailable("down")
        copy.write_bytes(data)

    monkeypatch.setattr(shipped_log, "write_bytes", write)
    with ShippedLog(path, str(copy), every_s=0.05):
        for _ in range(200):
            if copy.exists():
                break
            time.sleep(0.05)
    assert failures
    assert copy.read_text() == "text\n"


def test_the_newest_logs_are_kept(tmp_path):
    for name in ("0000000003-driver.log", "0000000001-driver.log", "0000000002-rank-00000.log"):
        (tmp_path / name).write_text("")
    keep_newest(str(tmp_path), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000000002-rank-00000.log", "0000000003-driver.log"]
    keep_newest(str(tmp_path / "nothing"), 2)
