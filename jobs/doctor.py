"""Look whether this cluster can do a run, before it costs anything: python jobs/doctor.py [arguments of jobs/train.py].

From every node: versions, clock, disk, token, storage, manifest, a video, its decoder, MLflow (where drivers may be),
the GPUs; then a sum over all nodes, and two steps of the run itself. Leaves nothing behind.
On a cluster: ray job submit -- python jobs/doctor.py ...
Exit status: 0 all is well, 1 something is not (the table says what to do), 2 the request was refused.
"""

import logging
import sys
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from crosslmm.cli import fail, parse_run
from crosslmm.config import BadConfig, redacted

if TYPE_CHECKING:
    from crosslmm.preflight.findings import Finding


def main() -> int:
    """Parse, look, print."""
    began = time.monotonic()
    try:
        config = parse_run(sys.argv[1:], description=str(__doc__))
    except BadConfig as error:
        fail(error)
    # Only now what takes seconds to import.
    from crosslmm.doctor.run import run_doctor
    from crosslmm.preflight.findings import merged
    from crosslmm.progress import set_up_logging

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    set_up_logging()
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    findings = merged(run_doctor(config))
    show(console, findings)
    failures = sum(not finding.ok for finding in findings)
    verdict = f"{failures} of {len(findings)} rows need something done" if failures else "all is well"
    if findings[-1].name != "training":
        verdict += "; the run itself was not tried"
    console.print(f"{verdict}  ({time.monotonic() - began:.0f} s)")
    return int(failures > 0)


def show(console: Console, findings: "list[Finding]") -> None:
    """One row for each thing that was looked at, failures with what to do."""
    table = Table(show_lines=any(not finding.ok for finding in findings))
    for column in ("", "what", "where", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for found in findings:
        row = ("ok" if found.ok else "NO", found.name, found.node, redacted(found.said), found.remedy)
        table.add_row(*map(Text, row), style=None if found.ok else "bold red")
    console.print(table)


if __name__ == "__main__":
    raise SystemExit(main())
