"""Threads and log of a worker: an error of what they call costs neither stop requests nor messages."""

import json
import logging
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import ray.train
from ray.exceptions import RayError

from crosslmm.config import ScalingConfig
from crosslmm.data.collate import Question
from crosslmm.planning.utilisation import Utilisation
from crosslmm.train import worker
from crosslmm.train.events import EventLogHandler
from crosslmm.train.worker import StopListener

DEADLINE_S = 10.0


class Flaky:
    """Callable that raises the first time and then returns a value."""

    def __init__(self, value) -> None:
        self.value, self.calls = value, 0

    def __call__(self):
        self.calls += 1
        if self.calls == 1:
            raise RayError("the actor is restarting")
        return self.value


def wait_until(condition) -> None:
    until = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture
def local_ray(monkeypatch):
    """Results of remote calls are their values; no node is being taken away."""
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: None)


def channel(stop_requested):
    return SimpleNamespace(stop_requested=SimpleNamespace(remote=stop_requested))


def test_a_stop_request_is_seen_after_an_error_of_the_channel(local_ray):
    with StopListener(channel(Flaky(True)), 0, 0.01) as listener:
        wait_until(listener.stop_requested)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_preemption_is_seen_after_an_error_of_ray_train(local_ray, monkeypatch, rank):
    monkeypatch.setattr(ray.train, "get_preemption_info", Flaky("spot"))
    with StopListener(channel(lambda: False), rank, 0.01) as listener:
        wait_until(listener.stop_requested)


def test_only_rank_0_asks_the_channel(local_ray):
    asked = Flaky(True)
    with StopListener(channel(asked), 1, 0.01) as listener:
        time.sleep(0.1)
    assert not asked.calls
    assert not listener.stop_requested()


def test_the_listener_ends_with_its_context(local_ray):
    with StopListener(channel(lambda: False), 0, 0.01):
        pass
    wait_until(lambda: not any(thread.name == "stop listener" for thread in threading.enumerate()))


def test_log_records_are_posted_with_level_rank_and_step():
    posted = []
    events = SimpleNamespace(post=SimpleNamespace(remote=lambda kind, item: posted.append((kind, item))))
    log = logging.Logger("worker")
    log.addHandler(EventLogHandler(events, rank=3))
    log.warning("checkpoint after step %s", 7, extra={"step": 7})
    log.info("plain")
    assert posted == [
        ("log", (logging.WARNING, "checkpoint after step 7", 3, 7)),
        ("log", (logging.INFO, "plain", 3, None)),
    ]


def test_steps_on_known_gpus_report_and_store_their_utilisation(monkeypatch):
    """The driver and the run's history get the same, so that a replay to MLflow has it too."""
    monkeypatch.setattr(worker.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(worker.dist, "get_world_size", lambda: 2)
    posted = []
    events = SimpleNamespace(post=SimpleNamespace(remote=lambda kind, item: posted.append((kind, item))))
    of_gpus = Utilisation(model_flops=1e12, hardware_flops=1.5e12, peak=10e12)
    job = SimpleNamespace(utilisation=of_gpus, events=events)
    watchdog, listener = SimpleNamespace(enter=None), SimpleNamespace(stop_requested=None)
    callbacks = worker._WorkerCallbacks(job, None, None, None, None, None, watchdog, listener, {})
    callbacks.log(1, {"frames_per_s": 4.0})
    ((kind, (step, _, metrics)),) = posted
    assert (kind, step) == ("step", 1)
    assert metrics == pytest.approx({"frames_per_s": 4.0, "mfu": 0.2, "hfu": 0.3})
    assert json.loads(callbacks._history[0])["metrics"] == metrics


@pytest.mark.parametrize(
    ("rank", "workers", "logged"),
    [
        (0, 6, ["scaling.workers_per_replica is 4, and there are 6 workers: 6 of them hold one copy of the model"]),
        (1, 6, []),
        (0, 8, []),
    ],
)
def test_rank_0_logs_other_shards_than_those_of_the_setting(rank, workers, logged, monkeypatch, caplog):
    monkeypatch.setattr(worker.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(worker.dist, "get_world_size", lambda: workers)
    assert worker._count_shards(ScalingConfig(workers_per_replica=4)) == {6: 6, 8: 4}[workers]
    assert [record.getMessage() for record in caplog.records] == logged


def question(position, *videos):
    return Question(position, None, "Which?", "red", list(videos))


@pytest.mark.parametrize(("rank", "recipe", "pictured"), [(0, None, [3, 5]), (1, None, []), (0, "of the features", [])])
def test_sample_answers_have_a_picture_of_frames_once(monkeypatch, rank, recipe, pictured):
    monkeypatch.setattr(worker.dist, "get_rank", lambda: rank)
    job = SimpleNamespace(recipe=recipe)
    callbacks = worker._WorkerCallbacks(job, *[None] * 5, *[SimpleNamespace(enter=None, stop_requested=None)] * 2, {})
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    asked = [question(3, frames), question(3, frames), question(4), question(5, frames[:1]), question(6, frames[:0])]
    for one in asked:
        callbacks._keep_answer(one, "red")
    assert sorted(callbacks._pictures) == pictured
    assert [answer["row"] for answer in callbacks._answers] == [3, 3, 4, 5, 6]
    callbacks._pictures = {}
    callbacks._keep_answer(question(3, frames), "red")  # another validation
    assert callbacks._pictures == {}
