"""What is known of each trial of a sweep, kept as one small JSON file each: what resume, report and promotion read."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from crosslmm import storage

KEPT = "trials"

Point = dict[str, Any]
"""Dotted path of the configuration -> value; paths that a condition leaves out are not in it."""

State = Literal["running", "finished", "stopped early", "out of budget", "failed"]


class Rung(NamedTuple):
    """A validation on a trial's way."""

    step: int
    loss: float
    accuracy: float


@dataclass
class Trial:
    """One training run of a sweep."""

    number: int
    """From 0, in the order in which they were asked for."""
    point: Point
    """What was searched."""
    settings: Point
    """All that differs from the sweep's configuration: the point, and what follows from it."""
    tokens_per_frame: int
    """Pooled tokens of a frame that pass through the decoder."""
    macs: int
    """Of one sample's prefill behind the vision encoder, attention products included [MACs]."""
    encoder_macs: int
    """Of the vision encoder for the same sample [MACs]."""
    memory_bytes: int
    """A worker's peak in training, by the planner."""
    state: State = "running"
    curve: list[Rung] = field(default_factory=list)
    seconds: float = 0.0
    """Wall clock from its start to its end, over all starts; what passed after its last news before a kill is not in
    it."""
    train_s: float | None = None
    """Of a finished one, from its first step's start to its last step's end in its last start [s]."""
    error: str | None = None
    """The first cause, where it failed."""
    run_id: str | None = None
    """Of its MLflow run."""

    @property
    def name(self) -> str:
        """Of its run. The digest keeps another point under the same number out of this one's checkpoints."""
        return f"{self.number:03d}-{hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:8]}"

    @property
    def last(self) -> Rung | None:
        """Where it stands, or ended."""
        return self.curve[-1] if self.curve else None


def to_json(trial: Trial) -> str:
    """What `from_json` reads."""
    return json.dumps(asdict(trial))


def from_json(text: str | bytes) -> Trial:
    """A trial as it was."""
    values = json.loads(text)
    return Trial(**values | {"curve": [Rung(*rung) for rung in values["curve"]]})


def write(folder: str, trial: Trial) -> None:
    """Keep a trial in the sweep's folder."""
    uri = storage.join(storage.join(folder, KEPT), f"{trial.number:03d}.json")
    storage.write_bytes(uri, to_json(trial).encode())


def read(folder: str) -> list[Trial]:
    """The trials that a sweep's folder holds, by number."""
    kept_in = storage.join(folder, KEPT)
    kept = [
        from_json(storage.read_bytes(storage.join(kept_in, name)))
        for name in storage.names_in(kept_in)
        if name.endswith(".json")
    ]  # a kill while one was written leaves a part of it
    return sorted(kept, key=lambda trial: trial.number)


def finished(trials: Sequence[Trial]) -> list[Trial]:
    """Those that took all their steps: the only ones whose accuracies may be compared."""
    return [trial for trial in trials if trial.state == "finished" and trial.last]


def best(trials: Sequence[Trial]) -> Trial | None:
    """The most accurate finished trial; of equals the one with the lower loss, then the cheaper one."""
    return max(finished(trials), key=_rank, default=None)


def front(trials: Sequence[Trial]) -> list[Trial]:
    """The Pareto front of accuracy against prefill MACs: finished trials that none beats in both, cheapest first."""
    on_front: list[Trial] = []
    for trial in sorted(finished(trials), key=lambda t: (t.macs, [-rank for rank in _rank(t)])):
        if not on_front or _accuracy(trial) > _accuracy(on_front[-1]):
            on_front.append(trial)
    return on_front


def knee(trials: Sequence[Trial]) -> Trial | None:
    """Where more compute stops paying: of the front, the trial farthest above the line between its ends.

    Compute is taken by its logarithm: each doubling is as wide as the next.
    """
    on_front = front(trials)
    if len(on_front) < 3:
        return on_front[-1] if on_front else None
    x = np.log([trial.macs for trial in on_front])
    y = np.array([_accuracy(trial) for trial in on_front])
    above = (y - y[0]) / (y[-1] - y[0]) - (x - x[0]) / (x[-1] - x[0])
    return on_front[int(above.argmax())]


def _accuracy(trial: Trial) -> float:
    assert trial.last
    return trial.last.accuracy


def _rank(trial: Trial) -> tuple[float, float, int]:
    assert trial.last
    return trial.last.accuracy, -trial.last.loss, -trial.macs
