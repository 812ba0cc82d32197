"""Time saved by encoding a sweep's videos once, and accuracy lost to rounding: python -m benchmarks.sweep [--json].

The sweep is real, and run twice: `jobs/tune.py` with a Ray cluster of its own, a grid of N = 8 trials behind a frozen
encoder, one after the other, with `--features bf16` and with `--features never`. Encoder and decoder stand in the
proportion of the 2B's, by the planner's multiply-accumulates of a prefill.

`cost_over_uncached`: encoding, and training of all trials from features / training of all trials from videos.
`ideal`: (E + N T) / (N (E + T)), T a trial's mean time from features and E what videos add to it.
`measured_over_ideal`: the one over the other; what encoding apart from training costs more than encoding in between.
`loss_difference_max`: of the trials' losses, pair by pair and step by step, as a share of the one from videos.
`bytes_per_frame_bf16`, `bytes_per_frame_int8`: files of the store / frames in it.
`accuracy_lost_bf16`, `accuracy_lost_int8`: exact match on held-out clips of the sample set by models trained as the
    `tiny-sweep` preset trains, from float32 features, less that from rounded ones; means of three seeds of all but the
    encoder.

Times leave out what Ray, workers and data pipelines take to start, for trials that are worth a sweep last hours:
encoding counts from its first block's start to its last one's end, a trial as its record has its steps (the first one,
which waits for the pipeline, as the mean of the others), without validation. `detail` has the same figures by whole
`train_s`, where the pipelines' start is in, and the whole wall clock. Decoding these small clips costs next to nothing,
and each trial sees each clip once: where videos are longer, or seen again, the cache saves more.
About a quarter of an hour on two cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import psutil
from mlflow.tracking import MlflowClient
from rich.table import Table

from benchmarks import report, rounding
from crosslmm.cli import parse_run, start_job
from crosslmm.config import RunConfig
from crosslmm.data.feature_cache import FeatureCache, create_feature_folder, write_index, write_shard
from crosslmm.data.feature_format import from_bf16
from crosslmm.data.frame_sampling import SampledFrames
from crosslmm.data.manifest import Manifest
from crosslmm.data.samples import shapes
from crosslmm.encode import recipe
from crosslmm.run_folder import SWEEP_FILE
from crosslmm.sweep import trials
from crosslmm.sweep.search import prefill_macs
from crosslmm.sweep.trials import Trial

ROOT = Path(__file__).parent.parent
CLIPS, HELD_OUT, BATCH = 48, 2, 2
SPACE = """from ray import tune

def space(config):
    return {
        "model.pool_stride": tune.grid_search([7, 9, 14, 27]),
        "train.learning_rate.decoder": tune.grid_search([5e-4, 1e-3]),
    }
