"""Pretrained weights and where they come from. Whoever published them is not trusted: only listed files are opened."""

import contextlib
import json
import os
import posixpath
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from crosslmm import storage

CONFIG = ("config.json",)
WEIGHTS = (*CONFIG, "model.safetensors")
"""Where there is no `model.safetensors`, the shards that an index names take its place."""
TOKENIZER = (
    *CONFIG, "tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja",
)  # fmt: skip

INDEX = "model.safetensors.index.json"
PLAIN_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
PARALLEL_SHARDS = 8
"""Shards that are fetched at the same time."""


@dataclass(frozen=True)
class WeightsSource:
    """Location of pretrained weights: a hub name, a local directory, an s3:// folder, or a GGUF file (path or s3://)."""

    uri: str
    revision: str | None = None

    @contextlib.contextmanager
    def local(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield the arguments for `from_pretrained`: a temporary folder with these files, or with the GGUF file alone.

        Transformers takes what it finds beside the weights, pickles and adapters among it. Here it finds nothing else.

        Raises:
            ValueError: there are no weights, a file names another one outside of its folder, or a link leads out of it.
            OSError: the source cannot be read.
        """
        with tempfile.TemporaryDirectory() as folder:
            arguments: dict[str, Any] = {"pretrained_model_name_or_path": folder}
            if self.uri.endswith(".gguf"):
                arguments["gguf_file"] = posixpath.basename(self.uri)
                self._fetch_gguf(Path(folder, arguments["gguf_file"]))
            else:
                self._fetch_listed(names, Path(folder))
            yield arguments

    def _fetch_gguf(self, target: Path) -> None:
        uri = _without_scheme(self.uri)
        if Path(uri).exists():  # links are followed: a person named this file
            uri = os.path.realpath(uri)
        if not _fetch(posixpath.dirname(uri) or ".", posixpath.basename(uri), target, self.revision):
            raise ValueError("there is no such file")

    def _fetch_listed(self, names: Sequence[str], folder: Path) -> None:
        """Fetch those of the files that exist, and then the files that they name."""

        def fetch(name: str) -> bool:
            return _fetch(_without_scheme(self.uri), name, folder / name, self.revision)

        present = [name for name in names if fetch(name)]
        if not present:
            raise ValueError(f"there is no file named {names[0]}")
        if "tokenizer_config.json" in present:
            # Tokenizers for other versions of Transformers.
            for name in _names_in(folder / "tokenizer_config.json", "fast_tokenizer_files", "tokenizer*.json"):
                fetch(name)
        if "model.safetensors" in names and "model.safetensors" not in present:
            if not fetch(INDEX):
                raise ValueError(f"there is no file named model.safetensors or {INDEX}; other formats are not read")
            shards = _names_in(folder / INDEX, "weight_map", "*.safetensors")
            with ThreadPoolExecutor(PARALLEL_SHARDS) as threads:
                missing = [name for name, exists in zip(shards, threads.map(fetch, shards), strict=True) if not exists]
            if missing:
                raise ValueError(f"there is no file named {missing[0]}, which {INDEX} names")


def _fetch(folder: str, name: str, target: Path, revision: str | None) -> bool:
    """Copy one file from a path, s3:// URI or hub name, or link to it if it is large; return whether it exists."""
    if storage.scheme_of(folder) == "s3":
        if not storage.exists(f"{folder}/{name}"):
            return False
        storage.download_file(f"{folder}/{name}", str(target))
        return True
    if Path(folder).is_dir():
        path = _inside(Path(folder), name)
    else:
        # Only the first file must exist. Where another is missing, that must not be reported as a failure of the hub.
        first = name in CONFIG or name.endswith(".gguf")
        path = cached_file(folder, name, revision=revision, _raise_exceptions_for_missing_entries=first)
    if path is None:
        return False
    if target.suffix in (".safetensors", ".gguf"):
        target.symlink_to(os.path.realpath(path))
    else:  # copied: a link could be changed between our check and Transformers' reading
        shutil.copyfile(path, target)
    return True


def _inside(folder: Path, name: str) -> str | None:
    """Return the path of a file of a local folder, without links; None if there is no such file.

    Raises:
        ValueError: a link leads out of the folder.
    """
    snapshots = folder.resolve().parent
    blobs = snapshots.parent / "blobs"
    # Files in a folder of the hub's cache are links to ../../blobs.
    in_cache = snapshots.name == "snapshots" and not blobs.is_symlink()
    try:
        path = storage.safe_join(str(folder.absolute()), name, [str(blobs)] if in_cache else [])
    except storage.LeadsOut:
        raise ValueError(f"{name} is a link that leads out of the folder; put the file itself there") from None
    return path if Path(path).is_file() else None


def _names_in(file: Path, key: str, pattern: str) -> list[str]:
    """Return the names of files under a key of a JSON file, sorted.

    Raises:
        ValueError: it is not such JSON, or a name has path parts or does not match `pattern`.
    """
    try:
        names = json.loads(file.read_bytes()).get(key, [])
        names = sorted(set(names.values() if isinstance(names, dict) else names))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file.name} cannot be read: {error}") from error
    for name in names:
        if not (isinstance(name, str) and PLAIN_NAME.fullmatch(name) and fnmatchcase(name, pattern)):
            raise ValueError(f"{file.name} names {ascii(name)[:100]}; only {pattern} of the same folder is opened")
    return names


def _without_scheme(uri: str) -> str:
    return uri.removeprefix("file://")
