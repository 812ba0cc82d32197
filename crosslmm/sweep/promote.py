"""Registers the model of one trial of a sweep."""

import logging
from collections.abc import Sequence
from typing import Any

from crosslmm import storage
from crosslmm.config import RunConfig
from crosslmm.data.manifest import Manifest
from crosslmm.inference.evaluate import evaluate
from crosslmm.run_folder import MODEL_FOLDER
from crosslmm.sweep import trials
from crosslmm.sweep.trials import Trial
from crosslmm.sweep.tuner import SweepFailed
from crosslmm.tracking import MlflowRun, load_answerer, register
from crosslmm.train.run import lineage

log = logging.getLogger(__name__)


def promote(
    choice: str, folder: str, base: RunConfig, candidates: Sequence[Trial], record: MlflowRun
) -> dict[str, Any]:
    """Register a trial's model, load it back and ask it a first held-out question.

    Args:
        choice: best, knee, or a trial's number.
        folder: folder of the sweep.
        base: configuration of the sweep's trials.
        candidates: all trials of the sweep.
        record: MLflow run of the sweep.

    Returns:
        `model_uri`, `model_version`, `trial`, and `question`, `answer`, `expected` (None if the video cannot be read).

    Raises:
        SweepFailed: there is no such trial, or it has not finished.
    """
    by_name = {"best": trials.best(candidates), "knee": trials.knee(candidates)}
    trial = by_name[choice] if choice in by_name else next((t for t in candidates if t.number == int(choice)), None)
    if trial is None or trial.state != "finished":
        unnamed = "no trial has finished" if choice in by_name else "there is no such trial"
        raise SweepFailed(f"--promote {choice}: {f'it is {trial.state}, so it has no model' if trial else unnamed}")
    trial_folder = storage.join(folder, trial.name)
    tags = lineage(trial_folder) | {"sweep": record.run_id, "trial": str(trial.number), "promoted_as": choice}
    child = MlflowRun(record.tracking, str(trial.run_id))
    model_uri = register(child, storage.join(trial_folder, MODEL_FOLDER), tags, trial_folder)
    version = child.client.get_run(child.run_id).data.tags["registered_model"]
    promoted = {"model_uri": model_uri, "model_version": f"models:/{version}", "trial": trial.number}
    log.info("registered %s: trial %s, %s of the sweep", promoted["model_version"], trial.number, choice)
    held_out = Manifest(str(base.data.validation_manifest), base.data.roots)
    try:
        first = evaluate(load_answerer(model_uri, base.tracking), held_out, rows=1).answers[0]
    except ValueError as error:
        log.warning("%s could not be asked about the first held-out row: %s", model_uri, error)
        return {**promoted, "question": None, "answer": None, "expected": None}
    return {**promoted, "question": first.question, "answer": first.answer, "expected": first.expected}