"""
MODEL = {
    # 27 x 27 patches, as the 2B's. The feed-forward's width makes the proportion: a little more than the 2B's in the
    # mean of the trials, a little less at the 2B's own 9 tokens a frame.
    "model.vision": {"hidden_size": 128, "intermediate_size": 288, "num_hidden_layers": 6, "num_attention_heads": 4,
                     "image_size": 378, "patch_size": 14},
    "model.language": {"model_type": "qwen2", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8,
                       "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
                       "max_position_embeddings": 2048, "tie_word_embeddings": True},
    "model.pool_stride": 9,
    "model.cross_attention_every": 4,
    "data.num_frames": shapes.FRAMES,
}  # fmt: skip
TRAINING = {
    "train.learning_rate.vision": 0,
    "train.epochs": 1,
    "train.max_steps": CLIPS // BATCH,
    "train.global_batch_size": BATCH,
    "train.micro_batch_size": BATCH,
    "train.warmup_steps": 4,
    "train.validate_every": CLIPS,  # and at the end
    "train.checkpoint_every": CLIPS,
    "scaling.num_workers": 1,
    "scaling.cpus_per_worker": 1,
    "scaling.decode_workers": 1,
    "scaling.cpus_per_decode_worker": 0.25,
}
ARMS = {"features": "bf16", "videos": "never"}
LIMITS = {
    "measured_over_ideal": (1.15, ""),
    # Rounding to bf16 takes 2^-8 of a value at most, either way; losses depend on thousands of values. docs/log.md has
    # 3e-5 after 20 steps of `tiny`, and with the features of another clip these losses here change by 4e-3 to 6e-3.
    "loss_difference_max": (2e-4, ", for rounding to bf16; another clip's features give 4e-3 or more"),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    as_json = parser.parse_args().json
    start_job()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sweep-") as name:
        folder = Path(name)
        shapes.write_sample_set(str(folder / "data"), train=CLIPS, held_out=HELD_OUT)
        (folder / "space.py").write_text(SPACE)
        sweeps = {arm: run_sweep(folder, arm) for arm in ARMS}
        sizes = bytes_per_frame(folder)
    figures, detail = compare(sweeps)
    figures |= {f"bytes_per_frame_{dtype}": size for dtype, size in sizes.items()}
    detail["bytes_per_frame_2b"] = {
        dtype: recipe.recipe_of(two_b(), "", dtype).frame_bytes for dtype in rounding.DTYPES
    }
    detail["accuracy"] = rounding.accuracy_by_format()
    figures |= rounding.lost(detail["accuracy"])
    detail["total_s"] = time.perf_counter() - began
    report("sweep", _table(figures, detail), figures, detail, as_json)


def two_b() -> RunConfig:
    """Return the configuration of CrossLMM-2B."""
    return parse_run(["--config=paper-2b"], "")


def arguments(values: dict[str, Any]) -> list[str]:
    """Return settings as command-line arguments."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def run_sweep(folder: Path, arm: str) -> dict[str, Any]:
    """Run one sweep -> its trials, their losses and step times, the encoding time and the wall clock [s].

    Raises:
        SystemExit: the sweep failed.
    """
    places = {
        "data.manifest": str(folder / "data" / "train.jsonl"),
        "data.validation_manifest": str(folder / "data" / "held_out.jsonl"),
        "storage": str(folder / "runs"),
        "tracking.uri": f"sqlite:///{folder}/mlflow.db",
        "name": f"from-{arm}",  # `features` is the folder of the store
    }
    how = ["--space", str(folder / "space.py"), "--scheduler", "none", "--concurrent", "1", "--features", ARMS[arm]]
    command = [sys.executable, str(ROOT / "jobs" / "tune.py"), *arguments(MODEL | TRAINING | places), *how]
    began = time.perf_counter()
    with running(command, folder) as process:
        status = process.wait()
    if status:
        raise SystemExit(f"error: the sweep from {arm} ended with status {status}")
    client, sweep = MlflowClient(places["tracking.uri"]), folder / "runs" / places["name"]
    done = trials.read(str(sweep))
    settled = json.loads((sweep / SWEEP_FILE).read_text())
    return {
        "wall_s": time.perf_counter() - began,
        "encoding_s": client.get_run(settled["run_id"]).data.metrics.get("cost/encoding_s", 0.0),
        "trials": [asdict(trial) for trial in done],
        "losses": [history(client, trial, "loss") for trial in done],
        "step_s": [[BATCH / rate for rate in history(client, trial, "samples_per_s")] for trial in done],
    }


@contextmanager
def running(command: Sequence[str], folder: Path) -> Iterator[subprocess.Popen]:
    """Run a command that starts a Ray cluster, and kill all their processes at the end. Output goes to stderr."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
    # MLflow writes files to the working directory.
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=sys.stderr, start_new_session=True)
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        for one in psutil.process_iter():
            with suppress(OSError, psutil.NoSuchProcess):
                if os.getsid(one.pid) == process.pid:
                    one.kill()
        process.wait()


def history(client: MlflowClient, trial: Trial, name: str) -> list[float]:
    """Return a metric of each step, from the trial's MLflow run."""
    metrics = client.get_metric_history(str(trial.run_id), name)
    return [metric.value for metric in sorted(metrics, key=lambda metric: metric.step)]


