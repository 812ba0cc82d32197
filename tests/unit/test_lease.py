"""One owner per folder, on a disk; tests/store/test_lease.py has the same on object stores."""

import json
import os
import signal
import threading
import time

import pytest

from crosslmm import lease, run_folder, storage
from crosslmm.lease import lease as module
from crosslmm.lease import owners
from tests.support.twins import Contenders

NAME = "give another --name"


def look(folder):
    return lease.claim(str(folder), "training", NAME)


@pytest.fixture
def quick(monkeypatch):
    for name, value in {"BEAT_S": 0.2, "LEASE_S": 1.0, "POLL_S": 0.1, "RECHECK_S": 0.4}.items():
        monkeypatch.setattr(module, name, value)


def entry(folder, number=1):
    return owners.read(str(folder), number).owner


@pytest.mark.parametrize("elsewhere", [False, True])
def test_of_twins_exactly_one_owns_the_folder_ten_times(tmp_path, elsewhere):
    with Contenders(tmp_path, elsewhere=elsewhere) as contenders:
        contenders.require_one_owner_each([f"{tmp_path}/run-{number}" for number in range(10)], seed=7)


def test_whoever_is_refused_is_told_who_owns_it_and_what_to_do(tmp_path, monkeypatch):
    job = {"metadata": {"job_submission_id": "twin-1"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    monkeypatch.setattr("getpass.getuser", lambda: "alice")
    began = time.monotonic()
    with look(tmp_path).take(), pytest.raises(lease.FolderInUse) as refused:
        look(tmp_path)
    assert time.monotonic() - began < 4  # before the first beat
    assert str(refused.value).startswith(f"{tmp_path}: belongs to the training of alice on ")
    assert f"(Ray job twin-1, process {os.getpid()}, for 0:00:0" in str(refused.value)
    assert str(refused.value).endswith("which is running; stop it (ray job stop twin-1), or give another --name")


@pytest.mark.parametrize("end", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_an_owner_that_ended_in_any_way_is_followed_at_once(tmp_path, end):
    class Ended(Exception):
        pass

    end = end or Ended
    with pytest.raises(end), look(tmp_path).take():
        raise end
    began = time.monotonic()
    with look(tmp_path).take() as fence:
        assert fence.number == 2
    assert time.monotonic() - began < 1


def test_a_killed_owner_of_this_machine_is_followed_at_once(tmp_path):
    with Contenders(tmp_path, lease_s=60) as contenders:
        owner = contenders.start(f"{tmp_path}/run")
        contenders.await_lines(owner)
        os.kill(owner.pid, signal.SIGKILL)
        follower = contenders.start(f"{tmp_path}/run", offset_s=0.2)
        follower.release()
        assert follower.wait() == 0
        assert follower.result["waited_s"] < 1


def test_a_killed_owner_elsewhere_is_followed_after_the_lease_time(tmp_path):
    with Contenders(tmp_path, lease_s=2.0, elsewhere=True) as contenders:
        owner = contenders.start(f"{tmp_path}/run")
        contenders.await_lines(owner)
        os.kill(owner.pid, signal.SIGKILL)
        follower = contenders.start(f"{tmp_path}/run")
        follower.release()
        assert follower.wait() == 0
        assert 2.0 <= follower.result["waited_s"] < 4.0


def test_an_owner_that_was_stopped_and_continued_ends_without_having_written(tmp_path):
    with Contenders(tmp_path) as contenders:
        stopped = contenders.start(f"{tmp_path}/run")
        contenders.await_lines(stopped)
        os.kill(stopped.pid, signal.SIGSTOP)
        before = contenders.lines(stopped)
        follower = contenders.start(f"{tmp_path}/run")
        contenders.await_lines(follower)
        os.kill(stopped.pid, signal.SIGCONT)
        assert stopped.wait() == 1
        assert f"process {follower.pid}" in stopped.result["message"]
        assert len(contenders.lines(stopped)) <= len(before) + 1  # the write that the stop came into
        follower.release()
        assert follower.wait() == 0


def test_the_owner_that_is_followed_is_interrupted_while_it_works(tmp_path, quick):
    """Its main thread waits for workers, and asks nothing by itself."""

    def work():
        with look(tmp_path).take():
            assert owners.create(str(tmp_path), 2, owners.Owner.this_process("training"))
            threading.Event().wait(30)

    began = time.monotonic()
    with pytest.raises(lease.LeaseLost, match="belongs to the training of"):
        work()
    assert time.monotonic() - began < 5
    assert not entry(tmp_path, 2).ended


def test_an_owner_whose_store_is_away_goes_on_unless_somebody_followed(tmp_path, quick, monkeypatch, caplog):
    real, away = storage.write_bytes, threading.Event()

    def write(uri, data):
        if away.is_set():
            raise storage.Unavailable("the store is away")
        real(uri, data)

    monkeypatch.setattr(storage, "write_bytes", write)
    with look(tmp_path).take() as fence:
        away.set()
        time.sleep(1.5)
        away.clear()
        time.sleep(0.5)
        fence.require()
        assert entry(tmp_path).beats > 0
    assert caplog.text.count("the lease cannot be renewed") == 1
    assert entry(tmp_path).ended


@pytest.mark.parametrize("error", [storage.Unavailable("away"), PermissionError("403"), OSError(5, "EIO")])
def test_records_go_on_while_the_store_cannot_be_asked(tmp_path, monkeypatch, error):
    """The monitor's thread asks twice a second: an error of the store must not end it."""
    with look(tmp_path).take() as fence, monkeypatch.context() as patched:
        patched.setattr(owners, "read", lambda *_: (_ for _ in ()).throw(error))
        fence.require_unless_recent(0)
        with pytest.raises(type(error)):
            fence.require()


def test_an_owner_that_another_user_hides_is_not_known_to_be_gone(tmp_path, monkeypatch):
    """With hidepid, /proc shows nobody else's processes."""
    with look(tmp_path).take():
        owner = entry(tmp_path)
        shown = owners._state

        monkeypatch.setattr(owners, "_process", lambda pid: "" if pid == owner.pid and hidden else owner.process)
        monkeypatch.setattr(owners, "_state", lambda pid: "X" if hidden else shown(pid))
        hidden = True
        assert not owner.gone


def test_a_beat_that_hangs_does_not_undo_the_end(tmp_path, quick, monkeypatch, caplog):
    real, hang, hanging = storage.write_bytes, threading.Event(), threading.Event()

    def write(uri, data):
        if hang.is_set():
            hanging.set()
            time.sleep(1.0)
        real(uri, data)

    monkeypatch.setattr(storage, "write_bytes", write)
    with look(tmp_path).take():
        hang.set()
        assert hanging.wait(5)
    assert "could not be given up: the store does not answer" in caplog.text


def test_a_trial_belongs_to_the_owner_of_its_sweep(tmp_path):
    (tmp_path / "sweep.json").write_text("{}")
    assert run_folder.owned_folder(f"{tmp_path}/trial") == str(tmp_path)
    assert run_folder.owned_folder(f"{tmp_path}/a/b") == f"{tmp_path}/a/b"


def test_a_store_that_does_not_answer_is_no_silence_of_the_owner(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(owners, "_process", lambda pid: "")
    owners.create(str(tmp_path), 1, owners.Owner.this_process("training"))
    real, calls = owners.newest, []

    def newest(folder, known=None):
        calls.append(known)
        if len(calls) == 3:
            time.sleep(1.5)  # longer than the lease, in one request
        if len(calls) == 5:
            owners.write(folder, 1, owners.Owner.this_process("training"))
        return real(folder, known)

    monkeypatch.setattr(owners, "newest", newest)
    with pytest.raises(lease.FolderInUse):
        look(tmp_path)


def test_a_question_without_an_answer_yet_is_no_answer(tmp_path, monkeypatch):
    """A stopped process goes on in all threads at once: one asks, and the others must not take that for a yes."""
    asked, answered = threading.Event(), threading.Event()
    with look(tmp_path).take() as fence:
        real = owners.read

        def read(folder, number):
            if threading.current_thread().name == "first":
                asked.set()
                answered.wait(10)
            return real(folder, number)

        monkeypatch.setattr(owners, "read", read)
        first = threading.Thread(target=fence.require, name="first")
        first.start()
        asked.wait(10)
        monkeypatch.setattr(owners, "read", lambda folder, number: None)
        with pytest.raises(lease.LeaseLost):
            fence.require_unless_recent()
        monkeypatch.setattr(owners, "read", real)
        answered.set()
        first.join()


def test_a_twin_that_looked_at_the_same_time_is_refused(tmp_path):
    first, second = look(tmp_path), look(tmp_path)
    with first.take(), pytest.raises(lease.FolderInUse):
        second.take()


def test_of_two_that_take_the_same_number_one_owns_it(tmp_path, monkeypatch):
    """Both have found the folder free, so only the store can refuse the second."""
    claims = look(tmp_path), look(tmp_path)
    monkeypatch.setattr(owners, "newest", lambda *_: None)
    with claims[0].take() as fence:
        with pytest.raises(lease.FolderInUse):
            claims[1].take()
        assert entry(tmp_path).token == fence.token


def test_a_store_that_ignores_conditions_keeps_the_last_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(owners, "SETTLE_S", 0.5)
    monkeypatch.setattr(storage, "create_bytes", lambda uri, data: storage.write_bytes(uri, data) is None)
    results = {}

    def take(name, delay):
        claim = look(tmp_path)
        time.sleep(delay)
        try:
            results[name] = claim.take()
        except lease.FolderInUse:
            results[name] = None

    threads = [threading.Thread(target=take, args=arguments) for arguments in (("a", 0.1), ("b", 0.2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results["a"] is None or results["b"] is None
    assert results["a"] or results["b"]


@pytest.mark.parametrize("content", [b"", b"{", b'{"token": 3}', b"[]"])
def test_an_owner_whose_file_is_damaged_is_watched_like_any_other(tmp_path, quick, content):
    storage.write_bytes(f"{tmp_path}/owners/00000001.json", content)
    began = time.monotonic()
    with look(tmp_path).take() as fence:
        assert fence.number == 2
    assert time.monotonic() - began >= 1.0


def test_an_owner_s_file_that_is_being_written_is_read_again(tmp_path, monkeypatch):
    """A store that overwrites in place, such as s3rver, may show it cut off."""
    monkeypatch.setattr(owners, "REREAD_PAUSES_S", [0.05] * 100)  # the timer may be late on a loaded machine

    def cut_off_for_a_moment():
        file.write_bytes(whole[:1])
        threading.Timer(0.05, file.write_bytes, [whole]).start()

    with look(tmp_path).take() as fence:
        file = tmp_path / "owners/00000001.json"
        whole = file.read_bytes()
        cut_off_for_a_moment()
        fence.require()
        cut_off_for_a_moment()
        with pytest.raises(lease.FolderInUse, match=f"process {os.getpid()}, for 0:00:"):
            look(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "link", "pipe", "too large"])
def test_what_is_no_owner_s_file_is_not_opened_and_blocks_nobody(tmp_path, quick, kind):
    path, outside = tmp_path / "run/owners/00000001.json", tmp_path / "outside.json"
    path.parent.mkdir(parents=True)
    outside.write_text("{}")
    {"folder": path.mkdir, "link": lambda: path.symlink_to(outside), "pipe": lambda: os.mkfifo(path),
     "too large": lambda: path.write_bytes(bytes(10**5))}[kind]()  # fmt: skip
    with look(tmp_path / "run").take() as fence:
        assert fence.number == 2
    assert outside.read_text() == "{}"


def test_an_owner_whose_folder_was_removed_stops(tmp_path):

    def work():
        with look(tmp_path / "run").take() as fence:
            storage.remove_folder(str(tmp_path / "run"))
            fence.require()

    with pytest.raises(lease.LeaseLost, match="was removed"):
        work()


def test_a_job_that_the_cluster_knows_to_have_ended_is_followed_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(owners, "_process", lambda pid: "")
    monkeypatch.setattr("crosslmm.ray_runtime.current_job", lambda: ("cluster", "01000000"))
    owners.create(str(tmp_path), 1, owners.Owner.this_process("training"))
    monkeypatch.setattr(
        "crosslmm.ray_runtime.job_has_ended", lambda cluster, job: (cluster, job) == ("cluster", "01000000")
    )
    began = time.monotonic()
    look(tmp_path)
    assert time.monotonic() - began < 1
