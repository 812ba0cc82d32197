"""A folder that a job writes has one owner: a lease in it says who, and whoever writes asks whether it still holds.

    FOLDER/owners/00000001.json     the first owner: who it is, its number of heartbeats, whether it released the lease
    FOLDER/owners/00000002.json     the next one; the owner with the highest number owns the folder

An owner makes its file if nobody else has made it, then rewrites it every `BEAT_S`: no two processes ever write one
file. Files are never removed, so a number is a fencing token: whoever finds the next number taken, or another token in
its own file, has lost the folder. Stores that ignore If-None-Match keep the last of two writers; there, both wait
`SETTLE_S` and read who it was.

The rule by which a folder changes hands:

- An owner that has released its lease, or whose process or Ray job is known to have ended, is replaced at once.
- Any other is replaced once it has been watched for `LEASE_S` without a heartbeat. Clocks are not compared: hosts'
  differ. Time in which the store does not answer does not count.
- An owner with a heartbeat in that time is alive, and the newcomer is refused. It is refused at once if the owner is a
  running process of the same machine.
- An owner that cannot send heartbeats (the store is unreachable, the process was stopped) goes on until it finds that
  it was replaced.
"""

import logging
import math
import signal
import threading
import time
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from crosslmm import storage
from crosslmm.config import BadConfig
from crosslmm.lease import owners
from crosslmm.lease.owners import Entry, Owner
from crosslmm.text import in_brief

log = logging.getLogger(__name__)

BEAT_S = 5.0
"""Pause between two writes of an owner's file [s]."""
LEASE_S = 30.0
"""How long an owner is watched without a beat before it counts as dead [s]."""
RECHECK_S = 2 * BEAT_S
"""Age at which an owner's knowledge that it owns the folder is renewed, where beats have not done so [s]."""
POLL_S = 1.0
"""Pause between two looks at an owner that is watched [s]."""
RELEASE = storage.RetryPolicy(deadline_s=5.0)
"""How long a job that ends tries to say so."""


class FolderInUse(BadConfig):
    """Somebody else owns the folder."""


class LeaseLost(Exception):
    """Somebody else owns the folder now; this process must not write any more."""


@dataclass(frozen=True)
class Claim:
    """A folder that nobody owned when it was looked at."""

    folder: str
    work: str
    instead: str
    last: Entry | None
    """The last owner, which is gone or silent."""

    def take(self) -> "_Lease":
        """Own the folder; the lease is a context manager, which gives the `Fence`.

        Raises:
            FolderInUse: somebody else took it since.
        """
        newest = owners.newest(self.folder)
        if newest and newest != self.last and not newest.free:
            raise _owned(self.folder, newest, self.instead)
        number, owner = newest.number + 1 if newest else 1, Owner.this_process(self.work)
        if not owners.create(self.folder, number, owner):
            raise _owned(self.folder, owners.read(self.folder, number), self.instead)
        return _Lease(Fence(self.folder, number, owner.token), owner)


def claim(folder: str, work: str, instead: str) -> Claim:
    """Wait until it is clear that nobody owns a folder. Decides at once if it is known whether the last owner runs or
    has ended; watches for `LEASE_S` otherwise.

    Args:
        folder: path or URI.
        work: what the caller will do there, as in `Owner`.
        instead: what a refused caller can do besides stopping the owner; the end of the error's message.

    Raises:
        FolderInUse: it has an owner, which lives.
    """
    newest = owners.newest(folder)
    silent_s, looked = 0.0, _clock()
    if newest and newest.owner and newest.owner.lives:
        raise _owned(folder, newest, instead)
    if newest and not newest.free:
        log.info("%s belongs to %s; watching for %g s to see whether it is alive", folder, newest, LEASE_S)
    while newest and not newest.free and silent_s < LEASE_S:
        time.sleep(POLL_S)
        before, newest = newest, owners.newest(folder, newest.number)
        if newest and newest != before and not newest.free:
            raise _owned(folder, newest, instead)
        silent_s += min(_clock() - looked, 2 * POLL_S)  # longer only if the store did not answer
        looked = _clock()
    return Claim(folder, work, instead, newest)


