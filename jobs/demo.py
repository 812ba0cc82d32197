"""The whole street on this machine: cluster, job, video, training, checkpoint, registry, answer.

python jobs/demo.py starts a Ray cluster with token authentication, submits jobs/train.py to it, loads the registered
model back, and asks it about clips that it was not trained on. The last line is one JSON object.
"""

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # `cluster` is beside this folder, and not installed

from cluster.local.cluster import LocalCluster  # noqa: E402

# How to query and stop the job: for those who submit one themselves, or whose job failed.
RAYS_OWN_LINE = re.compile(r"\b(cli|sdk|job_manager)\.py:\d+|^Running entrypoint")


def main() -> int:
    """Run the demo -> exit status."""
    began = time.time()
    arguments = ["--storage", str(ROOT / "runs"), "--tracking.uri", f"sqlite:///{ROOT / 'mlflow.db'}"]
    print("1  starting a Ray cluster with token authentication", flush=True)
    with LocalCluster() as cluster:
        command = cluster.submit("python", "jobs/train.py", *arguments)
        print(f"2  {shlex.join(['ray', *command[1:]])}", flush=True)
        outcome, status = _run(command, cluster.environment)
    if status or outcome is None:
        print(f"error: the job ended with status {status}", file=sys.stderr)
        return status or 1
    print(f"3  loading {outcome['model_uri']} back from the registry, and asking about the held-out clips", flush=True)
    return _report(began, outcome)


def _run(command: list[str], environment: dict[str, str]) -> tuple[dict | None, int]:
    """Run the job, showing what it prints -> the JSON object that it printed, and its exit status."""
    outcome, about_the_job = None, []
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith('{"name"'):
                outcome = json.loads(line)
            elif RAYS_OWN_LINE.search(line):
                about_the_job.append(line)
            else:
                print(f"   {line}", end="", flush=True)
    if process.returncode:
        print("".join(about_the_job), file=sys.stderr)
    return outcome, process.returncode


def _report(began: float, outcome: dict) -> int:
    """Score the registered model on the held-out clips and print the last line."""
    import pandas as pd
    from rich.console import Console
    from rich.table import Table

    from crosslmm.config import TrackingConfig
    from crosslmm.data.manifest import Manifest
    from crosslmm.data.samples.shapes import CHANCE
    from crosslmm.inference.answerer import score
    from crosslmm.tracking import load_registered

    loaded = load_registered(outcome["model_uri"], TrackingConfig(uri=f"sqlite:///{ROOT / 'mlflow.db'}"))
    manifest = Manifest(str(ROOT / "runs" / "sample" / "held_out.jsonl"))
    scored = score(lambda v, q: loaded.predict(pd.DataFrame({"video": v, "question": q})), manifest)
    table = Table("kind", "exact match", "chance")
    for kind, share in scored.accuracy_by_kind.items():
        table.add_row(kind, f"{share:.3f}", f"{CHANCE[kind]:.3f}")
    table.add_row("all", f"{scored.accuracy:.3f}", "")
    Console(highlight=False).print(table)
    video, question, answer, expected = scored.asked[0]
    print(f"   {Path(video).relative_to(ROOT)}: {question} {answer}")
    print("   make ui shows the run, its curves and the registered model")
    learnt = scored.accuracy >= 0.85 and all(s > 2 * CHANCE[kind] for kind, s in scored.accuracy_by_kind.items())
    if not learnt:
        print("error: the model did not learn: accuracy below 0.85, or a kind below twice its chance", file=sys.stderr)
    result = {
        "accuracy": round(scored.accuracy, 4),
        "accuracy_by_kind": {kind: round(share, 4) for kind, share in scored.accuracy_by_kind.items()},
        "chance_by_kind": {kind: round(share, 4) for kind, share in CHANCE.items()},
        "train_s": round(outcome["train_s"], 1),
        "total_s": round(time.time() - began, 1),
        "samples_per_s": round(outcome["samples"] / outcome["train_s"], 1),
        "run_id": outcome["run_id"],
        "model_uri": outcome["model_uri"],
        "question": question,
        "answer": answer,
        "expected": expected,
    }
    print(json.dumps(result))
    return 0 if learnt else 1


if __name__ == "__main__":
    raise SystemExit(main())
