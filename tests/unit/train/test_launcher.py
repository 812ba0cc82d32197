"""The launcher: a driver that is told to stop."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import GetTimeoutError

from crosslmm.config import WatchdogConfig
from crosslmm.planning.budget import Budget
from crosslmm.train import launcher
from crosslmm.train.worker import Stopped


@pytest.fixture(autouse=True)
def _interruptible(monkeypatch):
    """A shell's background jobs ignore SIGINT."""
    monkeypatch.setattr(ray, "get", lambda value, timeout: value)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def job_of(request_stop):
    return SimpleNamespace(events=SimpleNamespace(request_stop=SimpleNamespace(remote=request_stop)))


def test_a_stopped_driver_waits_for_the_last_checkpoint():
    stop_requested, saved = threading.Event(), []

    def request_stop():
        stop_requested.set()
        return True

    def workers():
        assert stop_requested.wait(30)
        time.sleep(0.5)
        saved.append("checkpoint")
        raise Stopped("after step 1")

    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        launcher.run_interruptibly(job_of(request_stop), workers)
    assert saved == ["checkpoint"]


def test_a_driver_that_is_stopped_before_its_workers_train_does_not_wait_for_them():
    began = time.monotonic()
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        launcher.run_interruptibly(job_of(lambda: False), lambda: time.sleep(20))
    assert time.monotonic() - began < 5


def test_a_driver_whose_channel_does_not_answer_waits_for_the_checkpoint(monkeypatch):
    def get(value, timeout):
        raise GetTimeoutError

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(launcher, "STOP_TIMEOUT_S", 1.0)
    began = time.monotonic()
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        launcher.run_interruptibly(job_of(lambda: True), lambda: time.sleep(20))
    assert time.monotonic() - began >= 1.3


def test_a_run_out_of_budget_waits_for_the_last_checkpoint(monkeypatch):
    monkeypatch.setattr(launcher, "STOP_TIMEOUT_S", 0.1)  # that of a signal, for which somebody waits
    monkeypatch.setattr(launcher, "BUDGET_POLL_S", 0.1)
    began, stop_requested, saved = time.monotonic(), threading.Event(), []

    def request_stop():
        stop_requested.set()
        return True

    def workers():
        assert stop_requested.wait(30)
        time.sleep(0.5)
        saved.append("checkpoint")
        raise Stopped("after step 1")

    job = job_of(request_stop)
    job.config = SimpleNamespace(watchdog=WatchdogConfig())
    budget = Budget(hours=1, dollars=0.001, price=3)
    spent = lambda: budget.spent(time.monotonic() - began, 4 * (time.monotonic() - began))  # noqa: E731
    with pytest.raises(launcher.OutOfBudget, match=r"the 0\.001 dollars of --dollars are spent"):
        launcher.run_interruptibly(job, workers, spent)
    assert saved == ["checkpoint"]
    assert 0.3 < time.monotonic() - began < 10


def test_a_run_that_ends_within_its_budget_is_left_alone():
    launcher.run_interruptibly(job_of(lambda: True), lambda: None, lambda: None)
