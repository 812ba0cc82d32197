"""What MLflow has of runs in storage: python jobs/track.py replay|prune --storage FOLDER.

What a run could not deliver while its MLflow server was away lies in the run's folder. `replay` sends it: parameters,
inputs, points, ledger, status, and the model of a run that finished, in the order in which runs began. What is there
already is not sent again, and runs that are going on may be among them.

`prune` removes runs that are old and that nothing stands on: record, artifacts, versions in the registry, and the run's
folder with its checkpoints. Without --delete true it only says which. What stays: a run that goes on, one whose model
has an alias, the newest ones, and what a run that stays began with.
Exit status: 0 all done, 1 something could not be done (the same command goes on), 2 the request was refused.
"""

import argparse
import sys
import time

from crosslmm import run_folder
from crosslmm.cli import fail
from crosslmm.config import BadConfig, TrackingConfig
from crosslmm.storage.retry import BadLocation


def replay(storage: str, names: list[str], uri: str | None) -> int:
    """Deliver, and print a table."""
    # Only now what takes seconds to import.
    from rich.console import Console
    from rich.table import Table

    from crosslmm import tracking

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, soft_wrap=True)
    table = Table("run", "MLflow run", "points sent", "status", "model")
    missing = []
    for name, folder in run_folder.list_runs(storage, names):
        try:
            done = tracking.replay(folder, uri)
        except Exception as error:  # the next one may have another server, or stores its artifacts elsewhere
            table.add_row(name, "", "", "not delivered", "")
            missing.append(f"{name}: {' '.join(str(error).split())}")
            continue
        status, model = done.status or "not ended", done.model_uri or ""
        table.add_row(name, done.run_id, f"{done.points:,}", status, model)
    console.print(table)
    for line in missing:
        print(f"error: {line}", file=sys.stderr)
    return int(bool(missing))


def prune(storage: str, where: TrackingConfig, older_than: float, keep: int, delete: bool) -> int:
    """Print what goes and what stays, and why, and remove the former."""
    from rich.console import Console
    from rich.table import Table

    from crosslmm import tracking

    if older_than < 0 or keep < 0:
        raise BadConfig("--older_than and --keep: neither can be below 0")
    retention = tracking.Retention(storage, where)
    verdicts = retention.verdicts(older_than, keep)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, soft_wrap=True)
    table = Table("run", "MLflow run", "days", "trials", "versions", "", "why")
    for one in verdicts:
        tree = one.tree
        days = f"{(time.time() - tree.ended) / 86400:.1f}"
        counts = len(tree.runs) - 1, len(tree.versions)
        table.add_row(
            tree.name, tree.run_id, days, *(f"{n:,}" for n in counts), "goes" if one.goes else "stays", one.why
        )
    console.print(table)
    going = [one.tree for one in verdicts if one.goes]
    if not delete:
        console.print(f"{len(going)} of {len(verdicts)} would go; --delete true removes them")
        return 0
    removed = 0
    for tree in going:
        done = retention.remove(tree)
        removed += done
        console.print(f"{tree.name} {'is removed' if done else 'stays: it is in use again'}", markup=False)
    console.print(f"{removed} of {len(verdicts)} removed; `mlflow gc` takes their rows out of MLflow's database")
    return 0


def main() -> int:
    """Parse, do, print."""
    arguments = _parser().parse_args()
    try:
        if arguments.command == "replay":
            return replay(arguments.storage, arguments.name, arguments.uri)
        where = TrackingConfig(uri=arguments.uri, experiment=arguments.experiment)
        return prune(arguments.storage, where, arguments.older_than, arguments.keep, arguments.delete == "true")
    except (BadConfig, BadLocation) as error:
        fail(error)
    except OSError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="command", required=True)
    verb = verbs.add_parser("replay", help="deliver what MLflow does not have yet")
    verb.add_argument("--storage", required=True, help="folder of all runs, path or s3:// URI")
    verb.add_argument(
        "--name", nargs="+", action="extend", default=[], help="of a run, or SWEEP/TRIAL; default: all runs and trials"
    )
    verb.add_argument("--tracking.uri", dest="uri", help="of MLflow; default: the one that each run was told")
    verb = verbs.add_parser("prune", help="remove runs that are old and that nothing stands on")
    verb.add_argument("--storage", required=True, help="folder of all runs, path or s3:// URI")
    verb.add_argument(
        "--older_than", type=float, default=30, metavar="DAYS", help="only what ended so long ago goes (default: 30)"
    )
    verb.add_argument(
        "--keep", type=int, default=10, metavar="N", help="the newest so many stay whatever their age (default: 10)"
    )
    verb.add_argument(
        "--delete", choices=["true", "false"], default="false", help="remove them; otherwise it is only said"
    )
    verb.add_argument("--tracking.uri", dest="uri", help="of MLflow; default: MLFLOW_TRACKING_URI, or ./mlflow.db")
    verb.add_argument("--tracking.experiment", dest="experiment", default="crosslmm", help="(default: crosslmm)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
