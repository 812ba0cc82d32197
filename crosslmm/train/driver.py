"""What the driver process does: check, start, follow, record, register."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from crosslmm import storage, tracking
from crosslmm.answer import CONFIG
from crosslmm.config import BadConfig, RunConfig
from crosslmm.data import shapes
from crosslmm.data.decode import require_backend
from crosslmm.data.manifest import Manifest, Rows
from crosslmm.model.pretrained import build_config, build_processor
from crosslmm.train import launch

PLAIN_LINE_EVERY_S = 10.0
LEDGER = "quarantine.jsonl"


@dataclass
class Outcome:
    """What a finished run leaves behind."""

    name: str
    run_id: str
    model_uri: str
    """`models:/NAME@ALIAS`; of a trial, the folder of its exported model."""
    steps: int
    samples: int
    """Samples that those steps took."""
    train_s: float
    """From the first step's start to the last step's end, over all attempts of this driver [s]."""
    metrics: dict[str, float]
    """The last step's."""


@dataclass(frozen=True)
class Part:
    """What makes a run the part of a sweep: it is silent, and registers nothing."""

    run_id: str
    """The MLflow run that the sweep made for it."""
    report: Callable[[int, dict[str, float]], None]
    """Takes the number of steps done and their metrics, after each validation, when both are in the record."""


def run(config: RunConfig, part: Part | None = None) -> Outcome:
    """Train, record and register. Everything that can be wrong with the request is found before a worker starts.

    Raises:
        BadConfig, BadManifest: the request cannot be carried out.
        launch.TrainingFailed: the run broke off; the same name resumes it.
    """
    console = Console(highlight=False, soft_wrap=True, quiet=part is not None)
    config = resolve(config)
    build_processor(config.model)
    manifests = [Manifest(uri) for uri in config.data.manifests]
    validation = Manifest(config.data.validation_manifest) if config.data.validation_manifest else None
    features = launch.open_features(config, Rows([*manifests, *([validation] if validation else [])]))
    launch.start_ray()
    launch.check_placement(config)
    job = launch.prepare(config, manifests, validation, features)
    order = {
        "manifest": [manifest.digest for manifest in manifests],
        "shares": list(config.data.manifests.values()),
        "train.global_batch_size": config.train.global_batch_size,
        "seed": config.seed,
        # A resume does not see the first weights, by which features are known to be its own.
        "data.features": features.recipe.key if features else None,
    }
    begun_before = _run_to_resume(config, job.folder, order)
    record = tracking.Run(config, part.run_id if part else begun_before)
    begun = json.dumps({"run_id": record.run_id, "order": order})
    storage.write_bytes(storage.join(job.folder, "run.json"), begun.encode())
    for manifest in manifests:
        record.log_dataset(manifest.uri, manifest.digest, len(manifest), "training")
    if validation:
        record.log_dataset(validation.uri, validation.digest, len(validation), "validation")
    _announce(console, config, job, manifests, record)

    follower = Follower(job, record, console, part.report if part else None)
    status = "FAILED"
    try:
        follower.start()
        try:
            launch.fit(job)
        finally:
            follower.stop()
        model_uri = storage.join(job.folder, "model")
        if part is None:
            model_uri = record.register(model_uri, lineage(job.folder))
        status = "FINISHED"
    except (SystemExit, KeyboardInterrupt):
        status = "KILLED"
        raise
    except launch.TrainingFailed as error:
        raise launch.TrainingFailed(f"{error}; the same command with --name {config.name} resumes the run") from error
    finally:
        record.finish(status)
    if part is None:
        console.print(f"registered {model_uri} from run {record.run_id}")
    return Outcome(
        name=str(config.name),
        run_id=record.run_id,
        model_uri=model_uri,
        steps=job.total_steps,
        samples=job.total_steps * config.train.global_batch_size,
        train_s=follower.train_s,
        metrics=follower.last_metrics,
    )


def lineage(folder: str) -> dict[str, str]:
    """Where a finished run's model comes from, as tags of its registered version.

    Args:
        folder: of the run.
    """
    order = json.loads(storage.read_bytes(storage.join(folder, "run.json")))["order"]
    configuration = storage.read_bytes(storage.join(storage.join(folder, "model"), CONFIG))
    return {"data_sha256": " ".join(order["manifest"]), "configuration": configuration.decode()}


