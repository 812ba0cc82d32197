"""The registered model, as MLflow loads it: a video and a question in, an answer out. Code, not a pickle."""

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from crosslmm.inference.answerer import Answerer


class VideoAnswers(PythonModel):
    """`predict` takes the columns `video` (path or s3:// URI) and `question`, and returns one answer a row."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load weights, processor and decoder once."""
        self.answerer = Answerer(context.artifacts["model"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, str] | None = None
    ) -> list[str]:
        """Greedy answers, in batches of 16 rows."""
        answers: list[str] = []
        for start in range(0, len(model_input), 16):
            rows = model_input.iloc[start : start + 16]
            answers += self.answerer(list(rows["video"]), list(rows["question"]))
        return answers


mlflow.models.set_model(VideoAnswers())
