"""Look after a run's checkpoints: python jobs/checkpoint.py list|verify|repair|export RUN ... (each has a --help).

RUN is the folder of one run, path or s3:// URI. No Ray and no GPU is needed. Exit status: 0 done, 1 a checkpoint is
damaged or the storage failed, 2 the request was refused.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from crosslmm import storage
from crosslmm.cli import fail
from crosslmm.config import BadConfig

if TYPE_CHECKING:
    from crosslmm.train.checkpoint import Checkpoint

RAYS_SNAPSHOT = "checkpoint_manager_snapshot.json"
MARKS = {"run.json", "config.yaml", RAYS_SNAPSHOT}
"""Files by which a run's folder is known before its first checkpoint."""


def show(run: str, as_json: bool) -> int:
    """List the checkpoints, newest first, and what is not sealed."""
    from crosslmm.train import checkpoint

    found = checkpoint.sealed(run)
    left = {uri: checkpoint.why_unsealed(uri) or "unfinished" for uri in checkpoint.unsealed(run, found)}
    if not found and not left:
        raise _none(run)
    if as_json:
        said = [{key: value for key, value in asdict(c).items() if key != "files"} | {"size": c.size} for c in found]
        print(json.dumps({"run": run, "checkpoints": said, "unsealed": left}))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, soft_wrap=True)
    table = Table("step", "sealed", "workers", "size", "validation")
    for one in found:
        metrics = "\n".join(f"{name.removeprefix('validation/')} {value:.4g}" for name, value in one.metrics.items())
        sealed_at = datetime.fromtimestamp(one.sealed_at).strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(f"{one.step:,}", sealed_at, str(one.world_size), decimal(one.size), Text(metrics))
    console.print(table)
    for uri, reason in left.items():
        console.print(f"not sealed: {uri}: {reason}", markup=False)
    return 0


def verify(run: str, step: int | None) -> int:
    """Read every byte of the checkpoints, or of one."""
    damaged = 0
    for one in _chosen(run, step):
        wrong = _damage(one)
        for reason in wrong:
            print(f"error: {one.uri}: {reason}; {_mend(run)}", file=sys.stderr)
        if not wrong:
            print(f"step {one.step}: {len(one.files)} files, {decimal(one.size)}, as they were sealed")
        damaged += bool(wrong)
    return int(bool(damaged))


def repair(run: str) -> int:
    """Leave nothing that is damaged, unfinished, or in the way of a restart."""
    from crosslmm.train import checkpoint

    for one in checkpoint.sealed(run):
        if wrong := _damage(one):
            print(f"{one.uri} is damaged: {'; '.join(wrong)}; its seal is broken", flush=True)
            checkpoint.break_seal(one, "; ".join(wrong))
    whole = checkpoint.sealed(run)
    for uri in checkpoint.unsealed(run, whole):
        reason = checkpoint.why_unsealed(uri)
        if reason is None:
            print(f"{uri} was never finished; it is removed", flush=True)
            checkpoint.remove(uri)
        else:
            print(f"{uri} stays until the next checkpoint is sealed, and counts as none: {reason}")
    for name in storage.names_in(run):
        if Path(name).name == RAYS_SNAPSHOT:
            uri = storage.join(run, name)
            print(f"{uri}, which nothing reads any more, is removed", flush=True)
            storage.remove([uri])
    print(f"the run will go on {f'from step {whole[0].step}' if whole else 'from the beginning'}")
    return 0


def export(run: str, folder: str, step: int | None) -> int:
    """Make a `from_pretrained` folder of the newest checkpoint that is whole, or of a given one."""
    from crosslmm.inference.answerer import CONFIG
    from crosslmm.train import checkpoint

    if not storage.is_empty(folder):
        raise BadConfig(f"{folder}: is not empty; give another folder, or empty it")
    for one in _chosen(run, step):
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as copied, tempfile.TemporaryDirectory() as made:
            remote = storage.scheme_of(one.uri) == "s3"
            here = Path(copied if remote else storage.local_path(one.uri))
            if wrong := _damage(one, here if remote else None):
                print(f"error: {one.uri} is damaged: {'; '.join(wrong)}; {_mend(run)}", file=sys.stderr)
                continue
            checkpoint.export_alone(here, Path(made))
            (Path(made) / CONFIG).write_bytes((here / checkpoint.CONFIG).read_bytes())
            storage.upload(made, folder)
        print(f"{folder}: the model after step {one.step}")
        return 0
    return 1


