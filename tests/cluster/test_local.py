"""What a local cluster shows of a job's output."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.local.cluster import LIBRARY_LINE, JobFailed, LocalCluster

OWN_LINES = [
    "run       first-try (the same command with --name first-try resumes it)",
    "step 1/500  loss 6.122  1 samples/s  5 frames/s  data wait 81%",
    "registered models:/crosslmm@candidate from run 0e02d0d9",
    "error: name: run first-try was begun with another configuration",
]
LIBRARY_LINES = [
    "2026-11-26 23:00:00,123\tINFO cli.py:39 -- Job submission server address: http://127.0.0.1:51981",
    "Running entrypoint for job raysubmit_1: python jobs/train.py",
    "\x1b[33m(raylet)\x1b[0m WARNING: 8 PYTHON worker processes have been started on node: cb50",
    "\x1b[36m(RayTrainWorker pid=12)\x1b[0m hello",
    "/venv/lib/python3.11/site-packages/x.py:12: FutureWarning: y is deprecated",
    "  warnings.warn(",
    "2026/11/27 00:00:00 INFO mlflow.store.db.utils: Creating initial MLflow database tables",
    "Successfully registered model 'crosslmm'.",
]


@pytest.mark.parametrize("line", OWN_LINES)
def test_lines_of_a_job_are_shown(line: str) -> None:
    assert not LIBRARY_LINE.search(line)


@pytest.mark.parametrize("line", LIBRARY_LINES)
def test_lines_of_libraries_are_left_out(line: str) -> None:
    assert LIBRARY_LINE.search(line)


def test_a_failed_job_shows_the_lines_of_libraries(tmp_path: Path) -> None:
    cluster: Any = SimpleNamespace(environment=dict(os.environ))
    code = f"print({OWN_LINES[1]!r}); print({LIBRARY_LINES[0]!r}); raise SystemExit(3)"
    lines = LocalCluster.run(cluster, [sys.executable, "-c", code], tmp_path)
    assert next(lines) == f"{OWN_LINES[1]}\n"
    with pytest.raises(JobFailed) as failure:
        list(lines)
    assert str(failure.value) == f"{LIBRARY_LINES[0]}\nerror: the job ended with status 3"
