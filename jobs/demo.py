"""Train a small model on this machine, from video to answers, as a job on a Ray cluster. It takes about five minutes.

    python jobs/demo.py

The demo starts a Ray cluster with token authentication, submits jobs/train.py to it, loads the model that the job has
registered in MLflow, and asks it about clips that it has not seen. The last line is one JSON object.
Exit status: 0 the model has learnt, 1 it has not, or the job failed, 130 stopped.
"""

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the folder `cluster` is not installed

from cluster.local.cluster import JobFailed, LocalCluster  # noqa: E402
from crosslmm.text import printable  # noqa: E402

TRACKING_URI = f"sqlite:///{ROOT / 'mlflow.db'}"
MIN_ACCURACY = 0.85
"""Exact match on held-out clips above which the model counts as trained."""
EXAMPLES = 4
"""Number of questions and answers that are shown."""


def main() -> int:
    """Run the demo; return the exit status."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    began = time.time()
    print("[1/3] starting a Ray cluster on this machine: about 15 seconds", flush=True)
    with LocalCluster(environment={"CROSSLMM_LOG_FORMAT": "%(message)s"}) as cluster:
        print("[2/3] training 1 M parameters on generated clips: about 4 minutes on two cores", flush=True)
        command = cluster.submit(
            "python", "jobs/train.py", "--storage", str(ROOT / "runs"), "--tracking.uri", TRACKING_URI
        )
        print(f"      {shlex.join(['ray', *command[1:]])}", flush=True)
        try:
            for line in cluster.run(command, ROOT):
                if line.startswith('{"name"'):
                    training = json.loads(line)
                else:
                    print(f"      {line}", end="", flush=True)
        except JobFailed as error:
            print(error, file=sys.stderr)
            return 1
    print(f"[3/3] loading {training['model_uri']} and asking it about held-out clips: about 20 seconds", flush=True)
    return _report(training, began)


def _report(training: dict, began: float) -> int:
    """Score the registered model on the held-out clips and print the summary; return the exit status."""
    import rich
    from rich.table import Table

    from crosslmm.config import TrackingConfig
    from crosslmm.data.manifest import Manifest
    from crosslmm.data.samples.shapes import CHANCE
    from crosslmm.inference.evaluate import evaluate
    from crosslmm.tracking import load_answerer, quiet_mlflow

    quiet_mlflow()
    manifest = Manifest(str(ROOT / "runs" / "sample" / "held_out.jsonl"))
    evaluation = evaluate(load_answerer(training["model_uri"], TrackingConfig(uri=TRACKING_URI)), manifest)
    score, first = evaluation.score, evaluation.answers[0]
    table = Table("kind of question", "accuracy", "n", "chance")
    for kind, accuracy in score.by_kind.items():
        table.add_row(kind, f"{accuracy.share:.3f}", str(accuracy.asked), f"{CHANCE[kind]:.3f}")
    table.add_row("all", f"{score.overall.share:.3f}", str(score.overall.asked), "")
    rich.get_console().print(table)
    for one in evaluation.answers[:EXAMPLES]:
        video = os.path.relpath(one.videos[0], ROOT)
        print(printable(f"{video}  {one.question}  {one.answer}  (expected: {one.expected})"))
    print(f"""
done in {time.time() - began:.0f} s. Next:
  make ui       MLflow at http://127.0.0.1:5000: the run, its curves, the registered model
  make sweep    search pooling stride, cross-attention depth and learning rates
  .venv/bin/python jobs/answer.py --video {os.path.relpath(first.videos[0], ROOT)} --question "{first.question}"
""")
    learnt = score.overall.share >= MIN_ACCURACY
    learnt &= all(accuracy.share > 2 * CHANCE[kind] for kind, accuracy in score.by_kind.items())
    if not learnt:
        print(f"error: accuracy is below {MIN_ACCURACY}, or below twice the chance for some kind", file=sys.stderr)
    summary = {
        **score.to_json(),
        "chance_by_kind": {kind: round(chance, 4) for kind, chance in CHANCE.items()},
        "train_s": round(training["train_s"], 1),
        "total_s": round(time.time() - began, 1),
        "samples_per_s": round(training["samples"] / training["train_s"], 1),
        "run_id": training["run_id"],
        "model_uri": training["model_uri"],
        "model_version": training["model_version"],
        "question": first.question,
        "answer": first.answer,
        "expected": first.expected,
    }
    print(json.dumps(summary))
    return 0 if learnt else 1


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
