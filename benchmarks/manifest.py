"""A manifest of ten million rows: time to the first batch, and memory of each process.

    python -m benchmarks.manifest --json

Prepared manifests of one and of ten million rows (text alone, so that nothing is decoded) are written to a local folder
and read as training does: order, token estimates for balanced ranks, Ray Data. Each size is measured in a separate
process with a separate Ray cluster. Figures for each size: `first_batch_s`, from opening the manifest to the ids of the
first 128 rows, without the start of the cluster; `rows_per_s` after that; `driver_mib` and `reader_mib`, peak resident
memory of the driver and of Ray's largest worker, memory shared with the object store included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import ray
from rich.table import Table

from benchmarks import report
from benchmarks.data import start_ray
from crosslmm.config import DataConfig
from crosslmm.data import manifest_shards
from crosslmm.data.dataset import BlockLayout, build_dataset, rows_per_block, unpack_block
from crosslmm.data.frame_sampling import FrameSampling
from crosslmm.data.manifest import Manifest, Rows
from crosslmm.data.sampler import DeterministicSampler

SIZES = {"1m": 1_000_000, "10m": 10_000_000}
PART_ROWS, BATCH, BLOCKS, SIDE = 250_000, 256, 40, 64
LIMITS = {"driver_mib_10m": "< 2048"}
WORDS = "the answer to a question about a long video, in so many words as people write, " * 3


def write_manifest(folder: str, rows: int) -> None:
    """Write a prepared manifest of conversations of about 400 characters."""
    parts, lengths = [], []
    for number, start in enumerate(range(0, rows, PART_ROWS)):
        numbers = pa.array(np.arange(start, min(start + PART_ROWS, rows))).cast(pa.string())
        count = len(numbers)
        json_pieces = [
            '[{"role": "user", "content": "Question ',
            f'?"}}, {{"role": "assistant", "content": "{WORDS}',
            '"}]',
        ]
        # Half of each answer is random, or the file would compress to almost nothing.
        hexadecimal = np.random.default_rng(number).bytes(count * 100).hex()
        unique = pa.array([hexadecimal[i : i + 200] for i in range(0, len(hexadecimal), 200)])
        no_durations = pa.array([[]] * count, pa.list_(pa.float32()))
        table = pa.table(
            {
                "id": pc.binary_join_element_wise("row", numbers, " "),
                "videos": pa.array([[]] * count, pa.list_(pa.string())),
                "messages": pc.binary_join_element_wise(
                    json_pieces[0], numbers, json_pieces[1], unique, json_pieces[2], ""
                ),
                "kind": pa.nulls(count, pa.string()),
                "line": pa.array(np.arange(start + 1, start + count + 1)),
                "chars": pa.array(np.random.default_rng(number).integers(100, 1000, count), pa.int32()),
                "seconds": no_durations,
            }
        )
        parts.append(manifest_shards.write_part(folder, number, table))
        lengths.append(table.select(manifest_shards.LENGTH_COLUMNS))
    manifest_shards.seal(folder, parts, pa.concat_tables(lengths), {"made_by": "benchmarks.manifest"})


def measure(folder: str) -> dict[str, Any]:
    """Read the manifest as training does. Runs in a separate process for each size."""
    start_ray()
    began = time.perf_counter()
    data = DataConfig(num_frames=4)
    manifest = Manifest(folder)
    lengths = manifest.estimate_tokens(FrameSampling(data.num_frames), tokens_per_frame=9)
    order = DeterministicSampler((len(manifest),), BATCH, seed=0)
    layout = BlockLayout(order, 2, 0, order.steps_per_epoch, rows_per_block(data, SIDE), lengths)
    planned = time.perf_counter() - began
    dataset = build_dataset(layout, ray.put(Rows([manifest])), data, SIDE, workers=2, cpus_per_worker=0.5)
    ids: list[str] = []
    first = 0.0
    for number, block in enumerate(dataset.iter_batches(batch_size=1, prefetch_batches=2)):
        ids += [sample.id for sample in unpack_block(block)]
        first = first or time.perf_counter() - began
        if number == BLOCKS:
            peaks = _peaks_mib()  # before the workers end
            break
    rate = BLOCKS * layout.rows_per_block / (time.perf_counter() - began - first)
    rows = order.rows_at(np.concatenate([layout.positions(block) for block in range(BLOCKS + 1)]))[0]
    assert ids == [f"row {row}" for row in rows], "the rows differ from those of the sampler"
    return {
        "planned_s": planned,
        "first_batch_s": first,
        "rows_per_s": rate,
        "driver_mib": peaks.pop("driver"),
        "reader_mib": next(peak for name, peak in peaks.items() if name.startswith("ray::MapWorker")),
        "others_mib": {name: round(peak) for name, peak in sorted(peaks.items())},
    }


def _peaks_mib() -> dict[str, float]:
    """Return the peak resident memory of this process and of its children, the largest of each name [MiB]."""
    peaks = {"driver": _peak_mib(os.getpid())}
    for process in psutil.Process().children(recursive=True):
        name = process.name()
        peaks[name] = max(peaks.get(name, 0.0), _peak_mib(process.pid))
    return peaks


def _peak_mib(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # the process has ended
        return 0.0
    peak = next((line for line in status.splitlines() if line.startswith("VmHWM:")), "VmHWM: 0 kB")
    return int(peak.split()[1]) / 1024


def main() -> None:
    """Write the manifests, measure, and print each figure next to its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--measure", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    figures: dict[str, float] = {}
    detail: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in SIZES.items():
            began = time.perf_counter()
            write_manifest(f"{folder}/{name}", rows)
            print(f"wrote {rows} rows in {time.perf_counter() - began:.0f} s", file=sys.stderr)
            command = [sys.executable, "-m", "benchmarks.manifest", "--measure", f"{folder}/{name}"]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            measured = json.loads(
                next(line for line in printed.splitlines() if line.startswith("{"))
            )  # skip Ray's lines
            size = sum(path.stat().st_size for path in Path(folder, name).iterdir())
            detail[name] = {"rows": rows, "file_mb": size / 1e6, **measured}
            figures |= {f"{key}_{name}": value for key, value in measured.items() if isinstance(value, float)}
    for key in ("first_batch_s", "driver_mib", "reader_mib"):
        figures[f"{key}_10m_over_1m"] = figures[f"{key}_10m"] / figures[f"{key}_1m"]
    table = Table("figure", "measured", "limit", title="manifest")
    for figure, value in figures.items():
        table.add_row(figure, f"{value:.3g}" if value < 100 else f"{value:.0f}", LIMITS.get(figure, ""))
    report("manifest", table, figures, detail, arguments.json)


if __name__ == "__main__":
    main()