def resolve(config: RunConfig) -> RunConfig:
    """Fill in what the configuration leaves to the moment: name, absolute storage, sample data.

    Raises:
        BadConfig: relative storage in a job whose working directory is a copy that will be thrown away; a decoder that
            does not load.
    """
    build_config(config.model)
    require_backend(config.data.decoder)
    require_lasting("storage", config.storage)
    require_lasting("tracking.uri", tracking.tracking_uri(config.tracking))
    folder = storage.absolute(config.storage)
    data = config.data
    if data.manifest == "sample":
        data = data.model_copy(update=shapes.sample_manifests(storage.join(folder, "sample")))
    return config.model_copy(
        update={"name": config.name or datetime.now().strftime("%Y%m%d-%H%M%S"), "storage": folder, "data": data}
    )


def require_lasting(key: str, uri: str) -> None:
    """Whether what is written there outlives the job.

    Raises:
        BadConfig: relative, in a job whose working directory is a copy that will be thrown away.
    """
    here = str(Path.cwd())
    uploaded = "/working_dir_files/" in here  # where Ray unpacks `ray job submit --working-dir`
    local = uri.removeprefix("sqlite:///") if uri.startswith("sqlite:") else uri
    if uploaded and "://" not in local and storage.absolute(local).startswith(here):
        raise BadConfig(f"{key}: {uri} lies in this job's uploaded copy of the code; give an absolute path or a URI")


def _run_to_resume(config: RunConfig, folder: str, order: dict[str, Any]) -> str | None:
    """The MLflow run that an earlier start under the same name began.

    Raises:
        BadConfig: what fixes the samples or their order has changed, so that a resume would skip some, repeat others,
            or see them otherwise.
    """
    uri = storage.join(folder, "run.json")
    if not storage.exists(uri):
        return None
    begun = json.loads(storage.read_bytes(uri))
    for key, now in order.items():
        if begun["order"].get(key) != now:
            raise BadConfig(
                f"name: run {config.name} was begun with {key} {begun['order'].get(key)}, and this is {now}; "
                "take it back, or another --name"
            )
    return str(begun["run_id"])


def _announce(
    console: Console, config: RunConfig, job: launch.Job, manifests: list[Manifest], record: tracking.Run
) -> None:
    processor = "GPU" if config.scaling.use_gpu else "CPU"
    lines = {
        "run": f"{config.name} (the same command with --name {config.name} resumes it)",
        "data": ", ".join(f"{len(manifest)} rows of {manifest.uri}" for manifest in manifests)
        + (f", {' : '.join(map(str, config.data.manifests.values()))}" if len(manifests) > 1 else ""),
        **({"features": f"{config.data.features}, instead of videos"} if config.data.features else {}),
        "training": f"{job.total_steps} steps of {config.train.global_batch_size} samples, "
        f"{config.scaling.num_workers} {processor} workers",
        "storage": job.folder,
        "record": f"{record.uri}, run {record.run_id}",
    }
    for key, value in lines.items():
        console.print(f"{key:<9} {value}")


