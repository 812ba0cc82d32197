"""Kill any part of a run at any moment: does it end with the weights that an undisturbed run has?

    python -m benchmarks.faults [--only WORDS] [--json]

Every fault meets a real run of the tiny model: two FSDP workers on a Ray cluster, videos and checkpoints in a real
object store over HTTP behind a proxy that can misbehave, the record in MLflow. A fault counts as survived when the run,
or the same command given again where the fault took the driver, ends with status 0. Skipped and repeated samples are
counted from the record: every step once, with the loss, to the last bit, of the same step of the undisturbed run (each
worker has checked, too, that the samples of its steps are those that are due). About a minute a fault on two cores.
"""

import argparse
import math
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from benchmarks import report
from benchmarks.faults import ROOT, checkpoints, nodes, processes, surroundings  # noqa: F401  they fill the table
from benchmarks.faults.lab import BATCH, EVERY, FAULTS, GOES_ON, STEPS, Attempt, Fault, Lab, write_data
from tests.support.object_store import object_store_in_use

POLL_S = 2.0
"""How often Ray Train's controller looks at its workers [s]; what they do until then is lost with them."""


@dataclass
class Outcome:
    """A row of the table."""

    fault: str
    survived: bool = False
    steps_lost: int = 0
    """Steps that were taken and recorded, and had to be taken again; the most of one restart."""
    steps_lost_limit: int = 0
    skipped: int = 0
    """Samples."""
    repeated: int = 0
    """Samples."""
    recovery_s: float | None = None
    """From the fault to the line that says where the run goes on; None where it never stopped."""
    weights_identical: bool | None = None
    """None where another number of workers took part, which sum in another order."""
    note: str = ""
    seconds: float = 0.0

    @property
    def nothing_lost(self) -> bool:
        """What is promised."""
        kept = not self.skipped + self.repeated and self.steps_lost <= self.steps_lost_limit
        return self.survived and kept and self.weights_identical is not False


@dataclass(frozen=True)
class Undisturbed:
    """A run to which nothing happened."""

    history: list[tuple[int, float]]
    """(step, loss)."""
    weights: str
    step_s: float


def undisturbed(lab: Lab) -> Undisturbed:
    """What every other run should end like."""
    name = "undisturbed"
    lab.start(name).ended()
    return Undisturbed(lab.history(name), lab.weights(name), lab.step_s(name))


def judge(
    lab: Lab, name: str, given: Outcome, fault: Fault, attempts: list[Attempt], at: float, right: Undisturbed
) -> None:
    """Compare a run that has ended well with the undisturbed one, and fill in its row.

    Args:
        lab: where.
        name: of the run.
        given: what is filled in.
        fault: what came.
        attempts: the starts of the command.
        at: when the fault came [monotonic s].
        right: the undisturbed run.
    """
    given.survived = True
    points = lab.history(name)
    steps = [step for step, _ in points]
    given.skipped = BATCH * len(set(range(1, STEPS + 1)) - set(steps))
    given.repeated = BATCH * (len(steps) - len(set(steps)))
    given.steps_lost = max(lab.lost[name])
    said = [(when, line) for attempt in attempts for when, line in attempt.lines if when > at]
    given.recovery_s = next((when - at for when, line in said if GOES_ON.search(line)), None)
    if lab.weights(name) == right.weights and points == right.history:
        given.weights_identical = True
    elif not fault.other_sums:
        given.weights_identical = False
    elif steps == [step for step, _ in right.history]:
        worst = max(abs(a - b) / b for (_, a), (_, b) in zip(points, right.history, strict=True))
        given.note = f"losses within {worst:.0e}"


