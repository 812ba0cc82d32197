"""Where the seconds go from a command to its first step, seen from outside: when each process came, and what it used.

A part of `python -m benchmarks.train`; alone, `python -m benchmarks.startup` prints the parts of one start.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from crosslmm.data.samples.shapes import write_sample_set

LOOK_EVERY_S = 0.1
PARTS = {
    "driver: imports until Ray starts": ("gcs_server", None),
    "Ray's processes, the driver's checks, the record": ("TrainController", None),
    "controller: imports, room for the workers": ("RayTrainWorker", None),
    "worker processes": ("RayTrainWorker", "init_train_context"),
    "workers: imports, process group": ("SplitCoordinator", None),
    "model built, first batch": (None, None),
}
"""What goes on until a process comes, or until its title names a method."""
ROLES = {
    "jobs/train.py": "driver",
    "TrainController": "controller",
    "RayTrainWorker": "workers",
    "SplitCoordinator": "data",
    "BlockNumbers": "data",
    "ReadSamples": "data",
    "DatasetManager": "data",
    "multiprocessing": "data",
}
"""Whose CPU time a process's is, by a word in its titles; all others are Ray's."""


@dataclass
class Process:
    """One process of a run."""

    came_s: float
    """After the command."""
    titles: dict[str, float]
    """Each that it had, and when first [s]."""
    cpu: list[tuple[float, float]]
    """When, and how much CPU time it had used by then [s]."""

    def role(self) -> str:
        """Whose CPU time its is."""
        return next((role for word, role in ROLES.items() if any(word in title for title in self.titles)), "Ray")

    def used(self, until: float) -> float:
        """CPU time until then [s]."""
        return max((cpu for when, cpu in self.cpu if when <= until), default=0.0)


def observe(command: list[str], environment: dict[str, str]) -> tuple[float, list[Process]]:
    """Run a command to its end -> the unix time at which it began, and all processes below it."""
    began = time.time()
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    root, seen = psutil.Process(run.pid), dict[psutil.Process, Process]()
    while run.poll() is None:
        for process in [root, *root.children(recursive=True)]:
            try:
                title, times, now = " ".join(process.cmdline()), process.cpu_times(), time.time() - began
                known = seen.setdefault(process, Process(process.create_time() - began, {}, []))
            except psutil.Error:  # it has just ended
                continue
            known.titles.setdefault(title, now)
            known.cpu.append((now, times.user + times.system))
        time.sleep(LOOK_EVERY_S)
    if run.returncode:
        raise SystemExit(f"the run failed:\n{run.communicate()[0]}")
    return began, list(seen.values())


def start(folder: Path) -> dict[str, Any]:
    """One run of the `tiny` preset from cold, to its first step: seconds in all, by part, and CPU seconds by role.

    Args:
        folder: where sample data is, or will be written.
    """
    if not (folder / "sample").exists():
        write_sample_set(str(folder / "sample"), train=64, held_out=16)
    with tempfile.TemporaryDirectory(dir=folder) as runs:
        command = [
            *(sys.executable, "jobs/train.py", "--config", "tiny", "--name", "start", "--storage", runs),
            *("--data.manifest", str(folder / "sample" / "train.jsonl"), "--tracking.uri", f"sqlite:///{runs}/mlflow.db"),
            *("--train.max_steps", "2", "--train.epochs", "1"),
        ]  # fmt: skip
        hidden = {"RAY_ADDRESS"}  # a cluster of its own
        began, processes = observe(command, {k: v for k, v in os.environ.items() if k not in hidden})
        history = min((Path(runs) / "start" / "history").glob("*.jsonl"))
        first = json.loads(history.read_text().splitlines()[0])
    whole = first["time"] - began
    ends = [_moment(processes, *until) for until in PARTS.values()]
    step = first["metrics"]["step_s"]
    ends[-1] = whole - step
    parts = {name: end - before for name, before, end in zip(PARTS, [0.0, *ends], ends, strict=False)}
    cpu: dict[str, float] = defaultdict(float)
    for process in processes:
        cpu[process.role()] += process.used(whole)
    return {"startup_s": whole, "parts": {**parts, "first step": step}, "cpu_s": dict(cpu)}


def _moment(processes: list[Process], word: str | None, method: str | None) -> float:
    """When the last process of a kind came, or had first done something [s]."""
    if word is None:
        return 0.0
    found = [process for process in processes if any(word in title for title in process.titles)]
    if method is None:
        return max(process.came_s for process in found)
    return max(when for process in found for title, when in process.titles.items() if method in title)


def main() -> None:
    """Print one start."""
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(start(Path(folder)), indent=2))


if __name__ == "__main__":
    main()
