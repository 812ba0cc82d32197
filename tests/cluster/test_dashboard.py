"""cluster/grafana.json over a real Prometheus that scrapes a real run: every expression gives data."""

import json
import subprocess

import pytest

from cluster.local.cluster import LocalCluster
from crosslmm.data.samples.shapes import write_sample_set
from tests.support.common import ROOT
from tests.support.prometheus import running_prometheus

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
SMALL = [
    "--config=tiny", "--name=drawn", "--train.epochs=99", "--train.max_steps=30", "--train.global_batch_size=8",
    "--train.micro_batch_size=4", "--train.warmup_steps=1", "--train.validate_every=30", "--train.checkpoint_every=10",
]  # fmt: skip


def test_every_expression_of_the_dashboard_gives_data(tmp_path):
    dashboard = json.loads((ROOT / "cluster" / "grafana.json").read_text())
    write_sample_set(str(tmp_path / "data"), train=24, held_out=4)
    places = [f"--storage={tmp_path}/runs", f"--tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    places += [f"--data.manifest={tmp_path}/data/train.jsonl"]
    with (
        LocalCluster(num_cpus=2) as cluster,
        running_prometheus(
            tmp_path / "prometheus", cluster.folder / "t/prom_metrics_service_discovery.json"
        ) as prometheus,
    ):
        command = cluster.submit("python", "jobs/train.py", *SMALL, *places)
        done = subprocess.run(command, env=cluster.environment, cwd="/", capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr

        expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
        given = {text: prometheus.series(text.replace("$run", "drawn|another")) for text in expressions}
        assert [text for text, series in given.items() if not series] == []
        for text, series in given.items():
            assert {one["metric"]["run"] for one in series} == {"drawn"}, text
        # What was set once, such as the time of a checkpoint, is there as long as what each step sets.
        last_step = last_of(prometheus.series("ray_crosslmm_step"))
        assert [text for text, series in given.items() if last_of(series) < last_step - 5] == []
        assert prometheus.label_values("ray_crosslmm_step", "run") == ["drawn"]
        # What is drawn is what the run did.
        (progress,) = [text for text in expressions if "total_steps" in text]
        assert 0 < max(float(value) for one in given[progress] for _, value in one["values"]) <= 1


def last_of(series):
    """Return the time of the last value [unix time, s]."""
    return max(when for one in series for when, _ in one["values"])
