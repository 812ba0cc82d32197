"""Inspect, repair and publish a run's checkpoints: python jobs/checkpoint.py list|verify|repair|export|push RUN ...

  python jobs/checkpoint.py list runs/first-try                    which steps a restart could resume from
  python jobs/checkpoint.py verify runs/first-try                  compare every byte with the sha256 in the seals
  python jobs/checkpoint.py repair runs/first-try                  stop trusting damaged checkpoints, remove unfinished
  python jobs/checkpoint.py export runs/first-try model --step 200   a from_pretrained folder of step 200
  python jobs/checkpoint.py push runs/first-try owner/model          the same, on the hub: a private repository

RUN is the folder of one run, which is --storage/--name of its training: path or s3:// URI. Needs no Ray and no GPU.
Each command has its own --help. Exit status: 0 done, 1 a checkpoint is damaged or the storage failed, 2 bad request.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import rich
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from crosslmm import run_folder, storage
from crosslmm.cli import CommandParser, fail, print_error
from crosslmm.config import BadConfig
from crosslmm.progress import set_up_logging
from crosslmm.text import one_printable_line
from crosslmm.train.checkpoint import seals


def list_checkpoints(run: str, as_json: bool) -> int:
    """Print the sealed checkpoints, newest first, and why others are not sealed."""
    sealed = seals.list_sealed(run)
    reasons = {uri: seals.unsealed_reason(uri) for uri in seals.list_unsealed(run, sealed)}
    unsealed = {uri: reason or "unfinished" for uri, reason in reasons.items()}
    if not sealed and not unsealed:
        raise seals.no_checkpoint(run)
    if as_json:
        entries = [{k: v for k, v in asdict(c).items() if k != "files"} | {"size": c.size} for c in sealed]
        print(json.dumps({"run": run, "checkpoints": entries, "unsealed": unsealed}))
        return 0
    table = Table("step", "sealed", "workers", "size", "validation")
    for one in sealed:
        metrics = "\n".join(
            f"{one_printable_line(name.removeprefix('validation/'))} {value:.4g}" for name, value in one.metrics.items()
        )
        sealed_at = datetime.fromtimestamp(one.sealed_at).strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(f"{one.step:,}", sealed_at, str(one.world_size), decimal(one.size), Text(metrics))
    rich.get_console().print(table)
    for uri, reason in unsealed.items():
        print(f"not sealed: {uri}: {reason}")
    return 0


def verify(run: str, step: int | None) -> int:
    """Read every byte of the checkpoints, or of one."""
    status = 0
    for one in seals.select(run, step):
        if damage := seals.verify(one):
            _print_damage(run, one.uri, damage)
            status = 1
        else:
            print(f"step {one.step}: {len(one.files)} files, {decimal(one.size)}, intact")
    return status


def repair(run: str) -> int:
    """Break the seals of damaged checkpoints, and remove what is unfinished or in the way of a restart."""
    from crosslmm import lease  # imports Ray, which the other commands need not wait for

    try:
        with lease.claim(run_folder.owned_folder(run), "repair", "repair it when it has ended").take() as fence:
            for line in seals.repair(run):
                fence.require()
                print(line, flush=True)
    except lease.LeaseLost as error:
        print_error(error)
        return 1
    return 0


def export(run: str, folder: str, step: int | None, merge: bool) -> int:
    """Write a `from_pretrained` folder, or one of adapters, of the newest intact checkpoint or of a given step."""
    # These import torch, which the other commands need not wait for.
    from transformers.utils import logging as transformers_logging

    from crosslmm.train.checkpoint.export import export_sealed

    transformers_logging.disable_progress_bar()
    if not storage.is_empty(folder):
        raise BadConfig(f"{folder}: is not empty; give another folder, or empty it")
    for one in seals.select(run, step):
        if damage := export_sealed(one, folder, merge):
            _print_damage(run, one.uri, damage)
        else:
            print(f"{folder}: the model after step {one.step}")
            return 0
    return 1


def push(run: str, target: str, step: int | None, merge: bool, public: bool) -> int:
    """Export to the hub, or to a folder of a bucket."""
    from crosslmm.inference import publish

    if not publish.is_hub_target(target):
        if storage.scheme_of(target) != "s3":
            raise BadConfig(f"{target}: is neither a hub name (owner/name) nor an s3:// URI; `export` writes folders")
        return export(run, target, step, merge)
    with tempfile.TemporaryDirectory() as folder:
        if status := export(run, folder, step, merge):
            return status
        print(f"{publish.push(Path(folder), target, private=not public)}: pushed")
    return 0


def _print_damage(run: str, uri: str, damage: list[str]) -> None:
    remedy = f"repair it with python jobs/checkpoint.py repair {run}"
    print(f"error: {uri} is damaged: {'; '.join(damage)}; {remedy}", file=sys.stderr)


def main() -> int:
    """Parse, call, print."""
    arguments = vars(_parser().parse_args())
    command = arguments.pop("command")
    arguments["run"] = arguments["run"].rstrip("/")
    try:
        set_up_logging()
        seals.require_run_folder(arguments["run"])
        return int(command(**arguments))
    except (BadConfig, storage.BadLocation) as error:
        fail(error)
    except OSError as error:
        print_error(error)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    run = CommandParser(add_help=False)
    run.add_argument("run", metavar="RUN", help="folder of the run, path or s3:// URI")

    text = "list checkpoints, newest first, with their validation metrics; and folders without a valid seal, and why"
    command = commands.add_parser("list", parents=[run], help="list checkpoints", description=text)
    command.add_argument("--json", dest="as_json", action="store_true", help="print one JSON object instead of a table")
    command.set_defaults(command=list_checkpoints)

    text = "read every byte and compare it with the seal; exit status 1 if anything is not what was written"
    command = commands.add_parser("verify", parents=[run], help="compare all files with the seals", description=text)
    command.add_argument("--step", type=int, help="only the checkpoint after this step (default: all)")
    command.set_defaults(command=verify)

    text = """break the seals of damaged checkpoints, remove unfinished ones and Ray Train's snapshots. Refused while
    the run is running: a checkpoint that is being written counts as unfinished. Prints what it removes before it
    removes it; never removes an intact checkpoint."""
    command = commands.add_parser("repair", parents=[run], help="stop trusting what is damaged", description=text)
    command.set_defaults(command=repair)

    text = """write a from_pretrained folder of a checkpoint, in one process on the CPU; of a run that trains adapters,
    their folder, which PEFT loads"""
    command = commands.add_parser("export", parents=[run], help="write a from_pretrained folder", description=text)
    command.add_argument("folder", metavar="FOLDER", help="path or s3:// URI of an empty or new folder")
    command.add_argument("--step", type=int, help="the checkpoint after this step (default: newest intact one)")
    command.add_argument(
        "--merge", action="store_true", help="of a run that trains adapters, write the whole model instead of them"
    )
    command.set_defaults(command=export)

    text = """export a checkpoint to the hub, as a private repository unless --public, or to a folder of a bucket.
    On the hub, run.yaml and the model card name no addresses of data, weights or storage. The token is that of
    `hf auth login`, or HF_TOKEN"""
    command = commands.add_parser("push", parents=[run], help="export to the hub or a bucket", description=text)
    command.add_argument("target", metavar="TARGET", help="owner/name on the hub, or s3:// URI of an empty folder")
    command.add_argument("--step", type=int, help="the checkpoint after this step (default: newest intact one)")
    command.add_argument(
        "--merge", action="store_true", help="of a run that trains adapters, push the whole model instead of them"
    )
    command.add_argument("--public", action="store_true", help="make the repository public, if it is new")
    command.set_defaults(command=push)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
