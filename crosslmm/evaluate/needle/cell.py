"""A cell of the heat map."""

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ScoredAnswer:
    """A question about needles, and the model's answer."""

    question: str
    answer: str
    expected: str
    right: bool


@dataclass(frozen=True)
class Cell:
    """All questions about needles at one depth of videos of one length."""

    frames: int
    depth: float
    """Of the first needle [%]."""
    hops: int
    answers: list[ScoredAnswer]
    seconds: float
    """Per question, the encoding of the haystack left out [s]."""
    memory_bytes: int
    """Largest memory of the process, or of the GPU."""
    error: str | None
    """Why nothing was asked: the video is longer than the decoder's context."""

    @property
    def share(self) -> float:
        """Share of right answers."""
        return sum(answer.right for answer in self.answers) / len(self.answers)

    def __str__(self) -> str:
        what = f"{self.frames:,} frames, depth {self.depth:g} %, hops {self.hops}"
        if not self.answers:
            return f"{what}: {self.error}"
        return f"{what}: {self.share:.2f}, {self.seconds:.1f} s, {self.memory_bytes / 1e9:.2f} GB"

    def line(self) -> dict[str, Any]:
        """Return the cell without its answers."""
        right = sum(answer.right for answer in self.answers)
        values = {key: value for key, value in asdict(self).items() if key != "answers"}
        return values | {"right": right, "asked": len(self.answers)}

    def to_json(self) -> bytes:
        """Return the content of the cell's file."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Cell":
        """Return what `to_json` wrote."""
        values = json.loads(data)
        answers = values.pop("answers", None) or values.pop("found", [])  # the name in files of earlier versions
        return cls(**values, answers=[ScoredAnswer(**answer) for answer in answers])
