"""The state of each trial, as one small JSON file in the sweep's folder: resume, report and promotion read these."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from crosslmm import storage
from crosslmm.run_folder import TRIALS_FOLDER

Point = dict[str, Any]
"""Dotted key of the configuration -> value, without keys that a condition excludes."""

State = Literal["running", "finished", "stopped early", "out of budget", "failed"]


class Validation(NamedTuple):
    """One validation of a trial."""

    step: int
    loss: float
    accuracy: float
    asked: int = 0
    """Questions that the accuracy is a share of; 0 in files of earlier versions."""


@dataclass
class Trial:
    """One training run of a sweep."""

    number: int
    """Counted from 0, in the order of creation."""
    point: Point
    """The searched values."""
    settings: Point
    """Everything that differs from the sweep's configuration: the point, and values that follow from it."""
    tokens_per_frame: int
    """Pooled tokens per frame that go through the decoder."""
    macs: int
    """Prefill of one sample without the vision encoder, attention products included [MACs]."""
    encoder_macs: int
    """Vision encoder, for the same sample [MACs]."""
    memory_bytes: int
    """Peak memory of a worker in training, as the planner predicts it [bytes]."""
    state: State = "running"
    curve: list[Validation] = field(default_factory=list)
    seconds: float = 0.0
    """Wall clock over all starts [s]; the time between the last event and a kill is not counted."""
    train_s: float | None = None
    """Time from the first step's start to the last step's end in the last start [s]; None until it finishes."""
    error: str | None = None
    """First cause of a failure."""
    run_id: str | None = None
    """Id of its MLflow run."""

    @property
    def name(self) -> str:
        """Name of its run. The digest keeps a trial with another point and the same number from resuming its
        checkpoints."""
        return f"{self.number:03d}-{hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:8]}"

    @property
    def title(self) -> str:
        """Its point in few words, "pool_stride 4, v2v 0.000123"; the whole key where its last part is ambiguous."""
        ends = [path.rpartition(".")[2] for path in self.point]
        return ", ".join(
            f"{end if ends.count(end) == 1 else path} {f'{value:.3g}' if isinstance(value, float) else value}"
            for end, (path, value) in zip(ends, self.point.items(), strict=True)
        )

    @property
    def last(self) -> Validation | None:
        """Latest validation."""
        return self.curve[-1] if self.curve else None


def to_json(trial: Trial) -> str:
    """Serialise a trial."""
    return json.dumps(asdict(trial))


def from_json(text: str | bytes) -> Trial:
    """Deserialise a trial."""
    values = json.loads(text)
    return Trial(**values | {"curve": [Validation(*rung) for rung in values["curve"]]})


def write(folder: str, trial: Trial) -> None:
    """Write a trial's file."""
    uri = storage.join(storage.join(folder, TRIALS_FOLDER), f"{trial.number:03d}.json")
    storage.write_bytes(uri, to_json(trial).encode())


def read(folder: str) -> list[Trial]:
    """Read all trials of a sweep's folder, ordered by number."""
    files = storage.join(folder, TRIALS_FOLDER)
    trials = [
        from_json(storage.read_bytes(storage.join(files, name)))
        for name in storage.names_in(files)
        if name.endswith(".json")  # a kill during a write leaves a partial file with another suffix
    ]
    return sorted(trials, key=lambda trial: trial.number)


def finished(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that took all their steps, the only ones whose accuracies are comparable."""
    return [trial for trial in trials if trial.state == "finished" and trial.last]


def best(trials: Sequence[Trial]) -> Trial | None:
    """Return the most accurate finished trial; ties go to the lower loss, then to the lower cost."""
    return max(finished(trials), key=_rank, default=None)


def front(trials: Sequence[Trial]) -> list[Trial]:
    """Return the Pareto front of accuracy against prefill MACs: finished trials that no other beats in both, cheapest
    first."""
    on_front: list[Trial] = []
    for trial in sorted(finished(trials), key=lambda t: (t.macs, [-rank for rank in _rank(t)])):
        if not on_front or _accuracy(trial) > _accuracy(on_front[-1]):
            on_front.append(trial)
    return on_front


def knee(trials: Sequence[Trial]) -> Trial | None:
    """Return the trial where more compute stops paying: the point of the front farthest above the line between its
    ends.

    The axis of compute is logarithmic.
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
