"""Side-by-side measurements. Each is a command that prints a table with limits next to the results."""

import json
import os
import platform
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def report(benchmark: str, table: Table, figures: dict[str, float], detail: Any, as_json: bool) -> None:
    """Print the table and, with `as_json`, one JSON object as the last line."""
    Console(width=None if os.isatty(1) else 190).print(table)
    if as_json:
        machine = {
            "cpu": platform.processor() or platform.machine(),
            "cpus": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "torch": torch.__version__,
        }
        print(json.dumps({"benchmark": benchmark, "figures": figures, "detail": detail, "machine": machine}))
