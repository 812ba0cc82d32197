"""Make manifests ready for training: python jobs/prepare.py convert|validate|requeue|sample ... (each has a --help).

Runs on the Ray cluster that it finds, or else on one that it starts here; on a cluster: ray job submit -- python
jobs/prepare.py ... Exit status: 0 done, 1 rows are malformed or it broke off, 130 it was stopped (the same command goes
on in both), 2 the request was refused.
"""

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from jsonargparse.typing import PositiveInt
from pydantic import Field
from rich.console import Console
from rich.table import Table
from rich.text import Text

from crosslmm.cli import fail, start_job
from crosslmm.config import BadConfig, DataConfig

LIMITS = {"decode_timeout_s", "decode_memory_gib", "max_video_bytes", "max_video_s", "max_frame_pixels"}
TOLERATED = {"max_bad_share", "bad_allowed", "roots"}
DEFAULTS = DataConfig()


def convert(
    manifest: str,
    folder: str,
    probe: bool = True,
    skip_bad: bool = False,
    piece_bytes: PositiveInt | None = None,
    data: DataConfig = DEFAULTS,
) -> int:
    """Check a manifest of any size, probe its videos, and write it as a folder that training reads piece by piece.

    data.manifest takes the folder in the manifest's place. Malformed rows stand in its rejected.jsonl, rows whose video
    cannot be read in its quarantine.jsonl (requeue tries them again). The same command goes on where it was stopped; a
    manifest that has changed is begun anew.

    Args:
        manifest: path or s3:// URI, in any form that training reads. A .json list, or a folder of videos with sidecars,
            has to fit in the memory of one process.
        folder: path or s3:// URI that gets the rows; every node must reach it.
        probe: read each video's header: duration (which --train.micro_batch_tokens counts with), frames, size, codec,
            rotation, keyframes. false opens no video.
        skip_bad: leave malformed rows out instead of refusing the manifest.
        piece_bytes: of the manifest in one task, which is what a kill costs; default 32 MiB, with probe 4 MiB [bytes].
    """
    from crosslmm.data.ingest import convert

    console = _console()
    said = convert.convert(manifest, folder, probe, skip_bad, piece_bytes, data, console)
    table = Table("rows", "malformed", "unreadable", "videos", "hours", "codecs", "sizes")
    table.add_row(
        *(f"{said[key]:,}" for key in ("rows", "rejected", "quarantined", "videos", "hours")),
        *(Text("\n".join(f"{name} {count:,}" for name, count in _most(said[key]))) for key in ("codecs", "sizes")),
    )
    console.print(table)
    _print_json(said)
    return 0


def validate(
    manifest: str, probe: bool = False, piece_bytes: PositiveInt | None = None, data: DataConfig = DEFAULTS
) -> int:
    """Check a manifest as convert does, and write nothing.

    Says which reasons there are, how often, and on which lines first. Exit status 1 if there are any.

    Args:
        manifest: path or s3:// URI, in any form that training reads.
        probe: read each video's header too; rows whose video cannot be read count as bad then.
        piece_bytes: of the manifest in one task; default 32 MiB, with probe 4 MiB [bytes].
    """
    from crosslmm.data.ingest import convert

    console = _console()
    found = convert.validate(manifest, probe, piece_bytes, data, console)
    if found.reasons or found.unreadable:
        table = Table("rows", "lines", "reason")
        for count, lines, reason in sorted(found.reasons.values(), key=lambda one: -one[0]):
            more = ", ..." if count > len(lines) else ""
            table.add_row(f"{count:,}", f"{', '.join(map(str, lines))}{more}", Text(reason))
        for reason, count in _most(found.unreadable):
            table.add_row(f"{count:,}", "", Text(reason))
        console.print(table)
    said = {"manifest": manifest, "rows": found.rows, "rejected": found.rejected, "quarantined": found.quarantined}
    _print_json(said)
    return int(bool(found.rejected or found.quarantined))


def requeue(place: str, data: DataConfig = DEFAULTS) -> int:
    """Try again the videos that could not be read.

    Those of a run's quarantine.jsonl are decoded, and its lines that can be read now are taken out; those of a prepared
    folder are probed, and rows that can be read now become one more part of it. What still fails stays, its attempts
    counted on. A prepared folder with more rows is another manifest: a run that was begun with the fewer goes on
    reading, and cannot be resumed.

    Args:
        place: path or s3:// URI of a ledger (quarantine.jsonl of a run that is not running), or of a prepared folder.
    """
    from crosslmm.data.ingest.retry_unreadable import requeue as try_again

    _print_json(try_again(place, data, _console()))
    return 0


def sample(
    folder: str,
    train: Annotated[int, Field(ge=4)] = 3000,
    held_out: Annotated[int, Field(ge=4)] = 160,
    seed: int = 0,
    kind: Literal["shapes", "digits"] = "shapes",
) -> int:
    """Write a sample set: short H.264 clips with questions.

    Args:
        folder: path or s3:// URI that gets the clips, train.jsonl and held_out.jsonl.
        train: clips to train on.
        held_out: clips to validate with, drawn apart from those.
        seed: the same seed gives the same bytes.
        kind: moving shapes, with questions about colour, shape, motion and order; or small handwritten digits, which
            need scikit-learn.
    """
    from crosslmm.data.samples.digits import write_digits
    from crosslmm.data.samples.shapes import write_sample_set

    write = {"shapes": write_sample_set, "digits": write_digits}[kind]
    write(folder, train, held_out, seed)
    print(f"{folder}: {train} clips in train.jsonl, {held_out} in held_out.jsonl")
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "convert": convert,
    "validate": validate,
    "requeue": requeue,
    "sample": sample,
}


def main() -> int:
    """Parse, call, print."""
    try:
        command, arguments = _parse(sys.argv[1:])
    except BadConfig as error:
        fail(error)
    # Only now what takes seconds to import.
    from crosslmm.data.ingest.ray_tasks import NotPrepared
    from crosslmm.data.manifest import BadManifest
    from crosslmm.data.quarantine import TooManyUnreadable
    from crosslmm.storage import BadLocation

    start_job()
    try:
        return COMMANDS[command](**arguments)
    except (BadConfig, BadManifest, BadLocation) as error:
        fail(error)
    except (SystemExit, KeyboardInterrupt):
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (NotPrepared, TooManyUnreadable, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _parse(argv: list[str]) -> tuple[str, dict[str, Any]]:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=__doc__, exit_on_error=False)
    commands = parser.add_subcommands(dest="command")
    for name, function in COMMANDS.items():
        description = str(function.__doc__).split("Args:")[0]
        own = ArgumentParser(description=description, exit_on_error=False)
        own.add_function_arguments(function, as_positional=True, skip={"data"})
        if "data" in function.__annotations__:
            asked = LIMITS if function is requeue else LIMITS | TOLERATED
            own.add_class_arguments(DataConfig, "data", skip=set(DataConfig.model_fields) - asked)
        commands.add_subcommand(name, own, help=description.split("\n")[0].split(":")[0])
    try:
        values = parser.parse_args(argv).as_dict()
        command = values["command"]
        arguments = values[command]
        if "data" in arguments:
            arguments["data"] = DataConfig.model_validate(arguments["data"])
    except (ArgumentError, ValueError) as error:
        raise BadConfig(str(error)) from error
    return command, {key: value for key, value in arguments.items() if key != "config"}


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False, soft_wrap=True)


def _most(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda one: -one[1])[:5]


def _print_json(said: dict[str, Any]) -> None:
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
