"""Names and folders: where a name that stands in a file, or in a listing, may lead.

A seal, an index, a row or an object's key is written by somebody else. Its names become addresses here and nowhere
else, and no address leads out of the folder that the name belongs to.
"""

import os
import posixpath
import re
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import fsspec

from crosslmm.storage.retry import BadLocation, scheme_of

DRIVE = re.compile(r"[A-Za-z]:")


class LeadsOut(BadLocation):
    """A symbolic link that leads out of the folders that may be read."""


def absolute(uri: str) -> str:
    """Make a local path absolute; leave URIs as they are."""
    return str(Path(uri).absolute()) if "://" not in uri else uri


def join(folder: str, name: str) -> str:
    """Return the path or URI of `name` inside a folder; judges the name alone, see `safe_join`.

    A name is one or more parts between slashes. Schemes, backslashes and escapes in it are text: a file may be called
    `file:x`, `..\\x` or `%2e%2e`.

    Raises:
        BadLocation: the name is empty or absolute, begins with a drive letter, or has a part `.` or `..`.
    """
    parts = name.split("/")
    if not parts[0] or DRIVE.match(name) or not {".", ".."}.isdisjoint(parts):
        raise BadLocation(f"{name!a} is not a name inside {folder}")
    if "://" not in folder:
        name = re.sub("/+", "/", name)  # the same file; a key with two slashes is another key
    return posixpath.join(folder, name)


def resolve(folder: str, name: str) -> str:
    """Return a path relative to a folder as an address; leave absolute paths and URIs as they are.

    For names that may lead anywhere until `within` or `follow` has judged them.
    """
    return name if "://" in name or name.startswith("/") else posixpath.join(folder, name)


def safe_join(folder: str, name: str, roots: Sequence[str] = ()) -> str:
    """Return the path or URI to open for a name that stands in a file, or in a listing of the folder.

    Args:
        folder: path or URI.
        name: of a file in it, which need not exist; see `join`.
        roots: further folders that links may lead to.

    Raises:
        BadLocation: the name, or a link on the way, leads out; or it is neither a file nor a folder.
    """
    return follow(join(folder, name), [folder, *roots])


def parent(uri: str) -> str:
    """Return the folder of a path or URI."""
    return posixpath.dirname(uri)


def within(uri: str, roots: Iterable[str]) -> bool:
    """Return whether a path or URI lies in one of these folders, judged by name alone: reads no store, follows no link.

    Always False for a key that contains `..`: an object store takes it as a name, but a proxy in front of the store
    may resolve it as a path.
    """
    path = _normalized(uri)
    folders = (_normalized(root).rstrip("/") + "/" for root in roots)
    return ".." not in path.split("/") and any(path.startswith(folder) for folder in folders)


def follow(uri: str, roots: Iterable[str]) -> str:
    """Return the path to open for a local file in one of these folders, without links; return the URI of an object.

    Args:
        uri: path or URI of a file or folder, which need not exist.
        roots: folders; it must lie in one of them, also once links are resolved in its path and in theirs.

    Raises:
        LeadsOut: a link leads to none of them.
        BadLocation: its name lies in none of them, or is one that no file can have; or see `require_file`.
    """
    roots = list(roots)
    if not within(uri, roots):
        raise BadLocation(f"{uri!a} lies outside of {roots[0]}")
    if scheme_of(uri) != "file":
        return uri
    try:
        path = os.path.realpath(_normalized(uri))
    except ValueError:  # a zero byte, half a surrogate pair
        raise BadLocation(f"{uri!a}: no file can have this name") from None
    folders = [os.path.realpath(_normalized(root)) for root in roots if scheme_of(root) == "file"]
    if path not in folders and not within(path, folders):
        raise LeadsOut(f"{uri!a}: a link leads out of its folder; replace it by what it links to")
    with suppress(OSError):  # opening it will say what is wrong
        require_file(path)
    return path


def require_file(path: str) -> None:
    """Raise BadLocation if a local path is a device, a pipe or a socket, which could block its reader for ever."""
    mode = Path(path).stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise BadLocation(f"{path!a}: is neither a file nor a folder")


def _normalized(uri: str) -> str:
    if scheme_of(uri) == "s3":
        return uri
    # Like fsspec, which removes file:// and decodes no escapes.
    return os.path.normpath(fsspec.get_filesystem_class("file")._strip_protocol(uri))
