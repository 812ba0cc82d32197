"""Bring MLflow up to what runs have in storage: python jobs/track.py replay --storage FOLDER [--name NAME ...].

What a run could not deliver while its MLflow server was away lies in the run's folder. `replay` sends it: parameters,
inputs, points, ledger, status, and the model of a run that finished, in the order in which runs began. What is there
already is not sent again, and runs that are going on may be among them.
Exit status: 0 MLflow has it all, 1 something could not be delivered (the same command goes on), 2 the request was
refused.
"""

import argparse
import sys

from crosslmm.command_line import fail
from crosslmm.config import BadConfig


def replay(storage: str, names: list[str], uri: str | None) -> int:
    """Deliver, and print a table."""
    # Only now what takes seconds to import.
    from rich.console import Console
    from rich.table import Table

    from crosslmm import tracking
    from crosslmm.storage import BadLocation

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, soft_wrap=True)
    table = Table("run", "MLflow run", "points sent", "status", "model")
    missing = []
    try:
        for name, folder in tracking.runs(storage, names):
            try:
                done = tracking.replay(folder, uri)
            except Exception as error:  # the next one may have another server, or stores its artifacts elsewhere
                table.add_row(name, "", "", "not delivered", "")
                missing.append(f"{name}: {' '.join(str(error).split())}")
                continue
            status, model = done.status or "not ended", done.model_uri or ""
            table.add_row(name, done.run_id, f"{done.points:,}", status, model)
    except (BadConfig, BadLocation) as error:
        fail(error)
    console.print(table)
    for line in missing:
        print(f"error: {line}", file=sys.stderr)
    return int(bool(missing))


def main() -> int:
    """Parse, deliver, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verb = parser.add_subparsers(dest="command", required=True).add_parser(
        "replay", help="deliver what MLflow does not have yet"
    )
    verb.add_argument("--storage", required=True, help="folder of all runs, path or s3:// URI")
    verb.add_argument(
        "--name", nargs="+", action="extend", default=[], help="of a run, or SWEEP/TRIAL; default: all runs and trials"
    )
    verb.add_argument("--tracking.uri", dest="uri", help="of MLflow; default: the one that each run was told")
    arguments = parser.parse_args()
    return replay(arguments.storage, arguments.name, arguments.uri)


if __name__ == "__main__":
    raise SystemExit(main())
