"""Records an evaluation in MLflow, and gives a better version an alias."""

import json
import logging

from crosslmm.config import TrackingConfig
from crosslmm.evaluate.evaluated import ModelEvaluation
from crosslmm.evaluate.evaluation_folder import ANSWERS_FILE, PAGE_FILE, SCORES_FILE
from crosslmm.evaluate.questions.source import Source
from crosslmm.evaluate.scores.intervals import Estimate
from crosslmm.evaluate.settings import EvaluationSettings
from crosslmm.text import printable, redacted
from crosslmm.tracking.versions import EvaluationRecord, move_alias, record_evaluation

log = logging.getLogger(__name__)


def record(evaluated: ModelEvaluation, source: Source, tracking: TrackingConfig) -> str:
    """Record an evaluation in MLflow, on a run of its own and on the version; return the id of the run.

    Raises:
        BadConfig: the server refuses.
        ConnectionError: the server does not answer.
    """
    files = {name: evaluated.folder.read(name) for name in (ANSWERS_FILE, SCORES_FILE, PAGE_FILE)}
    params = {key: value for key, value in evaluated.begun["identity"].items() if key != "model"}
    run_id = record_evaluation(
        EvaluationRecord(
            name=evaluated.folder.name,
            key=evaluated.begun["key"],
            benchmark=source.label,
            params=params | {"model": evaluated.model, "data": source.uri, "folder": evaluated.folder.uri},
            metrics=metrics(evaluated),
            data_uri=source.uri,
            data_digest=source.digest,
            questions=len(source.questions),
            files={name: data for name, data in files.items() if data is not None},
        ),
        evaluated.version,
        tracking,
    )
    log.info("recorded  MLflow run %s%s", run_id, f", {evaluated.version.uri}" if evaluated.version else "")
    return run_id


def metrics(evaluated: ModelEvaluation) -> dict[str, float]:
    """Return the metrics of an evaluation; without accuracies if too many questions could not be asked."""
    counts = {str(status): float(count) for status, count in evaluated.score.counts.items()}
    if not evaluated.reliable:
        return counts
    overall = evaluated.score.accuracy
    return {
        "accuracy": overall.value,
        "accuracy_low": overall.low,
        "accuracy_high": overall.high,
        **counts,
        **{
            f"accuracy/{key}/{value}": accuracy.value
            for key, values in evaluated.score.by_group.items()
            for value, accuracy in values.items()
        },
    }


def promote(
    evaluated: ModelEvaluation,
    rival: ModelEvaluation | None,
    difference: Estimate | None,
    settings: EvaluationSettings,
    tracking: TrackingConfig,
) -> bool | None:
    """Give the version the alias of --promote if it is better; return whether it has it now, None without --promote.

    The rule: both versions have a score, and the 95 % interval of the paired difference, clustered by video, lies above
    --margin. Without another version to beat, a score suffices.

    Raises:
        BadConfig: the server refuses.
        ConnectionError: the server does not answer.
    """
    alias, version = settings.promote, evaluated.version
    if alias is None or version is None:
        return None
    if not evaluated.reliable or (rival and not rival.reliable):
        log.warning("promoted  no: %s has no score", (rival if evaluated.reliable and rival else evaluated).model)
        return False
    if rival is None or difference is None:
        reason = f"{version.uri}: no other version has the alias {alias}"
    elif difference.low > settings.margin:
        reason = f"{difference} better than {rival.model}"
    else:
        log.warning(
            "promoted  no: the difference to %s is %s, and its interval does not lie above %g",
            rival.model, difference, settings.margin,
        )  # fmt: skip
        return False
    evidence = json.dumps({"evaluation": evaluated.folder.name, "reason": printable(redacted(reason))})
    move_alias(version, alias, {f"promoted_as.{alias}": evidence}, tracking)
    log.info("promoted  models:/%s@%s is version %s: %s", version.name, alias, version.number, reason)
    return True
