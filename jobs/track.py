"""Deliver runs from storage to MLflow, read the logs of a run, and remove old runs.

A run keeps in its folder whatever MLflow needs: parameters, inputs, metrics, unreadable samples, status, model. If the
MLflow server was unreachable during the run, deliver the rest later; what MLflow already has is not sent again:

    python jobs/track.py replay --storage s3://bucket/runs

Why a run ended, and what its driver and ranks wrote, also when their cluster is gone:

    python jobs/track.py logs first-try --storage s3://bucket/runs

List the runs that no alias and no other run depends on, then remove them: the MLflow run, its artifacts and model
versions, and the folder with its checkpoints. Active runs, runs whose model has an alias, the newest runs, and runs
that these started from are kept:

    python jobs/track.py prune --storage s3://bucket/runs --older_than 30 --keep 10
    python jobs/track.py prune --storage s3://bucket/runs --older_than 30 --keep 10 --delete true

Exit status: 0 all done, 1 something failed (the same command continues), 2 the request was refused.
"""

import argparse
import sys
import time

from rich.console import Console
from rich.table import Table

from crosslmm import run_folder, storage
from crosslmm.cli import CommandParser, fail, print_error
from crosslmm.config import BadConfig, TrackingConfig, require_no_credentials
from crosslmm.progress import cell, set_up_logging
from crosslmm.storage import BadLocation
from crosslmm.text import printable


def replay(args: argparse.Namespace) -> int:
    """Deliver runs to MLflow and print a table of them."""
    from crosslmm import tracking  # takes seconds to import

    tracking.quiet_mlflow()
    table, errors = Table("run", "MLflow run", "points sent", "status", "model"), []
    for name, folder in run_folder.list_runs(args.storage, args.name):
        try:
            done = tracking.replay(folder, args.uri)
        except Exception as error:  # go on: the next run may have another server or artifact store
            row = (name, "", "", "not delivered", "")
            errors.append(f"{name}: {error}")
        else:
            row = (name, done.run_id, f"{done.points:,}", done.status or "not ended", done.model_version or "")
        table.add_row(*map(cell, row))
    _console().print(table)
    for line in errors:
        print_error(line)
    return int(bool(errors))


def logs(args: argparse.Namespace) -> int:
    """Print why a run ended, which logs it has, and one of them."""
    ((name, folder),) = run_folder.list_runs(args.storage, [args.name])
    logs = run_folder.logs_of(folder)
    if not logs:
        raise BadConfig(f"{name}: {folder} has no logs: the version of crosslmm that ran it kept none")
    table = Table("started", "of", "file", title=f"{name}: {run_folder.read_run(folder)['tags'].get('ended', '')}")
    for log in logs:
        table.add_row(*map(cell, (time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(log.time)), log.who, log.file)))
    shown = [log for log in logs if args.of in (log.who, log.file)]
    if not shown:
        there = ", ".join(sorted({log.who for log in logs}))
        raise BadConfig(f"--of {args.of}: {name} has no such log; there are {there}")
    _console().print(table)
    for log in shown:
        if log.time == shown[-1].time:  # the last start's
            text = storage.read_bytes(storage.join(storage.join(folder, run_folder.LOGS_FOLDER), log.file)).decode()
            print(f"{log.file}:\n{printable(text)}")
    return 0


def prune(args: argparse.Namespace) -> int:
    """Print which runs are removed or kept, and why; remove them with --delete true."""
    from crosslmm import tracking  # takes seconds to import

    tracking.quiet_mlflow()
    if args.older_than < 0 or args.keep < 0:
        raise BadConfig("--older_than and --keep: neither can be below 0")
    retention = tracking.Retention(args.storage, TrackingConfig(uri=args.uri, experiment=args.experiment))
    decisions = retention.decide(args.older_than, args.keep)
    console, table = _console(), Table("run", "MLflow run", "days", "trials", "versions", "", "reason")
    for one in decisions:
        days = f"{(time.time() - one.tree.ended) / 86400:.1f}"
        counts = [f"{len(one.tree.runs) - 1:,}", f"{len(one.tree.versions):,}"]
        row = (one.tree.name, one.tree.run_id, days, *counts, "remove" if one.remove else "keep", one.reason)
        table.add_row(*map(cell, row))
    console.print(table)
    trees = [one.tree for one in decisions if one.remove]
    if args.delete != "true":
        console.print(f"{len(trees)} of {len(decisions)} would be removed; --delete true removes them")
        return 0
    removed = 0
    for tree in trees:
        done = retention.remove(tree)
        removed += done
        console.print(cell(f"{tree.name} {'is removed' if done else 'is kept: it is in use again'}"))
    console.print(f"{removed} of {len(decisions)} removed; `mlflow gc` deletes their rows in MLflow's database")
    return 0


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False, soft_wrap=True)


def main() -> int:
    """Parse the arguments and run the command."""
    args = _parser().parse_args()
    try:
        set_up_logging()
        require_no_credentials("--tracking.uri", getattr(args, "uri", None))
        return {"replay": replay, "logs": logs, "prune": prune}[args.command](args)
    except (BadConfig, BadLocation) as error:
        fail(error)
    except OSError as error:
        print_error(error)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="command", required=True)
    verb = verbs.add_parser("replay", help="deliver to MLflow what it does not have yet")
    verb.add_argument("--storage", required=True, help="folder of all runs, path or s3:// URI")
    verb.add_argument(
        "--name", nargs="+", action="extend", default=[], help="run, or SWEEP/TRIAL (default: all runs and trials)"
    )
    verb.add_argument("--tracking.uri", dest="uri", help="MLflow server (default: the one that each run was given)")
    verb = verbs.add_parser("logs", help="print why a run ended, and what its driver and ranks wrote")
    verb.add_argument("name", help="run, or SWEEP/TRIAL")
    verb.add_argument("--storage", default="runs", help="folder of all runs, path or s3:// URI (default: runs)")
    verb.add_argument(
        "--of", default="driver", metavar="WHO", help="driver, rank-NNNNN or a file of the table (default: driver)"
    )
    verb = verbs.add_parser("prune", help="list and remove old runs that nothing depends on")
    verb.add_argument("--storage", required=True, help="folder of all runs, path or s3:// URI")
    verb.add_argument(
        "--older_than", type=float, default=30, metavar="DAYS", help="keep runs that ended within DAYS (default: 30)"
    )
    verb.add_argument(
        "--keep", type=int, default=10, metavar="N", help="keep the N newest runs at any age (default: 10)"
    )
    verb.add_argument("--delete", choices=["true", "false"], default="false", help="remove them (default: only list)")
    verb.add_argument("--tracking.uri", dest="uri", help="MLflow server (default: MLFLOW_TRACKING_URI, or ./mlflow.db)")
    verb.add_argument(
        "--tracking.experiment", dest="experiment", default="crosslmm", help="experiment (default: crosslmm)"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
