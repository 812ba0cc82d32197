"""Ask a registered model about a video, or score it on a manifest.

    python jobs/answer.py --video clip.mp4 --question "Which shape is it?"
    python jobs/answer.py --video clip.mp4                        a conversation: one question per line of stdin
    python jobs/answer.py --manifest runs/sample/held_out.jsonl   exact match per kind of question, and JSON
    python jobs/answer.py --video clip.mp4 --model models:/crosslmm/1 --adapter runs/sports/model   with an adapter

Every question of a manifest is asked as validation asks it: given the row's own words up to there, its earlier answers
included. Rows whose video cannot be read do not count, and are reported.
Exit status: 0 done, 2 bad request (no such model, unreadable video or manifest).
"""

import argparse
import json
import sys
from dataclasses import asdict

from jsonargparse import ArgumentError, ArgumentParser

from crosslmm.cli import fail, start_job
from crosslmm.config import BadConfig


def main() -> None:
    """Parse, call, print."""
    try:
        arguments = _parser().parse_args()
    except ArgumentError as error:
        fail(error)
    if (arguments.video is None) == (arguments.manifest is None):
        fail(ValueError("give either --video or --manifest"))
    try:
        start_job()
    except BadConfig as error:
        fail(error)
    # Imported late: these take seconds, and --help needs none of them.
    import rich
    from mlflow.exceptions import MlflowException
    from rich.table import Table

    from crosslmm import storage
    from crosslmm.config import TrackingConfig, require_no_credentials
    from crosslmm.data.manifest import BadManifest, Manifest
    from crosslmm.data.video.frame_list import map_files
    from crosslmm.inference.evaluate import evaluate
    from crosslmm.progress import cell
    from crosslmm.text import printable
    from crosslmm.tracking import load_answerer, quiet_mlflow
    from crosslmm.tracking.versions import find_version

    quiet_mlflow()
    try:
        require_no_credentials("--tracking.uri", arguments.tracking.uri)
        manifest = Manifest(arguments.manifest, arguments.roots) if arguments.manifest else None
        tracking = TrackingConfig(uri=arguments.tracking.uri)
        require_no_credentials("--adapter", arguments.adapter)
        if arguments.model.startswith("models:"):
            find_version(arguments.model, tracking)  # MLflow would not say where it looked
        answerer = load_answerer(arguments.model, tracking, arguments.adapter)
        if manifest is None:
            conversation = answerer.start_conversation(map_files(arguments.video, storage.absolute))
            for question in [arguments.question] if arguments.question else iter(_read_question, ""):
                print(printable(conversation.ask(question)), flush=True)
            return
        result = evaluate(answerer, manifest)
    except (BadConfig, BadManifest, MlflowException, ValueError, OSError) as error:
        fail(error)
    score = result.score
    table = Table("kind", "exact match", "n", title=cell(f"{arguments.model} on {arguments.manifest}"))
    for kind, accuracy in [*score.by_kind.items(), ("all", score.overall)]:
        table.add_row(cell(kind), f"{accuracy.share:.3f}", str(accuracy.asked))
    rich.get_console().print(table)
    print(json.dumps({**score.to_json(), "asked": [asdict(answer) for answer in result.answers]}))


def _read_question() -> str:
    """Return the next line of stdin, empty at its end; at a terminal, prompt for it."""
    if sys.stdin.isatty():
        print("? ", end="", flush=True)
    return sys.stdin.readline().strip()


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--video", help="path or s3:// URI of a video or image to ask about")
    parser.add_argument(
        "--question",
        help="what to ask; without it, questions are read from stdin, one per line, until an empty line; each may "
        "refer to earlier ones, and the video is encoded once",
    )
    parser.add_argument("--manifest", help="instead of --video: manifest whose questions are asked and scored")
    parser.add_argument(
        "--roots",
        type=list[str],
        default=[],
        metavar="[FOLDER, ...]",
        help="more folders that the manifest's videos may lie in, besides its own (as --data.roots in training)",
    )
    parser.add_argument(
        "--model", default="models:/crosslmm@candidate", metavar="URI", help="MLflow model URI (default: %(default)s)"
    )
    parser.add_argument(
        "--adapter",
        metavar="URI",
        help="answer with this adapter of the model: the `model` folder of a run that trained one (path or s3:// URI), "
        "or another version that belongs to the same model, models:/NAME/VERSION",
    )
    parser.add_argument(
        "--tracking.uri", metavar="URI", help="MLflow server (default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db)"
    )
    return parser


if __name__ == "__main__":
    main()
