"""Clients of MLflow: several processes that use a new sqlite file at once."""

import os
import subprocess
import sys

from tests.support.common import ROOT

OPEN = """\
import sys, time
from mlflow.tracking import MlflowClient
from crosslmm.tracking.client import open_client
print("ready", flush=True)
sys.stdin.readline()
print(len(open_client(sys.argv[1]).search_experiments()))
"""


def test_first_runs_at_once_on_a_new_sqlite_file_do_not_meet(tmp_path):
    """They spell its path differently, and have temporary folders of their own, as processes of Ray's jobs may."""
    uris = [f"sqlite:///{tmp_path}/new.db", f"sqlite:///{os.path.relpath(tmp_path, ROOT)}/new.db"] * 2
    processes = []
    for number, uri in enumerate(uris):
        (tmp_path / f"{number}").mkdir()
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", OPEN, uri], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, env=os.environ | {"TMPDIR": f"{tmp_path}/{number}", "PYTHONPATH": str(ROOT)},
            )
        )  # fmt: skip
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    results = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(uris), [error[-500:] for _, error in results]
    assert {output for output, _ in results} == {"1\n"}
