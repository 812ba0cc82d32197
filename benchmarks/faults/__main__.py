"""Inject faults into training runs: does each run end with the weights of an undisturbed run?

    python -m benchmarks.faults [--only WORDS] [--json]

Each fault hits a real run of the tiny model: two FSDP workers on a Ray cluster, videos and checkpoints in a real object
store over HTTP behind a proxy that can fail, the record in MLflow. A fault is survived if the run, or the same command
repeated where the fault killed the driver, ends with status 0. Skipped and repeated samples are counted from MLflow:
each step must be there once, with a loss equal to the last bit to that of the undisturbed run (each worker also checks
that it gets the samples of its steps). One to seven minutes per fault on two cores.
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
from benchmarks.faults import ROOT, checkpoints, nodes, owners, processes, surroundings  # noqa: F401  they register faults
from benchmarks.faults.lab import BATCH, EVERY, FAULTS, RESUMED, STEPS, Attempt, Fault, Lab, write_data
from tests.support.object_store import object_store_in_use

POLL_S = 2.0
"""Interval at which Ray Train's controller polls its workers [s]; their steps until then are lost with them."""


@dataclass
class FaultResult:
    """Result of one fault: a row of the table."""

    fault: str
    survived: bool = False
    steps_lost: int = 0
    """Recorded steps that had to be taken again; the largest number of one restart."""
    steps_lost_limit: int = 0
    skipped: int = 0
    """Samples that no step took."""
    repeated: int = 0
    """Samples that more than one recorded step took."""
    recovery_s: float | None = None
    """From the fault to the log line about the resume [s]; None if the run never stopped."""
    weights_identical: bool | None = None
    """None if another number of workers took part, which sums in another order."""
    note: str = ""
    seconds: float = 0.0

    @property
    def nothing_lost(self) -> bool:
        """Whether the run lost no sample, no more steps than allowed, and has the right weights."""
        complete = not self.skipped + self.repeated and self.steps_lost <= self.steps_lost_limit
        return self.survived and complete and self.weights_identical is not False


@dataclass(frozen=True)
class Reference:
    """An undisturbed run, to compare with."""

    history: list[tuple[int, float]]
    """(step, loss)."""
    weights: str
    """sha256."""
    step_s: float


def run_reference(lab: Lab, number: int, settings: tuple[str, ...]) -> Reference:
    """Run without a fault."""
    name = f"undisturbed-{number}"
    lab.start(name, *settings).wait()
    return Reference(lab.history(name), lab.weights(name), lab.step_s(name))


def judge(
    lab: Lab, name: str, result: FaultResult, fault: Fault, attempts: list[Attempt], at: float, reference: Reference
) -> None:
    """Compare a run that ended with status 0 to the reference, and complete its result.

    Args:
        lab: laboratory of the run.
        name: of the run.
        result: is completed.
        fault: the fault.
        attempts: the starts of the command.
        at: time of the fault [monotonic s].
        reference: the undisturbed run.
    """
    points = lab.history(name)
    steps = [step for step, _ in points]
    result.skipped = BATCH * len(set(range(1, STEPS + 1)) - set(steps))
    result.repeated = BATCH * (len(steps) - len(set(steps)))
    result.steps_lost = max(lab.repeated_steps[name])
    lines = [(when, line) for attempt in attempts for when, line in attempt.lines if when > at]
    result.recovery_s = next((when - at for when, line in lines if RESUMED.search(line)), None)
    if lab.weights(name) == reference.weights and points == reference.history:
        result.weights_identical = True
    elif not fault.order_of_sums_differs:
        result.weights_identical = False
    elif steps == [step for step, _ in reference.history]:
        worst = max(abs(a - b) / b for (_, a), (_, b) in zip(points, reference.history, strict=True))
        result.note = f"losses within {worst:.0e}"
    result.survived = True  # last: what could not be compared has not survived


