"""Retention: old runs that nothing stands on are removed, from MLflow, from its artifacts, and from storage.

MLflow alone would keep their artifacts until `mlflow gc`, and never hears of the folders. A run and what is below it (a
sweep and its trials) stay together or go together. By what it is found, goes last: its folder's own mark in the folder,
the MLflow run of all. So the next call goes on where one was killed.
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
from mlflow.tracking import MlflowClient

from crosslmm import storage
from crosslmm.config import BadConfig, TrackingConfig, flatten, tracking_uri
from crosslmm.run_folder import CONFIG_FILE, RUN_FILE, SWEEP_FILE, has_run, list_runs, read_run
from crosslmm.text import redacted
from crosslmm.tracking.client import describe_failure, refuses
from crosslmm.tracking.run import KEY

PARENT = "mlflow.parentRunId"
GOING_ON = ("RUNNING", "SCHEDULED")
DAY_S = 86400.0


@dataclass(frozen=True)
class Tree:
    """A run, or a sweep with its trials."""

    runs: tuple[Run, ...]
    """The top one first."""
    versions: tuple[ModelVersion, ...]
    """Registered from them."""
    aliases: tuple[str, ...]
    """NAME@ALIAS of those."""
    folder: str
    """In storage; it may be gone, or be another run's by now."""

    @property
    def run_id(self) -> str:
        """Of the top one."""
        return str(self.runs[0].info.run_id)

    @property
    def name(self) -> str:
        """Of the run in storage."""
        return str(self.runs[0].data.params["name"])

    @property
    def named(self) -> set[str]:
        """What its configuration names."""
        return {value for run in self.runs for value in run.data.params.values()}

    @property
    def ended(self) -> float:
        """Unix time of the last thing that is known of it [s]."""
        return max(run.info.end_time or run.info.start_time for run in self.runs) / 1000


@dataclass(frozen=True)
class Verdict:
    """What becomes of a tree, and why."""

    tree: Tree
    goes: bool
    why: str


