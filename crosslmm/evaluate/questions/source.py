"""Where the questions of an evaluation come from: a benchmark's folder, or a manifest."""

import re
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from crosslmm.config import BadConfig
from crosslmm.data.manifest import Manifest
from crosslmm.evaluate.benchmarks import BENCHMARKS
from crosslmm.evaluate.questions.benchmark import Benchmark
from crosslmm.evaluate.questions.folder import Folder
from crosslmm.evaluate.questions.manifest import MANIFEST, read_manifest
from crosslmm.evaluate.questions.question import BadBenchmark, Question
from crosslmm.evaluate.settings import EvaluationSettings

MAX_QUESTIONS = 200_000
"""Most questions of an evaluation; each process holds them all."""
MAX_LISTED = 50
"""Groups that an error lists."""


@dataclass(frozen=True)
class Source:
    """Questions, and where they come from."""

    label: str
    """Name of what is scored: videomme, videomme.duration-long.128-frames; of a manifest, its file's name."""
    questions: list[Question]
    benchmark: Benchmark
    uri: str
    """Folder or manifest."""
    digest: str
    """SHA-256 [hex] of the tables and subtitles, or of the manifest."""
    roots: list[str]
    """Folders that videos may lie in."""


def read_source(settings: EvaluationSettings) -> Source:
    """Read the questions that are to be asked.

    Raises:
        BadConfig, BadBenchmark, BadManifest: naming what is wrong.
    """
    source = _read_manifest(settings) if settings.manifest else _read_benchmark(settings)
    seen: set[str] = set()
    for question in source.questions:
        if question.id in seen:
            raise BadBenchmark(f"{source.uri}: two questions have the id {question.id!a}")
        seen.add(question.id)
    questions = _selected(source.questions, settings)[: settings.limit]
    return replace(source, label=_label(source.label, settings), questions=questions)


def _label(name: str, settings: EvaluationSettings) -> str:
    """Return the score's name. Scores that cannot be compared have different ones."""
    parts = [
        name,
        settings.only,
        f"first-{settings.limit}" if settings.limit else None,
        f"{settings.num_frames}-frames" if settings.num_frames else None,
        "likelihood" if settings.likelihood else None,
        settings.scorer,
    ]
    return ".".join(re.sub(r"[^\w-]+", "-", part)[:60] for part in parts if part)


def _read_manifest(settings: EvaluationSettings) -> Source:
    manifest = Manifest(str(settings.manifest), settings.roots)
    most = min(settings.limit or MAX_QUESTIONS + 1, MAX_QUESTIONS + 1) if settings.only is None else MAX_QUESTIONS + 1
    questions = read_manifest(manifest, most)
    if len(questions) > MAX_QUESTIONS:
        raise BadConfig(f"--manifest {settings.manifest}: has more than {MAX_QUESTIONS} questions; give --limit")
    name = PurePosixPath(manifest.uri).stem
    return Source(name, questions, MANIFEST, manifest.uri, manifest.digest, manifest.roots)


def _read_benchmark(settings: EvaluationSettings) -> Source:
    if settings.benchmark not in BENCHMARKS:
        raise BadConfig(f"--benchmark {settings.benchmark}: there is none; there are {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[settings.benchmark]
    folder = Folder(str(settings.data), settings.roots)
    questions = benchmark.read(folder)
    return Source(benchmark.name, questions, benchmark, folder.uri, folder.digest, folder.roots)


def _selected(questions: list[Question], settings: EvaluationSettings) -> list[Question]:
    """Return the questions of the group that --only names."""
    if settings.only is None:
        return questions
    key, _, value = settings.only.partition("=")
    selected = [question for question in questions if (key, value) in question.groups]
    if not selected:
        groups = sorted({f"{k}={v}" for question in questions for k, v in question.groups})
        more = f" and {len(groups) - MAX_LISTED} more" if len(groups) > MAX_LISTED else ""
        listed = ", ".join(groups[:MAX_LISTED]) or "none at all"
        raise BadConfig(f"--only {settings.only}: there is no such group; there are {listed}{more}")
    return selected
