"""Train a small model on this machine, from video to a score, as jobs on a Ray cluster. It takes about seven minutes.

    python jobs/demo.py

The demo starts a Ray cluster with token authentication, submits jobs/train.py to it, and then jobs/evaluate.py, which
loads the model that the first job has registered in MLflow, asks it about clips that it has not seen, and writes the
score on the version. The last line is one JSON object.
Exit status: 0 the model has learnt, 1 it has not, or a job failed, 2 an argument is refused, 130 stopped.
"""

import json
import os
import shlex
import sys
import time
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the folder `cluster` is not installed

from cluster.local.cluster import JobFailed, LocalCluster  # noqa: E402
from crosslmm.cli import CommandParser  # noqa: E402
from crosslmm.text import printable  # noqa: E402

STORAGE = ROOT / "runs"
HELD_OUT = STORAGE / "sample" / "held_out.jsonl"
SHARED = ("--storage", str(STORAGE), "--tracking.uri", f"sqlite:///{ROOT / 'mlflow.db'}")
MIN_ACCURACY = 0.85
"""Exact match on held-out clips above which the model counts as trained."""
EXAMPLES = 4
"""Number of questions and answers that are shown."""


def main() -> int:
    """Run the demo; return the exit status."""
    CommandParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter).parse_args()
    began = time.time()
    print("[1/3] starting a Ray cluster on this machine: about 15 seconds", flush=True)
    try:
        with LocalCluster(environment={"CROSSLMM_LOG_FORMAT": "%(message)s"}) as cluster:
            print("[2/3] training 1 M parameters on generated clips: about 4 minutes on two cores", flush=True)
            training = _run(cluster, "jobs/train.py", *SHARED)
            version = training["model_version"]
            print(f"[3/3] asking {version} about held-out clips: about 30 seconds", flush=True)
            scored = _run(cluster, "jobs/evaluate.py", "--model", version, "--manifest", str(HELD_OUT), *SHARED)
    except JobFailed as error:
        print(error, file=sys.stderr)
        return 1
    return _report(training, scored, began)


def _run(cluster: LocalCluster, *script: str) -> dict[str, Any]:
    """Submit a job, show what it prints, and return its last line: its result.

    Raises:
        JobFailed: it failed.
    """
    result: dict[str, Any] = {}
    command = cluster.submit("python", *script)
    print(f"      {shlex.join(['ray', *command[1:]])}", flush=True)
    for line in cluster.run(command, ROOT):
        if line.startswith('{"name"'):
            result = json.loads(line)
        else:
            print(f"      {line}", end="", flush=True)
    return result


def _report(training: dict[str, Any], scored: dict[str, Any], began: float) -> int:
    """Print some answers and the summary; return the exit status."""
    from crosslmm.data.samples.shapes import CHANCE

    lines = Path(scored["folder"], "answers.jsonl").read_text().splitlines()[:EXAMPLES]
    answers = [json.loads(line) for line in lines]
    for answer in answers:
        video = os.path.relpath(answer["videos"][0], ROOT)
        print(printable(f"{video}  {answer['question']}  {answer['prediction']}  (expected: {answer['expected']})"))
    question, video = answers[0]["question"], os.path.relpath(answers[0]["videos"][0], ROOT)
    print(f"""
done in {time.time() - began:.0f} s. Next:
  make ui       MLflow at http://127.0.0.1:5000: the run, its curves, the registered model with its score
  make sweep    search pooling stride, cross-attention depth and learning rates
  .venv/bin/python jobs/answer.py --video {video} --question "{question}"
""")
    by_kind = scored["by_group"]["kind"]
    learnt = scored["accuracy"]["value"] >= MIN_ACCURACY
    learnt &= all(by_kind[kind]["low"] > chance for kind, chance in CHANCE.items())
    if not learnt:
        print(f"error: accuracy is below {MIN_ACCURACY}, or no better than chance for some kind", file=sys.stderr)
    summary = {
        **{key: scored[key] for key in ("accuracy", "counts", "by_group", "page")},
        "chance_by_kind": {kind: round(chance, 4) for kind, chance in CHANCE.items()},
        "train_s": round(training["train_s"], 1),
        "total_s": round(time.time() - began, 1),
        "samples_per_s": round(training["samples"] / training["train_s"], 1),
        "run_id": training["run_id"],
        "evaluation_run_id": scored["run_id"],
        "model_uri": training["model_uri"],
        "model_version": training["model_version"],
    }
    print(json.dumps(summary))
    return 0 if learnt else 1


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