class Fence:
    """Tells whether an owner still owns its folder; travels to the processes that write for it.

    Args:
        folder: path or URI.
        number: of the owner's file.
        token: the owner's.
    """

    def __init__(self, folder: str, number: int, token: str) -> None:
        self.folder, self.number, self.token = folder, number, token
        self._asked = -math.inf  # when the last question was asked that has had its answer

    def __reduce__(self) -> tuple[Any, ...]:
        return Fence, (self.folder, self.number, self.token)  # another process has asked nothing yet

    def require(self) -> None:
        """Raise an error if the folder has another owner: before anything that counts once it is written.

        Raises:
            LeaseLost: it has another one.
            OSError: the store does not answer, or refuses.
        """
        asked = _clock()
        following = owners.read(self.folder, self.number + 1)
        own = owners.read(self.folder, self.number) if following is None else None
        if own is None or own.owner is None or own.owner.token != self.token:
            whose = following or own
            reason = f"belongs to {whose} now" if whose else "has lost its lease, whose file was removed"
            raise LeaseLost(f"{self.folder}: {reason}; this start has stopped, and leaves it alone")
        self._asked = asked

    def require_unless_recent(self, within_s: float | None = None) -> None:
        """Like `require`, for records: asks only if the last answer is old, and goes on if the store cannot be asked.

        Args:
            within_s: age up to which the last answer suffices [s]; 0 always asks. None is `RECHECK_S`, for records that
                are written all the time.
        """
        if _clock() - self._asked < (RECHECK_S if within_s is None else within_s):
            return
        try:
            with storage.retrying(storage.NO_RETRIES):
                self.require()
        except OSError:  # the store is away, or refuses for now: whatever counts is not written without an answer
            self._asked = _clock()


class _Lease:
    """Context manager: beats in a thread, and says at the end that the owner has ended.

    When the folder is lost, the block ends with `LeaseLost`. If it was entered in the main thread, that is interrupted.
    """

    def __init__(self, fence: Fence, owner: Owner) -> None:
        self.fence, self._owner = fence, owner
        self._began, self._closed = _clock(), threading.Event()
        self._interruptible = threading.current_thread() is threading.main_thread()
        self._thread = threading.Thread(target=self._beat, name=f"lease of {fence.folder}", daemon=True)

    def __enter__(self) -> Fence:
        self._thread.start()
        return self.fence

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._closed.set()
        self._thread.join(BEAT_S)
        try:
            if self._thread.is_alive():  # it would write over what is written now
                raise TimeoutError("the store does not answer")
            with storage.retrying(RELEASE):
                self.fence.require()
                self._write(ended=True)
        except LeaseLost as lost:
            raise lost from None
        except OSError as failure:
            text = "the lease of %s could not be given up: %s; the next start waits %g s"
            log.warning(text, self.fence.folder, in_brief(failure), LEASE_S)

    def _beat(self) -> None:
        failing = False
        while not self._closed.wait(BEAT_S):
            try:
                with storage.retrying(storage.NO_RETRIES):
                    self.fence.require()
                    self._write()
                failing = False
            except LeaseLost:
                self._interrupt()
                return
            except Exception as error:  # the owner goes on until somebody else has taken over
                if not failing:
                    log.warning("the lease cannot be renewed: %s; trying again", in_brief(error))
                failing = True

    def _write(self, ended: bool = False) -> None:
        held_s = round(_clock() - self._began, 1)
        self._owner = replace(self._owner, beats=self._owner.beats + 1, held_s=held_s, ended=ended)
        owners.write(self.fence.folder, self.fence.number, self._owner)

    def _interrupt(self) -> None:
        """Send the main thread SIGTERM, or SIGINT where nothing handles SIGTERM: a shell's background job ignores
        SIGINT."""
        ends = signal.SIGTERM if callable(signal.getsignal(signal.SIGTERM)) else signal.SIGINT
        if self._interruptible and not self._closed.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, ends)


def _owned(folder: str, entry: Entry | None, instead: str) -> FolderInUse:
    submission = entry.owner.submission if entry and entry.owner else ""
    stop = f"stop it (ray job stop {submission})" if submission else "stop it"
    return FolderInUse(f"{folder}: belongs to {entry}, which is running; {stop}, or {instead}")


def _clock() -> float:
    """Return a time that also passes while the process is stopped or the machine sleeps [s]."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
