"""The demo's exit status: what jobs/evaluate.py has scored decides."""

import json
import time

import pytest

from crosslmm.data.samples.shapes import CHANCE
from jobs.demo import _report

TRAINING = {"train_s": 200.0, "samples": 8000, "run_id": "r", "model_uri": "m@candidate", "model_version": "m/1"}


def scored(folder, value, **low):
    """The result of jobs/evaluate.py, with lower ends of the kinds' intervals."""
    answer = {"videos": [str(folder / "0.mp4")], "question": "Which?", "prediction": "red", "expected": "red"}
    (folder / "answers.jsonl").write_text(json.dumps(answer) + "\n")
    kinds = {kind: {"value": 0.9, "low": low.get(kind, 0.8), "high": 0.95} for kind in CHANCE}
    return {
        "folder": str(folder), "accuracy": {"value": value, "low": 0.8, "high": 1.0}, "counts": {}, "page": "",
        "by_group": {"kind": kinds}, "run_id": "e",
    }  # fmt: skip


@pytest.mark.parametrize(("value", "low", "status"), [(0.95, {}, 0), (0.8, {}, 1), (0.95, {"direction": 0.2}, 1)])
def test_exit_status_says_whether_the_model_has_learnt(tmp_path, capsys, value, low, status):
    assert _report(TRAINING, scored(tmp_path, value, **low), time.time()) == status
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["accuracy"]["value"] == value
    assert summary["evaluation_run_id"] == "e"
