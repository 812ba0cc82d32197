"""The plan of a conversion: how the manifest is split into chunks. Stored, so that the same command resumes."""

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter

from crosslmm import storage
from crosslmm.config import BadConfig
from crosslmm.data import manifest_shards
from crosslmm.data.ingest import ray_tasks, split
from crosslmm.data.ingest.media_files import MEDIA_FOLDER
from crosslmm.data.ingest.shard_tasks import relative_to
from crosslmm.data.ingest.split import Chunk
from crosslmm.data.manifest import BadManifest, manifest_errors
from crosslmm.data.rows.folders import manifest_files
from crosslmm.text import first_error

CHUNK_BYTES, PROBED_CHUNK_BYTES = 32 * 2**20, 4 * 2**20
"""Default sizes of a chunk without and with probing, which takes much longer per row [bytes]."""

PLAN_FILE, REJECTED_FILE, QUARANTINE_FILE = "pieces/plan.json", "rejected.jsonl", "quarantine.jsonl"
MAX_PLAN_BYTES = 256 * 2**20
"""Largest plan [bytes]: a million chunks."""
OUTPUT_FILES = re.compile(
    r"_prepared\.json|pieces/.*|(part|probes|waiting|lengths)-\w+\.parquet|(rejected|quarantine)\.jsonl"
    rf"|{MEDIA_FOLDER}/[0-9a-f]{{2}}/[0-9a-f]{{64}}(\.\w+)?",
    re.DOTALL,
)
"""Names of all files that a conversion writes into its folder; no other file is ever removed."""

log = logging.getLogger(__name__)

_CHUNKS = TypeAdapter(list[Chunk])


@dataclass(frozen=True)
class Plan:
    """How a manifest is split, and the state that it was in then."""

    settings: dict[str, Any]
    """Arguments of the conversion that its output depends on."""
    stamp: list[Any]
    """`split.change_stamp` of the manifest."""
    chunks: list[Chunk]
    """The whole manifest, in order. Empty in a plan that only claims the folder."""

    @property
    def key(self) -> str:
        """Digest of settings and chunks: output of a plan with another key is not reused."""
        return hashlib.sha256(json.dumps(self._content()).encode()).hexdigest()[:16] if self.chunks else ""

    def _content(self) -> dict[str, Any]:
        return {"asked": self.settings, "pieces": [asdict(chunk) for chunk in self.chunks]}

    def to_json(self) -> bytes:
        """Return the content of the plan's file."""
        return json.dumps({"key": self.key, "stamp": self.stamp, **self._content()}).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Plan":
        """Parse the content of a plan's file."""
        content = storage.parse_json(data)
        return cls(content["asked"], content["stamp"], _CHUNKS.validate_python(content.get("pieces", [])))


def default_chunk_bytes(probe: bool) -> int:
    """Return the default size of a chunk [bytes]."""
    return PROBED_CHUNK_BYTES if probe else CHUNK_BYTES


def read_plan(target: str) -> Plan | None:
    """Read the plan in a folder; None if no conversion to this folder was started.

    Raises:
        BadConfig: it is damaged.
    """
    try:
        uri = storage.safe_join(target, PLAN_FILE)
        return Plan.from_json(storage.read_at_most(uri, MAX_PLAN_BYTES)) if storage.exists(uri) else None
    except storage.Unavailable:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadConfig(f"{target}: {PLAN_FILE} cannot be used: {first_error(error)}; give another folder") from None


def make_plan(uri: str, target: str, settings: dict[str, Any], previous: Plan | None) -> Plan:
    """Split a manifest and store the plan; or return the previous plan if nothing has changed.

    If the manifest or the settings have changed, the output of the previous plan is removed.

    Args:
        uri: manifest.
        target: folder of the conversion.
        settings: arguments that the output depends on.
        previous: plan of an earlier call.

    Raises:
        BadManifest: the manifest cannot be read, or is empty.
        BadConfig: the folder is finished, with other settings.
    """
    with manifest_errors(uri):
        stamp = split.change_stamp(uri, settings["roots"])
        if previous is None:
            # Claim the folder before anything else is written, so that a call after an interruption recognises it.
            storage.write_bytes(storage.join(target, PLAN_FILE), Plan({}, [], []).to_json())
        if previous and stamp and (previous.stamp, previous.settings) == (stamp, settings):
            _require_own_chunks(previous, uri, target)
            return previous
        if files := split.files_to_split(uri, settings["roots"]):
            log.info("splitting a manifest of %s MB and counting its rows", f"{sum(stamp[::2]) / 1e6:,.1f}")
            chunks = split_in_tasks(files, settings["piece_bytes"])
        else:
            log.info("splitting a manifest that one process has to read from start to end")
            arguments = (uri, storage.join(target, "pieces"), settings["piece_bytes"], settings["roots"])
            ((_, chunks),) = ray_tasks.run_tasks(split.split_whole_file, {0: arguments})
    if not chunks:
        raise BadManifest(f"{uri}: is empty")
    plan = Plan(settings, stamp, chunks)
    if previous and previous.key not in ("", plan.key):
        _remove_output(target, previous, plan)
    if plan != previous:
        storage.write_bytes(storage.join(target, PLAN_FILE), plan.to_json())
    return plan


def _require_own_chunks(plan: Plan, uri: str, target: str) -> None:
    """Raise BadConfig if a stored plan names a file that is neither of the manifest nor in the folder's `pieces`."""
    for name in {chunk.uri for chunk in plan.chunks} - set(manifest_files(uri, plan.settings["roots"])):
        try:
            storage.follow(name, [storage.join(target, "pieces")])
        except ValueError as error:
            raise BadConfig(f"{target}: {PLAN_FILE} cannot be used: {error}; give another folder") from None


def split_in_tasks(files: Sequence[str], chunk_bytes: int) -> list[Chunk]:
    """Split files of lines or Parquet, and tars; tasks find the line ends and count the rows."""
    chunks = [chunk for file in files for chunk in split.split_file(file, chunk_bytes)]
    if chunks and chunks[0].form != "parquet":
        calls = {number: (chunk, chunks[-1].end) for number, chunk in enumerate(chunks)}
        counted = dict(
            ray_tasks.run_tasks(split.align_to_lines if chunks[0].form == "lines" else split.count_tar, calls)
        )
        chunks = [counted[number] for number in range(len(chunks))]
    return split.number_rows(chunks)


def _remove_output(target: str, previous: Plan, plan: Plan) -> None:
    """Remove the files of the previous plan.

    Raises:
        BadConfig: the folder is finished, with other settings.
    """
    same_settings = previous.settings == plan.settings
    if not same_settings and manifest_shards.is_prepared(target):
        raise BadConfig(f"{target}: was converted from another manifest or with other settings; give another folder")
    changed = "the manifest has" if same_settings else "the manifest or the settings have"
    log.info("%s changed since %s was started: starting over", changed, target)
    names = {name for name in storage.names_in(target) if OUTPUT_FILES.fullmatch(name)}
    names -= {PLAN_FILE, *(relative_to(chunk.uri, target) for chunk in plan.chunks)}
    # A file goes before the files that it names: first the seal, then the summaries.
    order = sorted(names, key=lambda name: (name != manifest_shards.SEAL, not name.startswith("pieces/")))
    storage.remove([storage.join(target, name) for name in order])
