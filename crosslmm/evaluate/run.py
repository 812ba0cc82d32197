"""The evaluation job: reads the questions, asks the model, scores, compares, records and promotes."""

import hashlib
import json
import logging
import os
import time
from dataclasses import asdict, dataclass
from typing import Any

from crosslmm import storage
from crosslmm.config import BadConfig
from crosslmm.evaluate import record, report
from crosslmm.evaluate.asking.model_files import ModelFiles, fetch_model
from crosslmm.evaluate.asking.pipeline import EvaluationFailed, Job, ask_all
from crosslmm.evaluate.evaluated import ModelEvaluation
from crosslmm.evaluate.evaluation_folder import EvaluationFolder
from crosslmm.evaluate.questions.source import Source, read_source
from crosslmm.evaluate.scores.intervals import Estimate
from crosslmm.evaluate.scores.judging import Scorer, compare, judge, load_scorer, score
from crosslmm.evaluate.settings import AnswerSettings, EvaluationSettings, Overrides
from crosslmm.preflight import connect
from crosslmm.preflight.resolve import require_durable
from crosslmm.text import safe_name
from crosslmm.tracking.versions import find_alias, find_version

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationResult:
    """Result of an evaluation; the last line of jobs/evaluate.py."""

    name: str
    folder: str
    benchmark: str
    """Benchmark or manifest, and what was chosen of it."""
    model: str
    """Version or folder of the model."""
    data_sha256: str
    questions: int
    asked: int
    """Questions that this start has asked; earlier starts asked the others."""
    questions_per_s: float | None
    """Their rate from the end of the first block to that of the last one, so without start-up [1/s]."""
    accuracy: dict[str, Any] | None
    """`value`, `low`, `high`, `count`, `clusters`; None if too many questions could not be asked."""
    counts: dict[str, int]
    """Questions by status."""
    by_group: dict[str, dict[str, Any]]
    """Key of a group -> its value -> accuracy."""
    against: dict[str, Any] | None
    """`model`, its `accuracy`, and the paired `difference` to it."""
    promoted: bool | None
    """Whether this version has the alias of --promote now; None without --promote."""
    run_id: str | None
    """MLflow run."""
    page: str
    seconds: float


def run_evaluation(settings: EvaluationSettings, overrides: Overrides) -> EvaluationResult:
    """Evaluate a model, and compare it with another one if asked to.

    Raises:
        BadConfig, BadBenchmark, BadManifest: the request cannot be carried out.
        EvaluationFailed: the job stopped; the same command resumes it.
    """
    began = time.monotonic()
    # Ray Data's driver is this process: keep Ray's messages about its actors off the terminal.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    require_durable("storage", str(overrides.given.get("storage", "runs")))
    scorer = load_scorer(settings.scorer)
    source = read_source(settings)
    rival_uri = _rival(settings, overrides)
    model = fetch_model(settings.model, overrides.tracking)
    log.info("model     %s", model.uri)
    log.info("questions %s of %s, SHA-256 %s", f"{len(source.questions):,}", source.uri, source.digest[:12])
    connect.connect()
    evaluated = _evaluate(model, source, settings, overrides, scorer)
    rival = None
    if rival_uri and rival_uri != model.uri:
        log.info("against   %s", rival_uri)
        unnamed = settings.model_copy(update={"name": None})
        rival = _evaluate(fetch_model(rival_uri, overrides.tracking), source, unnamed, overrides, scorer)
    difference = compare(evaluated.answers, rival.answers, source.benchmark) if rival else None
    page = report.write(evaluated, rival, difference, source)
    try:
        if rival:
            record.record(rival, source, overrides.tracking)
        run_id = record.record(evaluated, source, overrides.tracking)
        promoted = record.promote(evaluated, rival, difference, settings, overrides.tracking)
    except ConnectionError as error:
        where = f"the scores are in {evaluated.folder.uri}, and the same command records them"
        raise EvaluationFailed(f"{error}; {where}") from error
    return EvaluationResult(
        name=evaluated.folder.name,
        folder=evaluated.folder.uri,
        benchmark=source.label,
        model=evaluated.model,
        data_sha256=source.digest,
        questions=len(source.questions),
        asked=evaluated.asked,
        questions_per_s=evaluated.questions_per_s,
        **_scores(evaluated),
        against=_against(rival, difference),
        promoted=promoted,
        run_id=run_id,
        page=page,
        seconds=round(time.monotonic() - began, 1),
    )


def _rival(settings: EvaluationSettings, overrides: Overrides) -> str | None:
    """Return the model to compare with: that of --against, or else the version that has the alias of --promote."""
    uri = settings.against
    if uri:
        uri = find_version(uri, overrides.tracking).uri if uri.startswith("models:") else storage.absolute(uri)
    if settings.promote:
        name = find_version(settings.model, overrides.tracking).name
        champion = find_alias(name, settings.promote, overrides.tracking)
        if champion and uri not in (None, champion.uri):
            held = f"{champion.uri} has this alias, and --against is {uri}"
            raise BadConfig(f"--promote {settings.promote}: {held}; leave --against out")
        return champion.uri if champion else uri
    return uri


def _evaluate(
    model: ModelFiles, source: Source, settings: EvaluationSettings, overrides: Overrides, scorer: Scorer | None
) -> ModelEvaluation:
    """Ask a model all questions that its folder has no replies to, and score all replies."""
    config = overrides.apply(model.config, settings.num_frames, source.roots)
    limit = settings.max_new_tokens or source.benchmark.max_new_tokens or model.answer_limit(source.questions)
    asking = AnswerSettings(limit, settings.likelihood)
    identity = {
        "model": model.uri,
        "model_sha256": model.digest,
        "benchmark": source.label,
        "data_sha256": source.digest,
        "questions_sha256": _digest([asdict(question) for question in source.questions]),
        **{key: getattr(config.data, key) for key in ("num_frames", "sampling", "fps", "decoder")},
        **asdict(asking),
    }
    name = settings.name or safe_name(f"{source.label}-{model.label}-{_digest(identity)[:8]}", 100)
    folder = EvaluationFolder(config.storage, name.replace("/", "_"))
    job = Job(model, source.questions, source.uri, asking, config, folder)
    begun = folder.begin(identity, job.block_videos)
    log.info("folder    %s", folder.uri)
    asked = ask_all(job, begun["block_videos"])
    answers = [
        judge(number, question, reply, source.benchmark, scorer)
        for number, (question, reply) in enumerate(zip(source.questions, asked.replies, strict=True))
    ]
    scored = score(answers, source.benchmark)
    reliable = scored.unreadable <= settings.max_unreadable
    return ModelEvaluation(
        model.uri, model.version, folder, begun, answers, scored, reliable, asked.asked_now, asked.questions_per_s
    )


def _scores(evaluated: ModelEvaluation) -> dict[str, Any]:
    """Return the fields of a result that have scores; no accuracy where too many questions could not be asked."""
    values = evaluated.score.as_json()
    return values if evaluated.reliable else values | {"accuracy": None, "by_group": {}}


def _against(rival: ModelEvaluation | None, difference: Estimate | None) -> dict[str, Any] | None:
    if rival is None or difference is None:
        return None
    return {"model": rival.model, **_scores(rival), "difference": asdict(difference)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
