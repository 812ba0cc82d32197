"""Debian's Prometheus on loopback, which scrapes a Ray cluster as docs/clusters.md says.

with running_prometheus(folder, cluster.folder / "t/prom_metrics_service_discovery.json") as prometheus:
    prometheus.series('ray_crosslmm_step{run=~"first"}')
"""

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

START_SECONDS = 60.0
LOOK_BACK_S = 900
"""How far a query looks back: the series of a driver that has ended are stale."""


@dataclass(frozen=True)
class Prometheus:
    """A running server."""

    port: int

    def series(self, expression: str) -> list[dict[str, Any]]:
        """Return what an expression gave in the last minutes: series of `metric`, its labels, and `values`."""
        now = time.time()
        return self._get("query_range", query=expression, start=now - LOOK_BACK_S, end=now, step=1)["result"]

    def label_values(self, name: str, label: str) -> list[str]:
        """Return what Grafana's `label_values(name, label)` offers."""
        return self._get(f"label/{label}/values", **{"match[]": name})

    def _get(self, path: str, **arguments: Any) -> Any:
        address = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(arguments)}"
        with urllib.request.urlopen(address, timeout=30) as answer:
            return json.loads(answer.read())["data"]


@contextmanager
def running_prometheus(folder: Path, discovery: Path) -> Iterator[Prometheus]:
    """Context manager: runs a server that follows the addresses in `discovery`, with its data in the new `folder`."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.fail("no Prometheus: apt-get install --no-install-recommends prometheus", pytrace=False)
    folder.mkdir()
    scrape = {"job_name": "ray", "scrape_interval": "1s", "file_sd_configs": [{"files": [str(discovery)]}]}
    (folder / "prometheus.yml").write_text(yaml.safe_dump({"scrape_configs": [scrape]}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [program, *options, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log, cwd=folder
        )
    try:
        _await(server, port, folder / "log")
        yield Prometheus(port)
    finally:
        server.terminate()
        server.wait(30)


def _await(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=5).close()
            return
        except OSError:
            assert server.poll() is None and time.monotonic() < until, log.read_text()  # noqa: PT018
            time.sleep(0.2)
