"""The driver's monitor: events of the workers become log lines, records and reports, whatever fails."""

import logging
import time
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import RayError
from ray.util.metrics import Gauge

from crosslmm import run_folder
from crosslmm.lease import LeaseLost
from crosslmm.run_folder import QUARANTINE_FILE
from crosslmm.train.monitor import TrainingMonitor

METRICS = {"samples_per_s": 1.0, "frames_per_s": 4.0, "data_wait_share": 0.0, "loss": 2.0}
COUNTS = {"validation/count": 8.0, "validation/unreadable": 0.0}
VALIDATED = METRICS | COUNTS | {"validation/loss": 1.0, "validation/accuracy": 0.5}
UNREADABLE = {"split": "training", "manifest": "m", "line": 3, "id": "x", "reason": "empty"}


class Events:
    """Event channel that gives one list of events per call; an exception among them is raised."""

    def __init__(self, *batches) -> None:
        self.batches = list(batches)
        self.drain = SimpleNamespace(remote=self._drain)

    def _drain(self):
        batch = self.batches.pop(0) if self.batches else []
        if isinstance(batch, Exception):
            raise batch
        return batch


class Record:
    """Record that notes what it gets; its first call can fail."""

    waiting = 0

    def __init__(self, fail_first: bool = False) -> None:
        self.calls, self.fail_first = [], fail_first

    def log(self, steps) -> None:
        if self.fail_first:
            self.fail_first = False
            raise ValueError("no JSON")
        self.calls.append([step for step, _, _ in steps])

    def tag(self, tags) -> None:
        self.calls.append(tags)

    def queue_answers(self) -> None:
        self.calls.append("answered")

    def wait_delivered(self, seconds) -> None:
        self.calls.append("settled")


@pytest.fixture(autouse=True)
def _local_ray(monkeypatch):
    monkeypatch.setattr(ray, "get", lambda value: value)


def monitor(folder, record=None, report=None, *batches):
    config, fence = SimpleNamespace(name="run"), SimpleNamespace(require_unless_recent=lambda: None)
    job = SimpleNamespace(config=config, total_steps=4, folder=str(folder), events=Events(*batches), fence=fence)
    return TrainingMonitor(job, record or Record(), report)


def test_a_validation_is_reported_when_the_record_has_it(tmp_path):
    record = Record()
    with monitor(
        tmp_path, record, lambda step, metrics: record.calls.append((step, metrics["validation/loss"])),
        [("step", (1, 1.0, METRICS)), ("step", (2, 2.0, VALIDATED)), ("step", (3, 3.0, METRICS))],
    ) as running:  # fmt: skip
        pass
    assert record.calls == [[1, 2, 3], "settled", (2, 1.0)]
    assert not running.stopped
    assert running.last_metrics == METRICS


def test_a_run_that_tune_stops_has_not_failed(tmp_path):
    def stop(step, metrics):
        raise SystemExit(0)

    running = monitor(tmp_path, report=stop)
    with pytest.raises(SystemExit):
        running.handle([("step", (2, 2.0, VALIDATED))])
    assert running.stopped


def test_tune_s_stop_ends_the_monitor_s_thread(tmp_path):
    reported = []

    def stop(step, metrics):
        reported.append(step)
        raise SystemExit(0)

    with monitor(tmp_path, None, stop, [("step", (2, 2.0, VALIDATED))], [("step", (3, 3.0, VALIDATED))]) as running:
        while not running.stopped:
            pass
    assert running.stopped
    assert reported == [2]


def test_an_error_of_the_channel_is_logged_and_later_events_are_handled(tmp_path, caplog):
    record = Record()
    lost, step = RayError("lost"), [("step", (1, 1.0, METRICS))]
    with monitor(tmp_path, record, None, lost, lost, ValueError("odd"), step) as running:
        while running.job.events.batches:
            pass
    assert record.calls == [[1]]
    assert [line for line in caplog.messages if "cannot be read" in line] == [
        "the workers' events cannot be read: RayError; trying again"
    ]


def test_an_error_in_one_kind_of_event_does_not_lose_the_others(tmp_path, caplog):
    record = Record(fail_first=True)
    events = [("step", (1, 1.0, METRICS)), ("unreadable", UNREADABLE), ("log", (logging.WARNING, "hello", 1, 7))]
    with monitor(tmp_path, record, None, events, [("step", (2, 2.0, METRICS))]) as running:
        while running.job.events.batches:
            pass
    assert record.calls == [[2]]
    assert (tmp_path / QUARANTINE_FILE).exists()
    assert "left out: m line 3 (x): empty" in caplog.messages
    assert "events of kind 'step' could not be handled; the run goes on" in caplog.messages


def test_videos_with_few_frames_are_named_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("crosslmm.train.monitor.MAX_SHORT_VIDEOS", 3)
    videos = [["a: why", "b: why"], ["b: why"], ["b: why", "c: why", "d: why"]]
    short = [("short", ("m", line, f"row {line}", lines)) for line, lines in enumerate(videos, start=1)]
    with monitor(tmp_path, None, None, short[:2] + short + short):
        pass
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "fewer frames than asked, kept: m line 1 (row 1): a: why; b: why",
        "fewer frames than asked, kept: m line 3 (row 3): c: why",
        "4 videos gave fewer frames than asked; the first 3 are named above",
    ]


