"""Ask a registered model about a video, or score it on a manifest."""

import dataclasses
import json
import sys

from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table


def answer(
    video: str | None = None,
    question: str | None = None,
    manifest: str | None = None,
    roots: list[str] | None = None,
    model: str = "models:/crosslmm@candidate",
    tracking_uri: str | None = None,
) -> None:
    """Ask a registered model about a video or image, or score it on a manifest.

    Args:
        video: path or s3:// URI of a video or image to ask about.
        question: what to ask about it; without one, questions are read line by line, each turn knowing those before it,
            and the video is looked at once.
        manifest: instead of one video, a manifest: the share of its first questions that are answered exactly.
        roots: folders that the manifest's videos may lie in, besides its own (--data.roots in training).
        model: MLflow model URI.
        tracking_uri: MLflow tracking URI; default MLFLOW_TRACKING_URI, or else sqlite:///mlflow.db.
    """
    # Only now what takes seconds to import.
    import pandas as pd
    from mlflow.exceptions import MlflowException

    from crosslmm import storage
    from crosslmm.cli import fail
    from crosslmm.config import TrackingConfig
    from crosslmm.data.manifest import BadManifest, Manifest
    from crosslmm.inference.answerer import score
    from crosslmm.tracking import load_registered

    if (video is None) == (manifest is None):
        fail(ValueError("give either --video or --manifest"))
    try:
        rows = Manifest(manifest, roots or []) if manifest else None
        loaded = load_registered(model, TrackingConfig(uri=tracking_uri))

        def predict(videos: list[str], questions: list[str]) -> list[str]:
            return loaded.predict(pd.DataFrame({"video": videos, "question": questions}))

        if rows is None:
            talk = loaded.unwrap_python_model().answerer.talk(storage.absolute(str(video)))
            for asked in [question] if question else iter(_read_question, ""):
                print(talk.ask(asked), flush=True)
            return
        scored = score(predict, rows)
    except (BadManifest, MlflowException, ValueError, OSError) as error:
        fail(error)
    table = Table("kind", "exact match", title=f"{model} on {manifest}")
    for kind, share in [*scored.accuracy_by_kind.items(), ("all", scored.accuracy)]:
        table.add_row(kind, f"{share:.3f}")
    Console(stderr=True).print(table)
    json.dump(dataclasses.asdict(scored), sys.stdout)
    print()


def _read_question() -> str:
    """The next line of a person or a pipe; empty at the end."""
    if sys.stdin.isatty():
        print("? ", end="", flush=True)
    return sys.stdin.readline().strip()


if __name__ == "__main__":
    auto_cli(answer)
