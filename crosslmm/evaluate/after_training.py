"""Scores the model of a training run when it has ended."""

from collections.abc import Callable

from crosslmm.config import BadConfig, RunConfig
from crosslmm.evaluate.questions.source import read_source
from crosslmm.evaluate.run import EvaluationResult, run_evaluation
from crosslmm.evaluate.settings import EvaluationSettings, Overrides


def evaluation_of(
    benchmark: str | None, data: str | None, config: RunConfig
) -> Callable[[str], EvaluationResult] | None:
    """Return a function that scores a model (a version, or a folder); None if no benchmark is wanted.

    The benchmark is read now: hours of training should not end in a folder that is not there.

    Args:
        benchmark: name of the benchmark.
        data: its folder.
        config: of the training run.

    Raises:
        BadConfig, BadBenchmark: there is no such benchmark, or its folder cannot be read.
    """
    if benchmark is None and data is None:
        return None
    if benchmark is None or data is None:
        raise BadConfig("--evaluate, --evaluate_data: give both, or none")
    settings = EvaluationSettings(benchmark=benchmark, data=data)
    read_source(settings)
    overrides = Overrides({"storage": config.storage, "tracking": config.tracking.model_dump()})
    return lambda model: run_evaluation(settings.model_copy(update={"model": model}), overrides)
