"""Decide whether a run may resume an earlier one of the same name."""

from typing import Any

import yaml

from crosslmm import run_folder, storage
from crosslmm.config import BadConfig, RunConfig, changes, to_yaml, validate_run


def require_resumable(config: RunConfig, folder: str, order: dict[str, Any]) -> None:
    """Raise BadConfig if a run was started in the folder that this one cannot resume.

    With `accept_changes` the folder's configuration is replaced by the new one.

    Args:
        config: the run.
        folder: its folder in storage.
        order: what fixes the samples and their order.

    Raises:
        BadConfig: samples or order have changed, so that a resume would skip, repeat or alter samples; or other keys
            have changed that are not free to change.
    """
    if not run_folder.has_run(folder):
        return
    old_order = run_folder.read_run(folder)["order"]
    for key, value in order.items():
        if old_order.get(key) != value:
            raise BadConfig(
                f"name: run {config.name} was begun with {key} {old_order.get(key)}, which is {value} now; "
                "change it back, or give another --name"
            )
    config_uri = storage.join(folder, run_folder.CONFIG_FILE)
    if not storage.exists(config_uri):
        raise BadConfig(
            f"name: run {config.name} was begun by an earlier version, whose checkpoints have no seal; finish it with "
            "that version, or give another --name"
        )
    # Keys that were added since get their defaults.
    old = validate_run(yaml.safe_load(storage.read_bytes(config_uri)))
    differences = changes(old.model_dump(mode="json"), config.model_dump(mode="json"))
    changed = [f"{key} {before} -> {after}" for key, (before, after) in differences.items()]
    if changed and not config.accept_changes:
        raise BadConfig(
            f"name: run {config.name} was begun with another configuration: {'; '.join(changed)}. Change it back, give "
            "another --name, or resume with --accept_changes true"
        )
    if changed:
        storage.write_bytes(config_uri, to_yaml(config).encode())