def _chosen(run: str, step: int | None) -> "list[Checkpoint]":
    """All checkpoints, newest first, or those after one step (there may be two: of a run that came by it twice).

    Raises:
        BadConfig: there is none.
    """
    from crosslmm.train import checkpoint

    found = checkpoint.sealed(run)
    if not found:
        raise _none(run)
    chosen = [one for one in found if step in (None, one.step)]
    if not chosen:
        there = ", ".join(str(other) for other in sorted({one.step for one in found}))
        raise BadConfig(f"--step {step}: {run} has no such checkpoint; there are {there}")
    return chosen


def _damage(one: "Checkpoint", copy_to: Path | None = None) -> list[str]:
    """What is wrong with a checkpoint, all of it read (and copied on the way), with a bar for people."""
    from crosslmm.train import checkpoint

    wrong = []
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
    shown = Console(stderr=True)
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as progress:
        bar = progress.add_task(f"reading step {one.step}", total=one.size)
        for name, (size, _) in sorted(one.files.items()):
            if reason := checkpoint.damage(one, name, copy_to):
                wrong.append(reason)
            progress.advance(bar, size)
    return wrong


def _none(run: str) -> BadConfig:
    return BadConfig(f"{run}: has no checkpoint; the run begins at its first step when it is started again")


def _mend(run: str) -> str:
    return f"mend it with python jobs/checkpoint.py repair {run}"


def _require_run(run: str) -> None:
    """Whether it is the folder of one run: `repair` removes what is in it.

    Raises:
        BadConfig: it is not.
    """
    from crosslmm.train import checkpoint

    marked = any(storage.exists(storage.join(run, name)) for name in MARKS)
    if not marked and not any(checkpoint.NAME.fullmatch(name) for name in storage.folders_in(run)):
        raise BadConfig(f"{run}: no such run; give the folder of one, which is --storage/--name of its training")


COMMANDS: dict[str, Callable[..., int]] = {"list": show, "verify": verify, "repair": repair, "export": export}


def main() -> int:
    """Parse, do, print."""
    arguments = vars(_parser().parse_args())
    command = COMMANDS[arguments.pop("command")]
    arguments["run"] = arguments["run"].rstrip("/")
    try:
        _require_run(arguments["run"])
        return command(**arguments)
    except (BadConfig, storage.BadLocation) as error:
        fail(error)
    except OSError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="command", required=True)

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        own = verbs.add_parser(name, help=text.split(";")[0].split(".")[0], description=text)
        own.add_argument("run", metavar="RUN", help="folder of the run, path or s3:// URI")
        return own

    own = verb("list", "what there is, newest first; and what is not sealed, and why")
    own.add_argument("--json", dest="as_json", action="store_true", help="print one JSON object, and no table")
    own = verb("verify", "read every byte and compare it with the seal; exit status 1 if any is not what was written")
    own.add_argument("--step", type=int, help="only the checkpoint after this step; default: all")
    verb(
        "repair",
        "break the seals of damaged checkpoints, remove unfinished ones and what Ray Train left; for a run that is not "
        "running, for one that is being written is unfinished too. What is removed is said first; a whole checkpoint "
        "never is.",
    )
    own = verb("export", "make a from_pretrained folder of a checkpoint, in one process on the CPU")
    own.add_argument("folder", metavar="FOLDER", help="path or s3:// URI of a folder that is empty, or not there")
    own.add_argument("--step", type=int, help="the checkpoint after this step; default: the newest that is whole")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
