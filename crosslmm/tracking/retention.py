"""Retention: from MLflow, its artifacts and storage, remove old runs that no alias and no other run depends on.

MLflow alone would keep the artifacts until `mlflow gc`, and does not know the folders. A sweep and its trials are kept
or removed together. The files and entries by which a run is recognised are removed last (run.json or sweep.json in its
folder, then the MLflow run), so that the next call continues where an interrupted one stopped.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml
from mlflow.entities import LoggedModel, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from crosslmm import storage
from crosslmm.config import BadConfig, TrackingConfig, flatten, tracking_uri
from crosslmm.run_folder import CONFIG_FILE, RUN_FILE, SWEEP_FILE, has_run, list_runs, read_run
from crosslmm.text import redacted
from crosslmm.tracking.client import describe_failure, open_client, refuses
from crosslmm.tracking.registry import BASE_TAG
from crosslmm.tracking.run import KEY

PARENT = "mlflow.parentRunId"
ACTIVE = ("RUNNING", "SCHEDULED")
DAY_S = 86400.0


@dataclass(frozen=True)
class Tree:
    """A run, or a sweep with its trials."""

    runs: tuple[Run, ...]
    """MLflow runs, the parent first."""
    versions: tuple[ModelVersion, ...]
    """Model versions that were registered from them."""
    aliases: tuple[str, ...]
    """NAME@ALIAS of these versions."""
    folder: str
    """Folder in storage; it may be gone, or belong to a newer run of the same name."""

    @property
    def run_id(self) -> str:
        """Id of the parent."""
        return str(self.runs[0].info.run_id)

    @property
    def name(self) -> str:
        """Name of the run in storage."""
        return str(self.runs[0].data.params["name"])

    @property
    def values(self) -> set[str]:
        """Values of its configuration, among them paths of the weights that it started from, and the versions that its
        adapters belong to."""
        bases = {version.tags[BASE_TAG] for version in self.versions if BASE_TAG in version.tags}
        return bases | {value for run in self.runs for value in run.data.params.values()}

    @property
    def ended(self) -> float:
        """Unix time at which it ended, or started if its end is unknown [s]."""
        return max(run.info.end_time or run.info.start_time for run in self.runs) / 1000


@dataclass(frozen=True)
class Decision:
    """Whether retention removes a tree, and the reason."""

    tree: Tree
    remove: bool
    reason: str


class Retention:
    """Lists and removes the runs of one storage folder that an MLflow experiment knows.

    Args:
        storage_folder: folder of all runs.
        tracking: MLflow server and experiment.

    Raises:
        BadConfig: the server refuses, or the experiment does not exist.
        ConnectionError: the server does not answer.
    """

    def __init__(self, storage_folder: str, tracking: TrackingConfig) -> None:
        self.root = storage.absolute(storage_folder).rstrip("/")
        self.uri = tracking_uri(tracking)
        self.client = open_client(self.uri)
        try:
            experiment = self.client.get_experiment_by_name(tracking.experiment)
            if experiment is None:
                raise BadConfig(
                    f"--tracking.experiment {tracking.experiment}: no such experiment on {redacted(self.uri)}"
                )
            self.experiment = str(experiment.experiment_id)
            self.trees = list(self._trees())
        except MlflowException as error:
            raise self._readable(error) from error

    def decide(self, older_than_days: float, keep: int) -> list[Decision]:
        """Decide for each run whether it is removed, newest first.

        Args:
            older_than_days: keep runs that ended less than this ago [days].
            keep: number of newest runs that are kept at any age.
        """
        trees, now = sorted(self.trees, key=lambda tree: -tree.ended), time.time()
        reasons: dict[str, str] = {}
        for rank, tree in enumerate(trees):
            if reason := self.active_reason(tree):
                reasons[tree.run_id] = reason
            elif tree.aliases:
                reasons[tree.run_id] = f"its model is {', '.join(tree.aliases)}"
            elif rank < keep:
                reasons[tree.run_id] = f"one of the {keep} newest"
            elif now - tree.ended < older_than_days * DAY_S:
                reasons[tree.run_id] = f"younger than {older_than_days:g} days"
        for name, values in self._runs_unknown_to_mlflow():
            for tree in trees:
                if tree.run_id not in reasons and _depends_on(values, tree):
                    reasons[tree.run_id] = f"{name}, which MLflow does not have yet, started from it"
        # Runs that are kept may have started from others, and those from others again.
        while dependencies := {
            other.run_id: f"{tree.name} started from it"
            for tree in trees
            if tree.run_id in reasons
            for other in trees
            if other.run_id not in reasons and _depends_on(tree.values, other)
        }:
            reasons |= dependencies
        return [
            Decision(tree, tree.run_id not in reasons, reasons.get(tree.run_id, "old, and nothing depends on it"))
            for tree in trees
        ]

    def active_reason(self, tree: Tree) -> str | None:
        """Return why a tree counts as active, by MLflow or by its folder, which is written first; None if ended."""
        for run in tree.runs:
            if run.info.status in ACTIVE:
                return f"{run.info.run_name} is {run.info.status} in MLflow"
        for folder in [tree.folder, *(storage.join(tree.folder, name) for name in storage.folders_in(tree.folder))]:
            run_file = _read_run_if_any(folder)
            keys = {run.data.tags[KEY] for run in tree.runs if KEY in run.data.tags}
            if run_file and run_file["status"] is None and run_file.get("key") in keys:
                return f"{run_file['name']} has not ended according to its folder"
        return None

    def remove(self, tree: Tree) -> bool:
        """Remove a tree, or what an interrupted call left of it; return False if it is in use again.

        Raises:
            BadConfig: the server refuses. Part of the tree may be removed.
            ConnectionError: the server does not answer. Part of the tree may be removed.
            OSError: storage fails. Part of the tree may be removed.
        """
        try:
            current = Tree(
                tuple(self.client.get_run(run.info.run_id) for run in tree.runs), tree.versions, (), tree.folder
            )
            if self.active_reason(current) or any(self._aliases(version) for version in tree.versions):
                return False
            for version in tree.versions:
                self.client.delete_model_version(version.name, version.version)
            for run in tree.runs:
                for model in self._models(run):
                    self._remove_artifacts(model.artifact_location)
                    self.client.delete_logged_model(model.model_id)
            self._remove_folder(tree)
            for run in reversed(tree.runs):
                self._remove_artifacts(run.info.artifact_uri)
                self.client.delete_run(run.info.run_id)
            return True
        except MlflowException as error:
            raise self._readable(error) from error

    def _trees(self) -> Iterator[Tree]:
        runs = list(_pages(self.client.search_runs, experiment_ids=[self.experiment], max_results=1000))
        children: dict[str, list[Run]] = {}
        for run in runs:
            children.setdefault(run.data.tags.get(PARENT, ""), []).append(run)
        for run in children.get("", []):
            # Without these parameters it is not a run of this package, or was created a moment ago.
            root, name = run.data.params.get("storage"), run.data.params.get("name")
            if root is None or name is None or root.rstrip("/") != self.root:
                continue
            try:
                folder = storage.join(self.root, name)
            except storage.BadLocation:  # as no run of this package is called
                continue
            tree = (run, *children.get(run.info.run_id, []))
            versions = [version for one in tree for version in self._versions(one)]
            aliases = [alias for version in versions for alias in self._aliases(version)]
            yield Tree(tree, tuple(versions), tuple(aliases), folder)

    def _runs_unknown_to_mlflow(self) -> Iterator[tuple[str, set[str]]]:
        """Yield (name, configuration values) of runs in storage that MLflow does not have: they wait for a replay."""
        known, runs = {tree.folder for tree in self.trees}, []
        with suppress(BadConfig):  # storage has no runs
            runs = list_runs(self.root)
        for name, folder in runs:
            if storage.join(self.root, name.split("/")[0]) not in known:
                values = flatten(yaml.safe_load(storage.read_bytes(storage.join(folder, CONFIG_FILE)))).values()
                yield name, {value for value in values if isinstance(value, str)}

    def _versions(self, run: Run) -> Iterator[ModelVersion]:
        return _pages(self.client.search_model_versions, filter_string=f"run_id = '{run.info.run_id}'")

    def _aliases(self, version: ModelVersion) -> list[str]:
        aliases = self.client.get_registered_model(version.name).aliases
        return [f"{version.name}@{alias}" for alias, number in aliases.items() if str(number) == str(version.version)]

    def _models(self, run: Run) -> list[LoggedModel]:
        made = f"source_run_id = '{run.info.run_id}'"
        return list(_pages(self.client.search_logged_models, experiment_ids=[self.experiment], filter_string=made))

    def _remove_artifacts(self, uri: str) -> None:
        get_artifact_repository(uri, tracking_uri=self.uri).delete_artifacts()

    def _remove_folder(self, tree: Tree) -> None:
        """Remove a tree's folder, unless it is gone or belongs to a newer run of the same name."""
        top = tree.runs[0]
        run, sweep = _read_run_if_any(tree.folder), storage.join(tree.folder, SWEEP_FILE)
        if run and run.get("key") == top.data.tags.get(KEY, ""):
            marker = RUN_FILE
        elif storage.exists(sweep) and json.loads(storage.read_bytes(sweep))["run_id"] == top.info.run_id:
            marker = SWEEP_FILE
        else:
            return
        for name in storage.folders_in(tree.folder):
            storage.remove_folder(storage.join(tree.folder, name))
        names = sorted(storage.names_in(tree.folder), key=marker.__eq__)
        storage.remove([storage.join(tree.folder, name) for name in names])
        storage.remove_folder(tree.folder)

    def _readable(self, error: MlflowException) -> Exception:
        reason = f"tracking.uri: {describe_failure(redacted(self.uri), error)}"
        return BadConfig(reason) if refuses(error) else ConnectionError(reason)


def _pages(search: Callable[..., Any], **arguments: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(**arguments, page_token=token)
        yield from page
        if not (token := page.token):
            return


def _read_run_if_any(folder: str) -> dict[str, Any] | None:
    return read_run(folder) if has_run(folder) else None


def _depends_on(values: Iterable[str], other: Tree) -> bool:
    """Return whether a configuration names a path in a tree's folder, such as weights to start from, or its version.

    The working directory of a relative path is no longer known; one that contains the tree's name counts.
    """
    versions = {f"models:/{version.name}/{version.version}" for version in other.versions}
    for value in values:
        if value in versions:
            return True
        relative = "://" not in value and not value.startswith("/")
        if relative and "/" in value and other.name in PurePosixPath(value).parts:
            return True
        with suppress(storage.BadLocation):  # the URI of a server
            if not relative and storage.within(storage.join(value, "file"), [other.folder]):
                return True
    return False
