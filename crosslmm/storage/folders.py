"""List, copy and remove folders in storage: local paths and `s3://` URIs alike."""

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import fsspec

from crosslmm.storage.files import PART_BYTES, download_file, local_path, remove, upload_file
from crosslmm.storage.names import follow, join, safe_join
from crosslmm.storage.retry import call_with_retries, keep_policy, scheme_of

PARALLEL_FILES = 8
"""Files of a folder that are downloaded or removed at the same time."""


def is_empty(folder: str) -> bool:
    """Return whether a folder is empty or does not exist."""
    return call_with_retries(
        folder, lambda fs, path: not fs.exists(path) or (fs.isdir(path) and not fs.ls(path, detail=False))
    )


def is_folder(uri: str) -> bool:
    """Return whether this is a folder: on an object store, whether keys start with this name and a slash."""
    return call_with_retries(uri, lambda fs, path: fs.isdir(path))


def names_in(folder: str, roots: Sequence[str] | None = None) -> list[str]:
    """Return the names of all files below a folder, relative to it, sorted; empty if it does not exist.

    Links to local folders are followed, but no folder is listed twice: a folder with two links to itself would
    otherwise have about 2^40 paths, since the system follows up to 40 links in one.

    Args:
        folder: path or URI.
        roots: further folders that links may lead to; None lets them lead anywhere.

    Raises:
        LeadsOut: a link leads to none of these folders.
    """
    if scheme_of(folder) == "file":
        return call_with_retries(folder, lambda _, path: sorted(_local_names(path, roots)))

    return [key for key in _keys_in(folder) if key and not key.endswith("/")]  # the others stand for folders


def _keys_in(folder: str) -> list[str]:
    """Return the keys below a folder of an object store, relative to it, sorted. The empty one, and those that end with
    a slash, are objects that Arrow writes for folders."""

    def keys(fs: fsspec.AbstractFileSystem, path: str) -> list[str]:
        root = path.rstrip("/") + "/"
        return sorted(key.removeprefix(root) for key in fs.find(path))

    return call_with_retries(folder, keys)


def _local_names(folder: str, roots: Sequence[str] | None) -> Iterator[str]:
    listed: set[str] = set()
    pending = deque([folder])
    while pending:
        start = pending.popleft()
        if roots is not None and start != folder:
            follow(start, [folder, *roots])
        for directory, subfolders, files in os.walk(start):
            if (real := os.path.realpath(directory)) in listed:
                subfolders.clear()
                continue
            listed.add(real)
            # Links come last: a folder is listed under its own name.
            paths = [Path(directory, name) for name in sorted(subfolders)]
            pending += [str(path) for path in paths if path.is_symlink()]
            yield from (os.path.relpath(f"{directory}/{name}", folder) for name in files)


def folders_in(folder: str) -> list[str]:
    """Return the names of the folders directly in a folder, sorted; empty if it does not exist."""
    return _entries(folder, folders=True)


def files_in(folder: str) -> list[str]:
    """Return the names of the files directly in a folder, sorted; empty if it does not exist."""
    return _entries(folder, folders=False)


def _entries(folder: str, folders: bool) -> list[str]:
    def names(fs: fsspec.AbstractFileSystem, path: str) -> list[str]:
        entries = fs.ls(path, detail=True) if fs.isdir(path) else []
        # Among them may be an object that stands for the folder itself.
        contents = [item for item in entries if item["name"].rstrip("/") != path.rstrip("/")]
        return sorted(Path(item["name"]).name for item in contents if (item["type"] == "directory") == folders)

    return call_with_retries(folder, names)


def download(uri: str, folder: str) -> None:
    """Copy all files below a folder to a local folder.

    Raises:
        BadLocation: a key would be written outside of the local folder, or a link leads out of `uri`.
    """
    names = names_in(uri, roots=[])
    targets = [join(folder, name) for name in names]

    def fetch(name: str, target: str) -> None:
        download_file(safe_join(uri, name), target)

    with ThreadPoolExecutor(PARALLEL_FILES) as threads:
        list(threads.map(keep_policy(fetch), names, targets))


def upload(folder: str, uri: str, part_bytes: int = PART_BYTES) -> None:
    """Copy all files below a local folder to a folder, one file at a time."""
    for name in names_in(folder):
        upload_file(f"{folder}/{name}", f"{uri}/{name}", part_bytes)


def remove_folder(uri: str) -> None:
    """Remove a folder and its contents, if it exists; of a link, the link alone."""
    if scheme_of(uri) == "file":
        remove_tree: Callable[[str], None] = os.unlink if Path(local_path(uri)).is_symlink() else shutil.rmtree
        with suppress(FileNotFoundError):
            call_with_retries(uri, lambda _, path: remove_tree(path))
    else:
        with ThreadPoolExecutor(PARALLEL_FILES) as threads:
            list(threads.map(keep_policy(lambda key: remove([f"{uri}/{key}"])), _keys_in(uri)))
