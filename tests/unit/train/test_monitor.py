"""What a run's driver does with the news of its workers."""

from types import SimpleNamespace

import pytest
from rich.console import Console

from crosslmm.train.monitor import TrainingMonitor

METRICS = {"samples_per_s": 1.0, "frames_per_s": 4.0, "data_wait_share": 0.0, "loss": 2.0}
VALIDATED = METRICS | {"validation/loss": 1.0, "validation/accuracy": 0.5}


def follower(folder, record, report):
    job = SimpleNamespace(total_steps=4, folder=str(folder))
    return TrainingMonitor(job, record, Console(quiet=True), report)


def test_a_validation_is_reported_when_the_record_has_it(tmp_path):
    events = []
    record = SimpleNamespace(
        log=lambda steps: events.append([step for step, _, _ in steps]), settle=lambda seconds: events.append("settled")
    )
    follows = follower(tmp_path, record, lambda step, metrics: events.append((step, metrics["validation/loss"])))
    follows._take_steps([(1, 1.0, METRICS), (2, 2.0, VALIDATED), (3, 3.0, METRICS)])
    assert events == [[1, 2, 3], "settled", (2, 1.0)]
    assert not follows.stopped


def test_a_run_that_is_stopped_by_who_is_reported_to_has_not_failed(tmp_path):
    def stop(step, metrics):
        raise SystemExit(0)

    follows = follower(tmp_path, SimpleNamespace(log=lambda steps: None, settle=lambda seconds: None), stop)
    with pytest.raises(SystemExit):
        follows._take_steps([(2, 2.0, VALIDATED)])
    assert follows.stopped
