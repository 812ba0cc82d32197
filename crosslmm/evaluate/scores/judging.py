"""Judges answers: what was chosen, whether it is right, and what all of them together score."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from crosslmm import scoring
from crosslmm.config import BadConfig
from crosslmm.data.video.frame_list import video_files
from crosslmm.evaluate.questions.benchmark import Benchmark
from crosslmm.evaluate.questions.question import Question
from crosslmm.evaluate.scores import intervals
from crosslmm.evaluate.scores.intervals import Estimate

Status = Literal["answered", "empty", "unparsable", "unreadable"]
"""What became of a question: an answer was found in the model's words; it said nothing; no answer was found in its
words; it could not be asked, for example because its video or its row cannot be read, or it is too long."""
STATUSES: tuple[Status, ...] = ("answered", "empty", "unparsable", "unreadable")

Scorer = Callable[[str, str, str], bool]
"""Takes question, expected answer and the model's answer; returns whether it is right."""


@dataclass(frozen=True)
class Reply:
    """What the model said to a question."""

    text: str = ""
    """Its words, or with `--likelihood` the most likely choice."""
    error: str | None = None
    """Why the question could not be asked; None if it was."""
    times: list[list[float]] = field(default_factory=list)
    """When each frame of each video appears [s]."""
    shortfalls: list[str] = field(default_factory=list)
    """Which videos gave fewer frames than asked, and why."""
    prompt_tokens: int = 0
    """Tokens of the prompt, those of the frames included."""
    new_tokens: int = 0
    """Tokens that were generated."""
    seconds: float = 0.0
    """Time of the model: this question's share of the time for its video and for its batch [s]."""
    likelihoods: dict[str, float] = field(default_factory=dict)
    """Log-likelihood of each choice, with `--likelihood`."""


@dataclass(frozen=True)
class Answer:
    """An answer with its judgement: a line of answers.jsonl."""

    number: int
    """Number of the question in its benchmark, from 0."""
    question: Question
    reply: Reply
    extracted: str
    """The answer that was found in the model's words; empty if there is none."""
    status: Status
    right: bool

    @property
    def cluster(self) -> str:
        """The file of the question's first video: questions about it are not independent."""
        videos = self.question.videos
        return video_files(videos[0])[0] if videos else f"question {self.number}"

    def line(self) -> dict[str, Any]:
        """Return the JSON object of the line."""
        question, reply = self.question, self.reply
        return {
            "number": self.number,
            "id": question.id,
            "videos": list(question.videos),
            "question": question.text,
            "options": list(question.options),
            "expected": question.answer,
            "prediction": reply.text,
            "extracted": self.extracted,
            "right": self.right,
            "status": self.status,
            "error": reply.error,
            "groups": [list(group) for group in question.groups],
            "frames": [len(times) for times in reply.times],
            "times": reply.times,
            "shortfalls": reply.shortfalls,
            "prompt_tokens": reply.prompt_tokens,
            "new_tokens": reply.new_tokens,
            "likelihoods": reply.likelihoods,
            "seconds": round(reply.seconds, 4),
        }


@dataclass(frozen=True)
class Score:
    """The score of a model on a benchmark."""

    accuracy: Estimate
    """Questions that could not be asked count as wrong."""
    counts: dict[Status, int]
    """Number of questions of each status."""
    by_group: dict[str, dict[str, Estimate]]
    """Key of a group -> its value -> accuracy."""

    @property
    def questions(self) -> int:
        """Number of all questions."""
        return sum(self.counts.values())

    @property
    def unreadable(self) -> float:
        """Share of questions that could not be asked."""
        return self.counts["unreadable"] / self.questions

    def as_json(self) -> dict[str, Any]:
        """Return the score as plain values."""
        return asdict(self)


def load_scorer(name: str | None) -> Scorer | None:
    """Import a scorer.

    Args:
        name: MODULE:FUNCTION.

    Raises:
        BadConfig: there is no such function.
    """
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        scorer = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise BadConfig(f"--scorer {name}: {error}") from None
    if not callable(scorer):
        raise BadConfig(f"--scorer {name}: is not a function")
    return scorer


def judge(number: int, question: Question, reply: Reply, benchmark: Benchmark, scorer: Scorer | None = None) -> Answer:
    """Judge a reply.

    Args:
        number: of the question.
        question: what was asked.
        reply: what the model said.
        benchmark: how the answer is extracted.
        scorer: decides whether an answer is right, instead of the benchmark.
    """
    if reply.error is not None:
        return Answer(number, question, reply, "", "unreadable", right=False)
    if not reply.text.strip():
        return Answer(number, question, reply, "", "empty", right=False)
    extracted = reply.text
    if benchmark.extract and not reply.likelihoods:
        extracted = benchmark.extract(reply.text, question)
    if not extracted:
        return Answer(number, question, reply, "", "unparsable", right=False)
    if scorer:
        right = bool(scorer(question.text, question.answer, extracted))
    elif benchmark.extract is None:
        right = scoring.is_right(extracted, question.answer)
    else:
        right = extracted == question.answer
    return Answer(number, question, reply, extracted, "answered", right)


def score(answers: Sequence[Answer], benchmark: Benchmark) -> Score:
    """Add up judged answers."""
    units = Units(answers, benchmark)
    return Score(
        accuracy=intervals.accuracy(units.right, units.clusters, units.strata),
        counts={status: sum(answer.status == status for answer in answers) for status in STATUSES},
        by_group={
            key: {value: _accuracy_of(units, (key, value)) for value in sorted(values)}
            for key, values in units.groups.items()
        },
    )


def compare(answers: Sequence[Answer], others: Sequence[Answer], benchmark: Benchmark) -> Estimate:
    """Return the mean difference in accuracy between two models' answers to the same questions, in the same order."""
    units, other_units = Units(answers, benchmark), Units(others, benchmark)
    return intervals.difference(units.right, other_units.right, units.clusters, units.strata)


class Units:
    """What a score counts: questions, or all questions of a unit together.

    Attributes:
        right: of each unit.
        clusters: video of each unit.
        strata: group of each unit whose accuracies are averaged; None if there are none.
        groups: key -> values.
    """

    def __init__(self, answers: Sequence[Answer], benchmark: Benchmark) -> None:
        members: dict[str, list[Answer]] = {}
        for answer in answers:
            members.setdefault(answer.question.unit or f"\0{answer.number}", []).append(answer)
        first = [unit[0] for unit in members.values()]
        tries = benchmark.tries
        self.right = [len(unit) == tries and all(a.right for a in unit) for unit in members.values()]
        self.clusters = [answer.cluster for answer in first]
        self.of_groups = [set(answer.question.groups) for answer in first]
        key = benchmark.mean_of
        self.strata = [dict(answer.question.groups).get(key, "") for answer in first] if key else None
        self.groups: dict[str, set[str]] = {}
        for answer in first:
            for key, value in answer.question.groups:
                self.groups.setdefault(key, set()).add(value)


def _accuracy_of(units: Units, group: tuple[str, str]) -> Estimate:
    members = [i for i, groups in enumerate(units.of_groups) if group in groups]
    return intervals.accuracy([units.right[i] for i in members], [units.clusters[i] for i in members])
