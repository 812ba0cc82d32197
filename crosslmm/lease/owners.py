"""The files of a lease: who owns a folder."""

import contextlib
import getpass
import json
import os
import secrets
import socket
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter

from crosslmm import ray_runtime, storage
from crosslmm.run_folder import OWNER_FILE, OWNERS_FOLDER

SETTLE_S = 2.0
"""Where the store cannot refuse a second writer, the time after which both read who came last [s]."""
MAX_FILE_BYTES = 2**14
REREAD_PAUSES_S = (0.05, 0.1, 0.2)
"""Pauses before an owner's file that cannot be parsed is read again [s]."""


@dataclass(frozen=True)
class Owner:
    """Who owns a folder, as its file says."""

    token: str
    """Differs between any two owners."""
    work: str
    """What it does: training, sweep."""
    user: str
    host: str
    pid: int
    process: str
    """Machine, namespace, id and start of its process, by which another process of the machine knows it."""
    cluster: str
    """Id of its Ray cluster; empty without one, like the next two."""
    job: str
    """Ray's number of the job in the cluster."""
    submission: str
    """Id under which the job was submitted."""
    held_s: float = 0.0
    """How long it has owned the folder, by its own clock [s]."""
    beats: int = 0
    ended: bool = False
    """Whether it has released the folder."""

    @classmethod
    def this_process(cls, work: str) -> Self:
        """Return this process as an owner."""
        cluster, job = ray_runtime.current_job()
        submission, process = ray_runtime.submission_id(), _process(os.getpid())
        return cls(
            secrets.token_hex(8), work, _user(), socket.gethostname(), os.getpid(), process, cluster, job, submission
        )

    @property
    def gone(self) -> bool:
        """Whether it is known to have ended. False also where this process cannot know."""
        return self.ended or self._killed or ray_runtime.job_has_ended(self.cluster, self.job)

    @property
    def _killed(self) -> bool:
        same_machine = bool(self.process) and self.process.split()[:2] == _process(os.getpid()).split()[:2]
        hidden = _state(self.pid) == "X" and _exists(self.pid)
        return same_machine and not hidden and _process(self.pid) != self.process

    @property
    def lives(self) -> bool:
        """Whether it is known to run, as a process of this machine that is not stopped."""
        same = bool(self.process) and _process(self.pid) == self.process
        return same and not self.ended and _state(self.pid) not in "Tt"

    def __str__(self) -> str:
        job = f"Ray job {self.submission}, " if self.submission else ""
        age = timedelta(seconds=round(self.held_s))
        return f"the {self.work} of {self.user} on {self.host} ({job}process {self.pid}, for {age})"


_OWNER = TypeAdapter(Owner)


@dataclass(frozen=True)
class Entry:
    """An owner's file: its number, counted from 1, and its content."""

    number: int
    content: bytes

    def __str__(self) -> str:
        return str(self.owner or "somebody whose file cannot be read")

    @property
    def owner(self) -> Owner | None:
        """The owner; None if the file is empty or damaged, as after a kill while it was made."""
        try:
            return _OWNER.validate_json(self.content)
        except ValueError:
            return None

    @property
    def free(self) -> bool:
        """Whether its owner is known to have ended."""
        return self.owner is not None and self.owner.gone


def process_tags() -> dict[str, str]:
    """Return who runs this process, where, and as which of Ray's jobs, as tags of an MLflow run."""
    job = ray_runtime.submission_id()
    return {"mlflow.user": _user(), "host": socket.gethostname(), **({"ray_job": job} if job else {})}


def _user() -> str:
    with contextlib.suppress(KeyError, OSError):  # a container's user may have no name
        return getpass.getuser()
    return str(os.getuid())


def newest(folder: str, known: int | None = None) -> Entry | None:
    """Return the owner's file with the highest number; None without one.

    Args:
        folder: path or URI.
        known: a number that exists; without it, the files are listed.
    """
    if known is None:
        names = storage.files_in(storage.join(folder, OWNERS_FOLDER))
        known = max((int(match[1]) for name in names if (match := OWNER_FILE.fullmatch(name))), default=0)
    last = read(folder, known) if known else None
    while following := read(folder, known + 1):  # a listing may lag behind
        last, known = following, following.number
    return last


def read(folder: str, number: int) -> Entry | None:
    """Return an owner's file; None if there is no such number.

    A store that overwrites files in place may return part of one that its owner is writing: such a file is read again.
    """
    try:
        uri = storage.safe_join(folder, _name(number))
        entry = Entry(number, storage.read_at_most(uri, MAX_FILE_BYTES))
        for pause_s in REREAD_PAUSES_S:
            if entry.owner:
                break
            time.sleep(pause_s)
            entry = Entry(number, storage.read_at_most(uri, MAX_FILE_BYTES))
    except FileNotFoundError:
        return None
    except (ValueError, IsADirectoryError, storage.BadLocation):  # too large, a folder, a link that leads out
        return Entry(number, b"")
    return entry


def create(folder: str, number: int, owner: Owner) -> bool:
    """Make an owner's file unless there is one; return whether it is this owner's."""
    uri, content = _file(folder, number), _content(owner)
    # A store that ignores If-None-Match lets the second call succeed, too: it cannot tell owners apart.
    if storage.create_bytes(uri, content) and storage.create_bytes(uri, content):
        time.sleep(SETTLE_S)
    entry = read(folder, number)
    return bool(entry and entry.owner and entry.owner.token == owner.token)


def write(folder: str, number: int, owner: Owner) -> None:
    """Write an owner's file anew; nobody but the owner does."""
    storage.write_bytes(_file(folder, number), _content(owner))


def _file(folder: str, number: int) -> str:
    return storage.join(folder, _name(number))


def _name(number: int) -> str:
    return f"{OWNERS_FOLDER}/{number:08d}.json"


def _content(owner: Owner) -> bytes:
    return json.dumps(asdict(owner)).encode()


def _process(pid: int) -> str:
    """Return what identifies a living process among those of all machines; empty if there is none, or no /proc."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = Path("/proc/self/ns/pid").readlink()
        start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
    return "" if _state(pid) in "ZX" else f"{machine} {namespace} {pid} {start}"


def _state(pid: int) -> str:
    """Return a process's state as in /proc: T for a stopped one, Z for one that has ended; X if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def _exists(pid: int) -> bool:
    """Return whether there is such a process; /proc may hide those of other users (hidepid)."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True
