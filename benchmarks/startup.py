"""Startup time of a run from command to first step, by part, and CPU time by role, observed from outside.

Part of `python -m benchmarks.train`; `python -m benchmarks.startup` prints the parts of one start.
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

POLL_S = 0.1
"""Interval at which processes are listed [s]."""
PARTS = {
    "driver: imports until Ray starts": ("gcs_server", None),
    "Ray's processes, the driver's checks, the record": ("TrainController", None),
    "controller: imports, room for the workers": ("RayTrainWorker", None),
    "worker processes": ("RayTrainWorker", "init_train_context"),
    "workers: imports, process group": ("SplitCoordinator", None),
    "model built, first batch": (None, None),
}
"""Parts of the start. Each ends when the last process with this word in its title starts, or runs this method."""
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
"""Role of a process, by a word in its titles; all other processes count as Ray's."""


@dataclass
class Process:
    """One process of a run."""

    started_s: float
    """Time since the command [s]."""
    titles: dict[str, float]
    """Titles that it had, and when each was first seen [s]."""
    cpu: list[tuple[float, float]]
    """(time, CPU time used until then) [s]."""

    def role(self) -> str:
        """Return the role that its CPU time counts for."""
        return next((role for word, role in ROLES.items() if any(word in title for title in self.titles)), "Ray")

    def used(self, until: float) -> float:
        """Return its CPU time until the time `until` [s]."""
        return max((cpu for when, cpu in self.cpu if when <= until), default=0.0)


def observe(command: list[str], environment: dict[str, str]) -> tuple[float, list[Process]]:
    """Run a command to its end; return the unix time of its start, and all its processes."""
    began = time.time()
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    root, seen = psutil.Process(run.pid), dict[psutil.Process, Process]()
    while run.poll() is None:
        for process in [root, *root.children(recursive=True)]:
            try:
                title, times, now = " ".join(process.cmdline()), process.cpu_times(), time.time() - began
                entry = seen.setdefault(process, Process(process.create_time() - began, {}, []))
            except psutil.Error:  # just ended
                continue
            entry.titles.setdefault(title, now)
            entry.cpu.append((now, times.user + times.system))
        time.sleep(POLL_S)
    if run.returncode:
        raise SystemExit(f"the run failed:\n{run.communicate()[0]}")
    return began, list(seen.values())


def start(folder: Path) -> dict[str, Any]:
    """Run two steps of the `tiny` preset from cold; return startup time, its parts, and CPU time by role [s].

    Args:
        folder: gets sample data, if it has none.
    """
    if not (folder / "sample").exists():
        write_sample_set(str(folder / "sample"), train=64, held_out=16)
    with tempfile.TemporaryDirectory(dir=folder) as runs:
        command = [
            *(sys.executable, "jobs/train.py", "--config", "tiny", "--name", "start", "--storage", runs),
            *("--data.manifest", str(folder / "sample" / "train.jsonl"), "--tracking.uri", f"sqlite:///{runs}/mlflow.db"),
            *("--train.max_steps", "2", "--train.epochs", "1"),
        ]  # fmt: skip
        # Without RAY_ADDRESS the run starts a new cluster.
        began, processes = observe(command, {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"})
        history = min((Path(runs) / "start" / "history").glob("*.jsonl"))
        first = json.loads(history.read_text().splitlines()[0])
    startup = first["time"] - began
    ends = [_moment(processes, *until) for until in PARTS.values()]
    step = first["metrics"]["step_s"]
    ends[-1] = startup - step
    parts = {name: end - before for name, before, end in zip(PARTS, [0.0, *ends], ends, strict=False)}
    cpu: dict[str, float] = defaultdict(float)
    for process in processes:
        cpu[process.role()] += process.used(startup)
    return {"startup_s": startup, "parts": {**parts, "first step": step}, "cpu_s": dict(cpu)}


def _moment(processes: list[Process], word: str | None, method: str | None) -> float:
    """Return when the last process with `word` in its title started, or first ran `method` [s]."""
    if word is None:
        return 0.0
    matches = [process for process in processes if any(word in title for title in process.titles)]
    if method is None:
        return max(process.started_s for process in matches)
    return max(when for process in matches for title, when in process.titles.items() if method in title)


def main() -> None:
    """Measure one start and print it."""
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(start(Path(folder)), indent=2))


if __name__ == "__main__":
    main()