class Follower:
    """Reads the board while the workers train: draws the progress, writes the record, names what was unreadable.

    A person at a terminal sees one live line; a log file gets a plain line every ten seconds.
    """

    def __init__(
        self,
        job: launch.Job,
        record: tracking.Run,
        console: Console,
        report: Callable[[int, dict[str, float]], None] | None = None,
    ) -> None:
        self.job = job
        self.record = record
        self.console = console
        self.report = report
        self.last_metrics: dict[str, float] = {}
        self.train_s = 0.0
        self._began: float | None = None
        self._last_line = 0.0
        self._unrecorded: list[tuple[int, float, dict[str, float]]] = []
        self._ledger_uri = storage.join(job.folder, LEDGER)
        self._ledger_is_old = False
        # A resumed run goes on with its ledger.
        written = storage.read_bytes(self._ledger_uri) if storage.exists(self._ledger_uri) else b""
        entries = [json.loads(line) for line in written.splitlines()]
        self._unreadable: dict[tuple[str, str, int], dict[str, Any]] = {_key(e): e for e in entries}
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[news]}"), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("starting workers", total=job.total_steps, news="")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def start(self) -> None:
        """Begin to follow, in a thread."""
        self._progress.start()
        if not self.console.is_terminal:
            self.console.print("starting workers")
        self._thread.start()

    def stop(self) -> None:
        """Read what is left and end."""
        self._stop.set()
        self._thread.join()
        self._progress.stop()
        if self._unrecorded:
            self.record.log(self._unrecorded)
        if self._unreadable:
            self.record.log_text(LEDGER, self._ledger())
            self.console.print(f"{len(self._unreadable)} rows could not be read: {LEDGER} in the record and the run")

    def _follow(self) -> None:
        while True:
            last_round = self._stop.wait(0.5)
            news = ray.get(self.job.board.take.remote())
            self._started([item for kind, item in news if kind == "started"])
            self._take_steps([item for kind, item in news if kind == "step"])
            self._take_unreadable([item for kind, item in news if kind == "unreadable"])
            if last_round:
                return

    def _started(self, items: list[tuple[int, int]]) -> None:
        for step, parameters in items:
            self._began = self._began or time.time()
            where = f"resumed after step {step}" if step else "training from the start"
            self.console.print(f"{where}, {parameters / 1e6:,.1f} M parameters")
            self._progress.update(self._task, completed=step, description="training")

    def _take_steps(self, steps: list[tuple[int, float, dict[str, float]]]) -> None:
        if not steps:
            return
        self._record(steps)
        for step, when, metrics in steps:
            self.last_metrics = metrics
            self.train_s = when - (self._began or when)
            if "validation/loss" in metrics:
                self.console.print(_validation_line(step, metrics))
                if self.report:
                    self.report(step, metrics)
        step, _, metrics = steps[-1]
        news = (
            f"loss {metrics['loss']:.3f}  {metrics['samples_per_s']:.0f} samples/s  "
            f"{metrics['frames_per_s']:.0f} frames/s  data wait {metrics['data_wait_share']:.0%}"
        )
        self._progress.update(self._task, completed=step, news=news)
        if not self.console.is_terminal and time.time() - self._last_line >= PLAIN_LINE_EVERY_S:
            self._last_line = time.time()
            self.console.print(f"step {step}/{self.job.total_steps}  {news}")

    def _record(self, steps: list[tuple[int, float, dict[str, float]]]) -> None:
        """Write the record. While its server is away the steps wait here."""
        self._unrecorded += steps
        try:
            self.record.log(self._unrecorded)
            self._unrecorded = []
        except Exception as error:
            self.console.print(f"{len(self._unrecorded)} steps wait to be recorded: {type(error).__name__}")

    def _take_unreadable(self, items: list[dict[str, Any]]) -> None:
        known = len(self._unreadable)
        for item in items:
            if _key(item) not in self._unreadable:
                self._unreadable[_key(item)] = item
                line = f"left out: {item['manifest']} line {item['line']} ({item['id']}): {item['reason']}"
                self.console.print(line, markup=False)
        self._ledger_is_old |= len(self._unreadable) > known
        if self._ledger_is_old:
            try:
                storage.write_bytes(self._ledger_uri, self._ledger().encode())
                self._ledger_is_old = False
            except OSError as error:
                self.console.print(f"{LEDGER} waits to be written: {type(error).__name__}")

    def _ledger(self) -> str:
        return "".join(json.dumps(item) + "\n" for _, item in sorted(self._unreadable.items()))


def _key(entry: dict[str, Any]) -> tuple[str, str, int]:
    return entry["split"], entry["manifest"], entry["line"]


def _validation_line(step: int, metrics: dict[str, float]) -> str:
    prefix = "validation/accuracy/"
    kinds = "  ".join(f"{k.removeprefix(prefix)} {v:.2f}" for k, v in metrics.items() if k.startswith(prefix))
    return (
        f"step {step}  validation loss {metrics['validation/loss']:.3f}  "
        f"accuracy {metrics['validation/accuracy']:.3f}  {kinds}"
    )