def test_a_failed_report_does_not_lose_later_reports(tmp_path, caplog):
    reported = []

    def report(step, metrics):
        if step == 1:
            raise RuntimeError("Tune is away")
        reported.append(step)

    with monitor(tmp_path, None, report, [("step", (1, 1.0, VALIDATED)), ("step", (2, 2.0, VALIDATED))]) as running:
        pass
    assert reported == [2]
    assert not running.stopped
    assert "the validation after step 1 could not be reported; the run goes on" in caplog.messages


def test_a_validation_names_its_kinds_but_not_hundreds(tmp_path, caplog):
    kinds = {
        f"validation/{name}/{kind}": value
        for kind in ("what?", "a\nb", *range(100))
        for name, value in (("accuracy", 0.5), ("count", 2.0))
    }
    with caplog.at_level(logging.INFO), monitor(tmp_path, None, None, [("step", (2, 2.0, VALIDATED | kinds))]):
        pass
    (line,) = [line for line in caplog.messages if "validation loss" in line]
    assert "accuracy 0.500 (8 questions)  what? 0.50 (2)  a\nb 0.50 (2)  0 0.50 (2)" in line
    assert line.endswith("17 0.50 (2)  and 82 more kinds")


def test_a_validation_tells_what_it_could_not_ask(tmp_path, caplog):
    some = VALIDATED | {"validation/unreadable": 3.0}
    nothing = METRICS | {"validation/loss": 0.0, "validation/count": 0.0, "validation/unreadable": 4.0}
    with caplog.at_level(logging.INFO), monitor(tmp_path, None, None, [("step", (2, 2.0, some))]):
        pass
    assert "step 2  validation loss 1.000  accuracy 0.500 (8 questions)  unreadable 3" in caplog.messages
    with caplog.at_level(logging.INFO), monitor(tmp_path, None, None, [("step", (4, 2.0, nothing))]):
        pass
    assert "step 4  validation loss 0.000  unreadable 4" in caplog.messages
    error = "the validation after step 4 has no accuracy: none of its 4 questions could be asked; quarantine.jsonl says"
    assert [line for line in caplog.messages if line.startswith(error)]


def test_workers_log_records_keep_level_rank_and_step(tmp_path, caplog):
    with monitor(tmp_path, None, None, [("log", (logging.ERROR, "100% of a step", 1, 7))]):
        pass
    (record,) = [record for record in caplog.records if record.message == "100% of a step"]
    assert (record.levelno, record.rank, record.step) == (logging.ERROR, 1, 7)


def test_a_monitor_whose_run_has_another_owner_records_nothing_more(tmp_path):
    record = Record()
    follower = monitor(tmp_path, record, None, [("step", (1, 1.0, METRICS))], [("unreadable", UNREADABLE)])

    def lost():
        raise LeaseLost("taken over")

    follower.job.fence.require_unless_recent = lost
    with follower:
        pass
    assert not record.calls
    assert not (tmp_path / QUARANTINE_FILE).exists()


def test_the_record_says_how_many_parameters_are_trained_by_how_many_workers(tmp_path):
    record = Record()
    monitor(tmp_path, record).handle([("started", (0, 1_000_000, 20_000, 2))])
    assert record.calls == [{"parameters": "1,000,000", "parameters_trained": "20,000", "workers": "2"}]


def test_sample_answers_are_in_the_folder_before_the_record_hears_of_them(tmp_path):
    answers = [{"row": 0, "kind": "colour", "question": "Which?", "reference": "red", "answer": "blue", "right": False}]
    record = Record()
    running = monitor(tmp_path, record)
    running.handle([("answers", (2, answers, {0: b"jpeg"}))])
    running.handle([("answers", (12, answers, {}))])
    assert record.calls == ["answered", "answered"]
    assert [row["step"] for row in run_folder.read_answers(str(tmp_path), most=9)] == [12, 2]
    (newest,) = run_folder.read_answers(str(tmp_path), most=1)
    assert newest == {"step": 12, **answers[0]}
    assert run_folder.list_pictures(str(tmp_path)) == {0: "row-00000000.jpg"}


def test_gauges_are_set_again_while_nothing_happens(tmp_path, monkeypatch):
    """Ray forgets those that are not: the age of a checkpoint would vanish 20 s after it."""
    exported = []
    monkeypatch.setattr(Gauge, "set", lambda gauge, value, tags: exported.append((gauge.info["name"], value, tags)))
    with monitor(tmp_path, None, None, [("sealed", (5, 1e9))]) as running:
        until = time.monotonic() + 30
        while exported.count(("crosslmm_checkpoint_timestamp_seconds", 1e9, {"run": "run"})) < 3:
            assert time.monotonic() < until
            time.sleep(0.1)
    assert running.last_metrics == {}
    assert exported.count(("crosslmm_total_steps", 4.0, {"run": "run"})) >= 3