class Retention:
    """What an experiment has of the runs in one storage folder.

    Args:
        storage_folder: of all runs.
        tracking: where their record is.

    Raises:
        BadConfig: the server refuses, or there is no such experiment.
        ConnectionError: the server is away.
    """

    def __init__(self, storage_folder: str, tracking: TrackingConfig) -> None:
        self.root = storage.absolute(storage_folder).rstrip("/")
        self.uri = tracking_uri(tracking)
        self.client = MlflowClient(self.uri)
        try:
            experiment = self.client.get_experiment_by_name(tracking.experiment)
            if experiment is None:
                raise BadConfig(f"--tracking.experiment {tracking.experiment}: {redacted(self.uri)} has no such one")
            self.experiment = str(experiment.experiment_id)
            self.trees = list(self._trees())
        except MlflowException as error:
            raise self._told(error) from error

    def verdicts(self, older_than_days: float, keep: int) -> list[Verdict]:
        """What stays and what goes, newest first.

        Args:
            older_than_days: only what ended so long ago goes [days].
            keep: the newest so many stay whatever their age.
        """
        trees, now = sorted(self.trees, key=lambda tree: -tree.ended), time.time()
        reasons: dict[str, str] = {}
        for place, tree in enumerate(trees):
            if going := self.goes_on(tree):
                reasons[tree.run_id] = going
            elif tree.aliases:
                reasons[tree.run_id] = f"its model is {', '.join(tree.aliases)}"
            elif place < keep:
                reasons[tree.run_id] = f"one of the {keep} newest"
            elif now - tree.ended < older_than_days * DAY_S:
                reasons[tree.run_id] = f"younger than {older_than_days:g} days"
        for name, named in self._untold():
            for tree in trees:
                if tree.run_id not in reasons and _stands_on(named, tree):
                    reasons[tree.run_id] = f"{name}, of which MLflow has not been told, was made from it"
        # What stays may have begun with weights of what does not, and that with others'.
        while found := {
            other.run_id: f"{tree.name} was made from it"
            for tree in trees
            if tree.run_id in reasons
            for other in trees
            if other.run_id not in reasons and _stands_on(tree.named, other)
        }:
            reasons |= found
        return [
            Verdict(tree, tree.run_id not in reasons, reasons.get(tree.run_id, "old, and nothing stands on it"))
            for tree in trees
        ]

    def goes_on(self, tree: Tree) -> str | None:
        """Who says that it is not at its end: MLflow, or its folder, which knows first; None where it is."""
        for run in tree.runs:
            if run.info.status in GOING_ON:
                return f"{run.info.run_name} is {run.info.status} in MLflow"
        for folder in [tree.folder, *(storage.join(tree.folder, name) for name in storage.folders_in(tree.folder))]:
            begun = _begun(folder)
            keys = {run.data.tags[KEY] for run in tree.runs if KEY in run.data.tags}
            if begun and begun["status"] is None and begun.get("key") in keys:
                return f"{begun['name']} is not ended in its folder"
        return None

    def remove(self, tree: Tree) -> bool:
        """Remove all of it, or what an earlier call left -> whether it did; not, if it has begun again.

        Raises:
            BadConfig: the server refuses, half-way perhaps.
            ConnectionError: the server is away, as above.
            OSError: storage is.
        """
        try:
            now = Tree(tuple(self.client.get_run(run.info.run_id) for run in tree.runs), tree.versions, (), tree.folder)
            if self.goes_on(now) or any(self._aliases(version) for version in tree.versions):
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
            raise self._told(error) from error

    def _trees(self) -> Iterator[Tree]:
        runs = list(_pages(self.client.search_runs, experiment_ids=[self.experiment], max_results=1000))
        below: dict[str, list[Run]] = {}
        for run in runs:
            below.setdefault(run.data.tags.get(PARENT, ""), []).append(run)
        for run in below.get("", []):
            # Without them it is nobody's run of ours, or was only just made.
            where, name = run.data.params.get("storage"), run.data.params.get("name")
            if where is None or name is None or where.rstrip("/") != self.root:
                continue
            tree = (run, *below.get(run.info.run_id, []))
            versions = [version for one in tree for version in self._versions(one)]
            aliases = [alias for version in versions for alias in self._aliases(version)]
            yield Tree(tree, tuple(versions), tuple(aliases), storage.join(self.root, name))

    def _untold(self) -> Iterator[tuple[str, set[str]]]:
        """Runs in storage that are not in MLflow, where they wait for a replay, say, and what they name."""
        known, found = {tree.folder for tree in self.trees}, []
        with suppress(BadConfig):  # there are none at all
            found = list_runs(self.root)
        for name, folder in found:
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
        """Unless it is gone, or another run's that was begun under the name since."""
        top = tree.runs[0]
        begun, settled = _begun(tree.folder), storage.join(tree.folder, SWEEP_FILE)
        if begun and begun.get("key") == top.data.tags.get(KEY, ""):
            mark = RUN_FILE
        elif storage.exists(settled) and json.loads(storage.read_bytes(settled))["run_id"] == top.info.run_id:
            mark = SWEEP_FILE
        else:
            return
        for name in storage.folders_in(tree.folder):
            storage.remove_folder(storage.join(tree.folder, name))
        names = sorted(storage.names_in(tree.folder), key=mark.__eq__)
        storage.remove([storage.join(tree.folder, name) for name in names])
        storage.remove_folder(tree.folder)

    def _told(self, error: MlflowException) -> Exception:
        reason = f"tracking.uri: {describe_failure(redacted(self.uri), error)}"
        return BadConfig(reason) if refuses(error) else ConnectionError(reason)


def _pages(search: Callable[..., Any], **arguments: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(**arguments, page_token=token)
        yield from page
        if not (token := page.token):
            return


def _begun(folder: str) -> dict[str, Any] | None:
    return read_run(folder) if has_run(folder) else None


def _stands_on(named: Iterable[str], other: Tree) -> bool:
    """Whether a configuration names what lies in a tree's folder: weights to begin with, say. Of a relative path nobody
    knows any more where it began; one with the tree's name in it is taken for its."""
    for value in named:
        relative = "://" not in value and not value.startswith("/")
        if relative and "/" in value and other.name in PurePosixPath(value).parts:
            return True
        with suppress(storage.BadLocation):  # a server's URI
            if not relative and storage.within(storage.join(value, "it"), [other.folder]):
                return True
    return False
