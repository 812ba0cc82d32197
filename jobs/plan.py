"""Say what a run will need and cost, before anything is rented: python jobs/plan.py --config paper-2b [--frames 32,64].

No weights are loaded and no GPU is needed: the model is run on the meta device. Takes the configuration and overrides
that jobs/train.py takes. Exit status: 0 planned (whether it fits or not), 2 the request was refused.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from crosslmm.cli import fail, parse_job
from crosslmm.config import BadConfig, validate_run

if TYPE_CHECKING:
    from crosslmm.planning.plan import Plan, Row


def main() -> int:
    """Parse, plan, print."""
    from crosslmm.planning.plan import Assumptions, plan

    def add_own(parser: ArgumentParser) -> None:
        parser.add_argument("--frames", type=str, metavar="N[,N...]",
                            help="frames of a video, one row each (default: data.num_frames)")  # fmt: skip
        parser.add_argument("--gpus", type=int, metavar="N", help="short for --scaling.num_workers")
        parser.add_argument("--json", action="store_true", help="print one JSON object, in plain counts, and no table")
        parser.add_class_arguments(Assumptions, fail_untyped=False)

    try:
        config, own = parse_job(sys.argv[1:], str(__doc__), add_own, default="paper-2b")
        frames, gpus, as_json = own.pop("frames"), own.pop("gpus"), own.pop("json")
        if gpus is not None:
            values = config.model_dump()
            values["scaling"]["num_workers"] = gpus
            config = validate_run(values)
        counts = [config.data.num_frames] if frames is None else frame_counts(frames)
        planned = plan(config, counts, Assumptions(**own))
    except BadConfig as error:
        fail(error)
    if as_json:
        print(json.dumps(dataclasses.asdict(planned)))
    else:
        show(planned)
    return 0


def frame_counts(text: str) -> list[int]:
    """32,64 -> [32, 64].

    Raises:
        BadConfig: anything else.
    """
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(counts) < 1:
        raise BadConfig(f"--frames {text}: a number of frames of at least 1, or several as in 32,64")
    return counts


def show(planned: "Plan") -> None:
    """A table for people: one column for each number of frames."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    parameters = planned.parameters
    parts = ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in parameters.components.items() if count)
    console.print(f"parameters  {parameters.total / 1e9:.3f} B: {parts}")
    learning = ", ".join(f"{stage} {count / 1e6:,.1f} M" for stage, count in parameters.trainable.items())
    console.print(f"trainable   {learning}")
    gpu = planned.assumptions["gpu"]
    table = Table(title=f"{planned.gpus} x {gpu}", title_justify="left")
    table.add_column("frames of a video", no_wrap=True)
    for row in planned.rows:
        table.add_column(str(row.frames), justify="right")
    columns = [list(_lines(row)) for row in planned.rows]
    for i, (label, _) in enumerate(columns[0]):
        table.add_row(
            label,
            *(column[i][1] for column in columns),
            end_section=label.startswith(("prefill MACs: all", "training memory of a GPU: all", "fits")),
        )
    console.print(table)
    for row in planned.rows:
        if row.nearest_fit is not None:
            size = f"{row.nearest_fit.peak_memory_bytes / 1e9:,.1f} GB"
            console.print(f"{row.frames} frames would fit with {row.nearest_fit.change}  ({size})")
        elif not row.fits:
            console.print(f"{row.frames} frames fit with no setting that was tried")
    console.print("assumed, each an argument of that name:")
    for name, value in {**planned.assumptions, "price": planned.price}.items():
        console.print(f"  --{name} {value}")


def _lines(row: "Row") -> Iterator[tuple[str, str]]:
    """Label and value of each line of a column."""
    yield "positions in the decoder", f"{row.positions:,}"
    for name, count in row.macs.items():
        yield f"prefill MACs: {name.replace('_', ' ')} [T]", f"{count / 1e12:,.2f}"
    yield "prefill MACs: all but the products [T]", f"{row.linear_macs / 1e12:,.2f}"
    for name, size in row.memory_bytes.items():
        if name != "kv_caches":
            yield f"training memory of a GPU: {name} [GB]", f"{size / 1e9:,.2f}"
    yield "training memory of a GPU: all [GB]", f"{row.peak_memory_bytes / 1e9:,.2f}"
    yield "answering: KV caches of one video [GB]", f"{row.answering_memory_bytes['kv_caches'] / 1e9:,.2f}"
    yield "answering: weights, caches and all else [GB]", f"{sum(row.answering_memory_bytes.values()) / 1e9:,.2f}"
    yield "fits", "yes" if row.fits else "no"
    yield "samples a second and GPU", f"{row.samples_per_s:,.3f}"
    yield "decode cores that one GPU keeps busy", f"{row.decode_cores:,.2f}"
    yield "S3 bandwidth that one GPU consumes [MB/s]", f"{row.s3_bytes_per_s / 1e6:,.2f}"
    yield "traffic of an epoch [TB]", f"{row.epoch_traffic_bytes / 1e12:,.2f}"
    yield "storage: videos, checkpoints, model [TB]", f"{row.storage_bytes / 1e12:,.2f}"
    yield "hours of the run", f"{row.run_hours:,.1f}"
    yield "price of the run [USD]", f"{row.run_price:,.0f}"


if __name__ == "__main__":
    raise SystemExit(main())
