"""Check that this cluster can carry out a run, before it costs anything.

    python jobs/doctor.py [arguments of jobs/train.py]

On every node: versions, clock, disk, token, storage, manifest, one video, the decoder, MLflow (where drivers may run),
GPUs; then an all-reduce over all nodes, and two steps of the run itself. Leaves nothing behind.
On a cluster: ray job submit -- python jobs/doctor.py ...
Exit status: 0 all checks passed, 1 a check failed (the table says what to do), 2 the arguments are invalid.
"""

import logging
import sys
import time
from typing import TYPE_CHECKING

import rich
from rich.table import Table

from crosslmm.cli import fail, parse_run
from crosslmm.config import BadConfig
from crosslmm.progress import cell, set_up_logging

if TYPE_CHECKING:
    from crosslmm.preflight.findings import Finding

TABLE_WIDTH = 160
"""Width of the table in a file or pipe; its remedies are long [characters]."""


def main() -> int:
    """Parse the arguments, run the checks, print the table."""
    began = time.monotonic()
    try:
        config = parse_run(sys.argv[1:], description=str(__doc__))
        set_up_logging(config.name)
    except BadConfig as error:
        fail(error)
    # These take seconds to import: refuse invalid arguments first.
    from crosslmm.doctor.run import run_doctor
    from crosslmm.preflight.findings import merge_nodes
    from crosslmm.tracking import quiet_mlflow

    quiet_mlflow()
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    findings = merge_nodes(run_doctor(config))
    console = rich.get_console()
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    console.print(_table(findings))
    failures = sum(not finding.ok for finding in findings)
    verdict = f"{failures} of {len(findings)} checks failed" if failures else "all checks passed"
    if findings[-1].name != "training":
        verdict += "; the two training steps were not run"
    console.print(f"{verdict}  ({time.monotonic() - began:.0f} s)")
    return int(failures > 0)


def _table(findings: "list[Finding]") -> Table:
    """One row per finding."""
    table = Table(show_lines=any(not finding.ok for finding in findings))
    for column in ("", "check", "node", "result", "what to do"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        status = "ok" if finding.ok else "FAIL"
        row = (status, finding.name, finding.node, finding.message, finding.remedy)
        table.add_row(*map(cell, row), style=None if finding.ok else "bold red")
    return table


if __name__ == "__main__":
    raise SystemExit(main())
