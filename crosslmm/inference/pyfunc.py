"""The registered model as an MLflow pyfunc. MLflow runs this file (models from code); nothing is pickled."""

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from crosslmm.inference.answerer import Answerer

BATCH_ROWS = 16
"""Rows per call of the model."""


class VideoAnswers(PythonModel):
    """A pyfunc whose `predict` takes the columns `video` (path or s3:// URI) and `question`: one answer per row."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load weights, processor and decoder; MLflow calls this once."""
        self.answerer = Answerer(context.artifacts["model"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, str] | None = None
    ) -> list[str]:
        """Return the greedy answer to each row, computed in batches of `BATCH_ROWS`."""
        answers: list[str] = []
        for start in range(0, len(model_input), BATCH_ROWS):
            rows = model_input.iloc[start : start + BATCH_ROWS]
            answers += self.answerer(list(rows["video"]), list(rows["question"]))
        return answers


mlflow.models.set_model(VideoAnswers())