def run(lab: Lab, fault: Fault, number: int, reference: Reference) -> FaultResult:
    """Run one fault and return its result."""
    limit = EVERY + math.ceil(POLL_S / reference.step_s)
    result, began, name = FaultResult(fault.name), time.monotonic(), f"fault-{number}"
    result.steps_lost_limit = 0 if fault.announced else limit
    try:
        attempts, at = fault.cause(lab, name)
        judge(lab, name, result, fault, attempts, at, reference)
        if not result.nothing_lost:
            print("\n".join(attempt.text for attempt in attempts), file=sys.stderr, flush=True)
    except Exception as error:
        result.note = f"{type(error).__name__}: {error}"
        print(f"{fault.name}: {result.note}", file=sys.stderr, flush=True)
        try:
            lab.clear()
        except Exception as another:  # the following faults will fail one by one
            print(f"the laboratory could not be cleared: {another}", file=sys.stderr, flush=True)
    result.seconds = time.monotonic() - began
    return result


def tabulate(results: list[FaultResult]) -> Table:
    """Return the table that is printed."""
    table = Table("fault", "survived", "steps lost", "skipped", "repeated", "recovery s", "weights identical", "note")
    yes = {True: "yes", False: "NO", None: "-"}
    for row in results:
        recovery = "-" if row.recovery_s is None else f"{row.recovery_s:.0f}"
        lost = f"{row.steps_lost} of {row.steps_lost_limit}"
        counts = lost, str(row.skipped), str(row.repeated), recovery
        note = row.note.splitlines()[0][:80] if row.note else ""
        table.add_row(row.fault, yes[row.survived], *counts, yes[row.weights_identical], note)
    table.caption = (
        f"steps lost: of those allowed, which are one checkpoint interval ({EVERY}) and the steps of {POLL_S:g} s, or "
        f"none for announced faults; skipped and repeated: of {STEPS * BATCH} samples; recovery: until the run "
        "resumes, including the start of workers"
    )
    return table


def main() -> int:
    """Run the faults and print the table; return 0 if all were survived without loss."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", metavar="WORDS", help="only faults whose names contain one of these, separated by commas"
    )
    parser.add_argument("--json", action="store_true", help="print one last line of JSON")
    arguments = parser.parse_args()
    words = [word.strip() for word in (arguments.only or "").split(",")]
    chosen = [fault for fault in FAULTS if any(word in fault.name for word in words)]
    if not chosen:
        names = "\n".join(f"  {fault.name}" for fault in FAULTS)
        parser.error(f"--only {arguments.only}: no fault has such a name; there are\n{names}")
    results: list[FaultResult] = []
    began = time.monotonic()

    def log_line(line: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {line}", flush=True)

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        log_line("starting an object store and a Ray cluster")
        swift = ROOT / ".cache" / "swift-venv"
        store = stack.enter_context(object_store_in_use(folder / "swift", venv=swift, bucket="lab"))
        write_data()
        lab = Lab(stack, folder, store)
        references: dict[tuple[str, ...], Reference] = {}
        for settings in dict.fromkeys(fault.settings for fault in chosen):
            log_line(" ".join(["undisturbed run", *settings]))
            references[settings] = reference = run_reference(lab, len(references), settings)
            log_line(f"{STEPS} steps of {reference.step_s:.2f} s")
        for number, fault in enumerate(chosen, 1):
            log_line(f"{number}/{len(chosen)}  {fault.name} ...")
            row = run(lab, fault, number, references[fault.settings])
            results.append(row)
            verdict = (
                "nothing lost" if row.nothing_lost else "survived, BUT WITH LOSSES" if row.survived else "NOT SURVIVED"
            )
            log_line(
                f"    {verdict}; {row.steps_lost} steps repeated of {row.steps_lost_limit} allowed; {row.seconds:.0f} s"
            )
    figures: dict[str, float] = {
        "faults": len(results),
        "survived": sum(row.survived for row in results),
        "skipped": sum(row.skipped for row in results),
        "repeated": sum(row.repeated for row in results),
        "weights_identical": sum(row.weights_identical is True for row in results),
        "steps_lost_max": max(row.steps_lost for row in results),
        "steps_lost_limit": max(row.steps_lost_limit for row in results),
        "seconds": round(time.monotonic() - began),
    }
    report("faults", tabulate(results), figures, [asdict(row) for row in results], arguments.json)
    return 0 if all(row.nothing_lost for row in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
