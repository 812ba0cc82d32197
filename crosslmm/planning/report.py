"""Prints a plan as a table."""

import json
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from crosslmm.planning.assumptions import Range
from crosslmm.planning.plan import Plan, Row

NOT_INCLUDED = (
    "not in the price: machines without GPUs (head, MLflow, decoders beyond the GPU machines' own cores), validations, "
    "steps repeated after a failure, disks, storage before and after the run"
)

IN_FLOAT8 = (
    "train.float8: planned as in bf16, so the speed is a lower limit; without train.compile, frozen layers keep their "
    "inputs for the backward pass, which is not in the memory"
)


def print_plan(planned: Plan, console: Console) -> None:
    """Print a plan as a table, with one column for each number of frames, and the assumptions."""
    parameters = planned.parameters
    parts = ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in parameters.components.items() if count)
    console.print(f"parameters  {parameters.total / 1e9:.3f} B: {parts}")
    learning = ", ".join(f"{stage} {count / 1e6:,.1f} M" for stage, count in parameters.trainable.items())
    console.print(f"trainable   {learning}")
    gpu = planned.assumptions["gpu"]
    table = Table(title=f"{planned.gpus} x {gpu}", title_justify="left")
    table.add_column("frames per video", no_wrap=True)
    for row in planned.rows:
        table.add_column(str(row.frames), justify="right")
    columns = [list(_lines(row)) for row in planned.rows]
    for i, (label, _) in enumerate(columns[0]):
        table.add_row(
            label,
            *(column[i][1] for column in columns),
            end_section=label.startswith(("prefill MACs: all", "training memory per GPU: total", "fits", "features")),
        )
    console.print(table)
    for row in planned.rows:
        if row.nearest_fit is not None:
            size = f"{row.nearest_fit.peak_memory_bytes / 1e9:,.1f} GB"
            console.print(f"{row.frames} frames would fit with {row.nearest_fit.change}  ({size})")
        elif not row.fits:
            console.print(f"{row.frames} frames do not fit with any setting that was tried")
    if hybrid := [row for row in planned.rows if row.hybrid]:
        console.print(_recommendation(max(hybrid, key=lambda row: row.frames)))
    if planned.float8:
        console.print(IN_FLOAT8)
    console.print(NOT_INCLUDED)
    console.print("assumptions (change one with its argument):")
    for name, value in {**planned.assumptions, "price": planned.price}.items():
        console.print(f"  --{name} {json.dumps(value)}")


def _recommendation(row: Row) -> str:
    """Return why each node should hold a copy of the model."""
    hybrid = row.hybrid
    assert hybrid is not None
    return (
        f"{hybrid.nodes} nodes of {hybrid.gpus_per_node} GPUs: --scaling.workers_per_replica {hybrid.gpus_per_node} "
        f"gives each a copy of the model; {row.frames} frames take {hybrid.peak_memory_bytes / 1e9:,.1f} GB per GPU. "
        f"In a step a node then receives {hybrid.received_bytes_hybrid / 1e9:,.1f} GB (gradients, once) instead of "
        f"{hybrid.received_bytes / 1e9:,.1f} GB or more (weights and gradients, {hybrid.micro_batches} times)"
    )


def _lines(row: Row) -> Iterator[tuple[str, str]]:
    """Yield the label and the value of each line of a column."""
    yield "positions in the decoder", f"{row.positions:,}"
    for name, count in row.macs.items():
        yield f"prefill MACs: {name.replace('_', ' ')} [T]", f"{count / 1e12:,.2f}"
    yield "prefill MACs: all but the attention products [T]", f"{row.linear_macs / 1e12:,.2f}"
    for name, size in row.memory_bytes.items():
        if name != "kv_caches":
            yield f"training memory per GPU: {name} [GB]", f"{size / 1e9:,.2f}"
    yield "training memory per GPU: total [GB]", f"{row.peak_memory_bytes / 1e9:,.2f}"
    yield "answering: KV caches for one video [GB]", f"{row.answering_memory_bytes['kv_caches'] / 1e9:,.2f}"
    yield "answering: total [GB]", f"{sum(row.answering_memory_bytes.values()) / 1e9:,.2f}"
    yield "fits", "yes" if row.fits else "no"
    yield "recomputed in the backward pass: encoder, decoder", ", ".join(row.checkpointing.values())
    yield "training FLOPs per sample: model [T]", f"{row.training_flops_per_sample / 1e12:,.2f}"
    yield "training FLOPs per sample: recomputed [T]", f"{row.recomputed_flops_per_sample / 1e12:,.2f}"
    yield "HFU, assumed", _range(row.hfu, ".2f")
    yield "MFU", _range(row.mfu, ".2f")
    yield "samples per second and GPU", _range(row.samples_per_s, ",.3f")
    yield "CPU cores for decoding per GPU", _range(row.decode_cores, ",.2f")
    yield "storage bandwidth per GPU [MB/s]", _range(row.s3_bytes_per_s, ",.2f", 1e6)
    yield "traffic per epoch [TB]", f"{row.epoch_traffic_bytes / 1e12:,.2f}"
    yield "storage: videos, checkpoints, model [TB]", f"{row.storage_bytes / 1e12:,.2f}"
    yield "features of all videos, if stored in bf16 [TB]", f"{row.features_bytes / 1e12:,.2f}"
    yield "hours of the run", _range(row.run_hours, ",.1f")
    yield "price: GPUs [USD]", _range(row.price.gpus, ",.0f")
    yield "price: reading the videos, traffic and requests [USD]", f"{row.price.reading:,.0f}"
    yield "price: storage per month [USD]", f"{row.price.storage_month:,.0f}"
    yield "price of the run, storage while it lasts included [USD]", _range(row.price.total, ",.0f")


def _range(values: Range, form: str, unit: float = 1.0) -> str:
    """Return "low to high"; one number where both read alike."""
    low, high = (format(value / unit, form) for value in values)
    return low if low == high else f"{low} to {high}"