def run(lab: Lab, fault: Fault, number: int, right: Undisturbed) -> Outcome:
    """One row."""
    limit = EVERY + math.ceil(POLL_S / right.step_s)
    given, began, name = Outcome(fault.name), time.monotonic(), f"fault-{number}"
    given.steps_lost_limit = 0 if fault.announced else limit
    try:
        attempts, at = fault.cause(lab, name)
        judge(lab, name, given, fault, attempts, at, right)
        if not given.nothing_lost:
            print("\n".join(attempt.text for attempt in attempts), file=sys.stderr, flush=True)
    except Exception as error:
        given.note = f"{type(error).__name__}: {error}"
        print(f"{fault.name}: {given.note}", file=sys.stderr, flush=True)
        try:
            lab.clear()
        except Exception as another:  # the rows that follow say so, one by one
            print(f"the laboratory could not be cleared: {another}", file=sys.stderr, flush=True)
    given.seconds = time.monotonic() - began
    return given


def tabulate(outcomes: list[Outcome]) -> Table:
    """For people."""
    table = Table("fault", "survived", "steps lost", "skipped", "repeated", "recovery s", "weights identical", "note")
    yes = {True: "yes", False: "NO", None: "-"}
    for row in outcomes:
        recovery = "-" if row.recovery_s is None else f"{row.recovery_s:.0f}"
        lost = f"{row.steps_lost} of {row.steps_lost_limit}"
        counts = lost, str(row.skipped), str(row.repeated), recovery
        note = row.note.splitlines()[0][:80] if row.note else ""
        table.add_row(row.fault, yes[row.survived], *counts, yes[row.weights_identical], note)
    table.caption = (
        f"steps lost: of those allowed, which are one checkpoint interval ({EVERY}) and what is done in {POLL_S:g} s, "
        f"and none where the run was told; skipped and repeated: samples of {STEPS * BATCH}; recovery: until it goes "
        "on, workers' start included"
    )
    return table


def main() -> int:
    """Run the faults and print the table -> 0 if all were survived without loss."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="WORDS", help="faults whose names hold one of these, separated by commas")
    parser.add_argument("--json", action="store_true", help="print one last line of JSON")
    arguments = parser.parse_args()
    words = [word.strip() for word in (arguments.only or "").split(",")]
    chosen = [fault for fault in FAULTS if any(word in fault.name for word in words)]
    if not chosen:
        names = "\n".join(f"  {fault.name}" for fault in FAULTS)
        parser.error(f"--only {arguments.only}: no fault's name holds that; there are\n{names}")
    outcomes: list[Outcome] = []
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {line}", flush=True)

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        say("an object store and a Ray cluster start")
        swift = ROOT / ".cache" / "swift-venv"
        store = stack.enter_context(object_store_in_use(folder / "swift", venv=swift, bucket="lab"))
        write_data()
        lab = Lab(stack, folder, store)
        say("a run to which nothing happens")
        right = undisturbed(lab)
        say(f"{STEPS} steps of {right.step_s:.2f} s")
        for number, fault in enumerate(chosen, 1):
            say(f"{number}/{len(chosen)}  {fault.name} ...")
            row = run(lab, fault, number, right)
            outcomes.append(row)
            verdict = "nothing lost" if row.nothing_lost else "survived, BUT NOT WHOLE" if row.survived else "LOST"
            say(f"    {verdict}; {row.steps_lost} steps again of {row.steps_lost_limit} allowed; {row.seconds:.0f} s")
    figures: dict[str, float] = {
        "faults": len(outcomes),
        "survived": sum(row.survived for row in outcomes),
        "skipped": sum(row.skipped for row in outcomes),
        "repeated": sum(row.repeated for row in outcomes),
        "weights_identical": sum(row.weights_identical is not False and row.survived for row in outcomes),
        "steps_lost_max": max(row.steps_lost for row in outcomes),
        "steps_lost_limit": max(row.steps_lost_limit for row in outcomes),
        "seconds": round(time.monotonic() - began),
    }
    report("faults", tabulate(outcomes), figures, [asdict(row) for row in outcomes], arguments.json)
    return 0 if all(row.nothing_lost for row in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
