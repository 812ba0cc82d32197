"""Manifests of several files: a folder of videos with sidecars, a folder with a metadata file, a pattern of names."""

import fnmatch
import json
import posixpath
import re
from collections.abc import Sequence
from typing import Any

from crosslmm import storage
from crosslmm.data.rows.media import VIDEO_SUFFIXES
from crosslmm.data.rows.values import MAX_ROW_BYTES, BadRow

PACKED_SUFFIXES = (".gz", ".zst", ".zstd")
TABLE_SUFFIXES = (".parquet", ".csv", ".tsv")
FILE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".tar", *TABLE_SUFFIXES)
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Names of the table of a folder of videos, as Hugging Face's VideoFolder has it."""
UNFINISHED = re.compile(r"pieces/plan\.json$|part-\d+\.parquet$")
"""Files of a conversion, which has a seal when it is finished."""
MAX_FILES = 100_000
"""Most files that a pattern matches."""


def suffix_of(uri: str) -> str:
    """Return the suffix of a file without that of its compression, in lower case."""
    name = uri.lower()
    for packed in PACKED_SUFFIXES:
        name = name.removesuffix(packed)
    return posixpath.splitext(name)[1]


def is_pattern(uri: str) -> bool:
    """Return whether a manifest is a pattern that the names of several files match, such as `train-*.parquet`."""
    return "*" in posixpath.basename(uri)


def is_folder(uri: str) -> bool:
    """Return whether a manifest is a folder: of videos, or a prepared manifest."""
    return suffix_of(uri) not in FILE_SUFFIXES and not is_pattern(uri) and storage.is_folder(uri)


def manifest_files(uri: str, roots: Sequence[str] = ()) -> list[str]:
    """Return the files of a manifest that is not a folder of sidecars: itself, those that it matches, or the folder's
    metadata file; empty for a folder of sidecars.

    Args:
        uri: manifest.
        roots: further folders that links in a folder may lead to.

    Raises:
        BadRow: no file matches it, or too many, or files of different kinds.
        OSError: the folder cannot be listed.
    """
    if is_pattern(uri):
        return _matching(uri, roots)
    if not is_folder(uri):
        return [uri]
    names = [name for name in METADATA_FILES if storage.exists(storage.join(uri, name))]
    if len(names) > 1:
        raise BadRow(f"has both {names[0]} and {names[1]}; name one of them")
    return [storage.safe_join(uri, name, roots) for name in names]


def _matching(uri: str, roots: Sequence[str]) -> list[str]:
    folder, pattern = posixpath.split(uri)
    names = [name for name in storage.files_in(folder) if fnmatch.fnmatchcase(name, pattern)]
    if not names:
        raise BadRow("no file matches it")
    if len(names) > MAX_FILES:
        raise BadRow(f"{len(names)} files match it, of at most {MAX_FILES}")
    if len({suffix_of(name) for name in names}) > 1:
        raise BadRow(f"files of several kinds match it, {names[0]!a} and {names[-1]!a} among them")
    return [storage.safe_join(folder, name, roots) for name in names]


def sidecars_as_jsonl(uri: str, roots: Sequence[str]) -> bytes:
    """Return the videos of a folder as JSONL, in the order of their names. Videos without a sidecar are left out.

    Raises:
        BadRow: a sidecar cannot be read, or the folder has none, but other manifests.
    """
    names = storage.names_in(uri, roots)
    sidecars = {posixpath.splitext(name)[0]: name for name in names if name.endswith(".json")}
    lines = []
    for name in names:
        stem, suffix = posixpath.splitext(name)
        if suffix.lower() in VIDEO_SUFFIXES and stem in sidecars:
            sidecar = _read_sidecar(uri, sidecars[stem], roots)
            lines.append(json.dumps({"id": stem, "video": storage.join(uri, name), **sidecar}))
    if not lines:
        _refuse_other_manifests(names)
    return "".join(f"{line}\n" for line in lines).encode()


def _refuse_other_manifests(names: list[str]) -> None:
    if any(UNFINISHED.match(name) for name in names):
        raise BadRow("is a conversion that has not finished; the same prepare.py convert finishes it")
    files = [name for name in names if suffix_of(name) in FILE_SUFFIXES]
    if files:
        pattern = f"{posixpath.dirname(files[0])}/*{suffix_of(files[0])}".removeprefix("/")
        raise BadRow(
            f"is a folder without sidecars of videos; name a manifest in it: {files[0]!a}, or all: {pattern!a}"
        )


def _read_sidecar(folder: str, name: str, roots: Sequence[str]) -> dict[str, Any]:
    try:
        sidecar = storage.read_json(storage.safe_join(folder, name, roots), MAX_ROW_BYTES)
    except storage.BadLocation:
        raise
    except ValueError as error:
        raise BadRow(f"{name}: Invalid JSON: {error}") from None
    if not isinstance(sidecar, dict):
        raise BadRow(f"{name}: a sidecar is one object, with messages or conversations")
    return sidecar