def compare(sweeps: dict[str, dict[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """Compare both sweeps -> figures, and the values behind them."""
    cached, uncached = sweeps["features"], sweeps["videos"]
    points = [[trial["point"] for trial in sweep["trials"]] for sweep in (cached, uncached)]
    assert points[0] == points[1], "the sweeps tried different points"
    steps = {arm: [steps_seconds(step_s) for step_s in sweep["step_s"]] for arm, sweep in sweeps.items()}
    whole = {arm: [float(trial["train_s"]) for trial in sweep["trials"]] for arm, sweep in sweeps.items()}
    behind = statistics.mean(steps["features"])
    differences = [
        max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
        for ours, theirs in zip(cached["losses"], uncached["losses"], strict=True)
    ]
    return costs(cached["encoding_s"], **steps) | {"loss_difference_max": max(differences)}, {
        "seconds": {"encoding": cached["encoding_s"], "E": statistics.mean(steps["videos"]) - behind, "T": behind},
        "trials_s": steps,
        "by_train_s": costs(cached["encoding_s"], **whole),
        "loss_differences": differences,
        "proportions": proportions(cached["trials"]),
        "sweeps": sweeps,
    }


def steps_seconds(step_s: Sequence[float]) -> float:
    """Return the time of a trial's steps; the first one waits for the pipeline, and counts as the mean of the rest."""
    return statistics.mean(step_s[1:]) * len(step_s)


def costs(encoding_s: float, features: Sequence[float], videos: Sequence[float]) -> dict[str, float]:
    """Compute the figures from the encoding time and each trial's time from features and from videos [s]."""
    behind, count = statistics.mean(features), len(videos)
    encoder = statistics.mean(videos) - behind
    measured = (encoding_s + sum(features)) / sum(videos)
    ideal = (encoder + count * behind) / (count * (encoder + behind))
    return {"cost_over_uncached": measured, "ideal": ideal, "measured_over_ideal": measured / ideal}


def proportions(done: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return encoder MACs / other MACs of a prefill: the 2B, this configuration, and all its trials together."""
    (behind_2b, encoder_2b), (behind, encoder) = prefill_macs(two_b()), prefill_macs(parse_run(arguments(MODEL), ""))
    of_trials = sum(trial["encoder_macs"] for trial in done) / sum(trial["macs"] for trial in done)
    return {"the 2B": encoder_2b / behind_2b, "here": encoder / behind, "mean of the trials": of_trials}


def bytes_per_frame(folder: Path) -> dict[str, float]:
    """Return the bytes per frame of the sweep's feature folder, and of an int8 one with the same videos."""
    (place,) = (folder / "runs" / "features").iterdir()
    store = FeatureCache(str(place))
    rows = [row for split in rounding.SPLITS for row in Manifest(f"{folder}/data/{split}.jsonl").rows]
    uris = [row["videos"][0] for row in rows]
    stored = [cast("SampledFrames", store.read(uri)) for uri in uris]
    videos = [(uri, None, from_bf16(x.images), x.times.tolist()) for uri, x in zip(uris, stored, strict=True)]
    int8 = create_feature_folder(str(folder / "int8"), store.recipe.model_copy(update={"dtype": "int8"}))
    write_index(int8, write_shard(int8, videos, "int8")[0])
    frames = sum(len(x) for x in stored)
    folders = {"bf16": place, "int8": Path(int8)}
    return {dtype: sum(file.stat().st_size for file in at.iterdir()) / frames for dtype, at in folders.items()}


def _table(figures: dict[str, float], detail: dict[str, Any]) -> Table:
    table = Table("figure", "measured", "limit", title="A sweep of 8 trials with the cache / without")
    for name, value in figures.items():
        limit, why = LIMITS.get(name, (None, ""))
        verdict = "" if limit is None else f"<= {limit:.3g}{why}{'  MISSED' if value > limit else ''}"
        table.add_row(name, f"{value:,.0f}" if value > 100 else f"{value:.3g}", verdict)
    sweeps = detail["sweeps"]
    lines = {
        "MACs in the encoder : behind it": {name: f"{ratio:.2f}" for name, ratio in detail["proportions"].items()},
        "seconds": {name: f"{value:.1f}" for name, value in detail["seconds"].items()},
        "seconds of a trial": {f"from {arm}": f"{min(s):.1f} to {max(s):.1f}" for arm, s in detail["trials_s"].items()},
        "the same figures by train_s": {name: f"{value:.3g}" for name, value in detail["by_train_s"].items()},
        "whole wall clock in seconds": {f"from {arm}": f"{sweep['wall_s']:.0f}" for arm, sweep in sweeps.items()},
        "bytes a frame of the 2B": {dtype: f"{size:,}" for dtype, size in detail["bytes_per_frame_2b"].items()},
        "accuracy by seed": {
            form: " ".join(f"{value:.3f}" for value in of_form) for form, of_form in detail["accuracy"].items()
        },
    }
    table.caption = "\n".join(
        f"{label}: " + ", ".join(f"{name} {value}" for name, value in values.items()) for label, values in lines.items()
    )
    return table


if __name__ == "__main__":
    main()
