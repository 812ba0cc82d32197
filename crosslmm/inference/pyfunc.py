"""The registered model as an MLflow pyfunc. MLflow runs this file (models from code); nothing is pickled."""

from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from crosslmm import storage
from crosslmm.inference.answerer import Answerer

BATCH_ROWS = 16
"""Rows per call of the model."""


class VideoAnswers(PythonModel):
    """A pyfunc that takes the columns `video` and `question` and returns the columns `answer` and `error`.

    A video is a path or s3:// URI inside one of the folders `roots` of the model's configuration, relative to the first
    or absolute. There are no roots until whoever loads the model names some: `model_config={"roots": [...]}` of
    `load_model`, or MLFLOW_PYFUNC_INFERENCE_CONFIG='{"roots": [...]}' in the environment of a server.

    A version that is an adapter names its base in `base`. Whoever loads a version may name an `adapter` of the same
    base to answer with: a folder (path or s3:// URI), or another version, models:/NAME/VERSION.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load weights, processor and decoder; MLflow calls this once.

        Raises:
            ValueError: `roots` is not a list of folders.
        """
        roots = context.model_config["roots"]
        if not isinstance(roots, list) or not all(isinstance(root, str) and root for root in roots):
            raise ValueError(f"model_config: roots is {roots!r}; expected a list of folders (paths or s3:// URIs)")
        self.roots = [storage.absolute(root) for root in roots]
        folder, base, adapter = (context.artifacts["model"], *map(context.model_config.get, ("base", "adapter")))
        if base:
            folder, adapter = _folder_of(base), adapter or folder
        self.answerer = Answerer(folder, adapter=_folder_of(adapter) if adapter else None)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Return the greedy answer to each row, or the error that this row has; computed in batches of `BATCH_ROWS`.

        Args:
            context: of MLflow.
            model_input: columns `video` and `question`.
            params: `max_new_tokens`, length limit of an answer [tokens]; default: that of the model.

        Raises:
            ValueError: a parameter is unknown or out of range.
        """
        limit = self._length_limit(dict(params or {}))
        results: list[tuple[str | None, str | None]] = []
        for start in range(0, len(model_input), BATCH_ROWS):
            rows = model_input.iloc[start : start + BATCH_ROWS]
            results += self.answerer.answer_rows(list(rows["video"]), list(rows["question"]), self.roots, limit)
        # object: a column of strings would turn None into NaN, which is not JSON.
        return pd.DataFrame(results, columns=["answer", "error"], dtype=object)

    def _length_limit(self, params: dict[str, Any]) -> int | None:
        limit, longest = params.pop("max_new_tokens", None), self.answerer.processor.max_length
        if params:
            raise ValueError(f"params: {min(params)!a} is not known; there is max_new_tokens")
        if limit is not None and not (isinstance(limit, int | np.integer) and 1 <= limit <= longest):
            raise ValueError(f"params: max_new_tokens is {limit!a}; it takes 1 to {longest}")
        return None if limit is None else int(limit)


def _folder_of(uri: str) -> str:
    """Return the folder of what a version models:/NAME/VERSION registers, downloaded; anything else as it is."""
    if not uri.startswith("models:/"):
        return uri
    version = mlflow.artifacts.download_artifacts(artifact_uri=uri)
    artifacts = mlflow.models.Model.load(version).flavors["python_function"]["artifacts"]
    return storage.join(version, artifacts["model"]["path"])


mlflow.models.set_model(VideoAnswers())
