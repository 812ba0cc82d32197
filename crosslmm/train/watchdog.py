"""Finds a rank that hangs: Ray asks only whether a process answers, and one that waits for ever does."""

import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from crosslmm.config import WatchdogConfig
from crosslmm.train.loop import Phase

GRACE_S = 5.0
"""Before the first rank that found a hang ends, the others find it too, and write their stacks [s]."""
UNHEARD_S = 60.0
"""So much later a thread without Python ends a process whose Python is stuck [s]."""


class Watchdog:
    """A thread of one rank that ends its process when a phase takes too long, after it has handed over its stacks.

    The whole group is started again when one of its processes ends. A rank that was stopped from outside (SIGSTOP, a
    frozen machine) cannot look at itself: its peers on the same machine say so.

    Args:
        limits: of each phase [s].
        report: takes the phase and a text, the stacks of all threads; may take GRACE_S.
        peers: process ids of the ranks of this machine, by rank.
    """

    def __init__(
        self, limits: WatchdogConfig, report: Callable[[str, str], None], peers: dict[int, int] | None = None
    ) -> None:
        self._limits = {
            "start-up": limits.startup_s,
            "data": limits.data_s,
            "step": limits.step_s,
            "validation": limits.validation_s,
            "checkpoint": limits.checkpoint_s,
        }
        self._report, self.peers = report, peers or {}
        self._last_words = tempfile.TemporaryFile("w+")  # noqa: SIM115  open as long as the process
        self._phase, self._until = "start-up", float("inf")
        self.enter("start-up")
        self._over = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def enter(self, phase: Phase) -> None:
        """A phase begins, and the one before it is over."""
        limit = self._limits[phase]
        self._phase, self._until = phase, time.monotonic() + limit
        # Where a native call never gives Python back, no thread of ours runs; this one is C.
        faulthandler.dump_traceback_later(limit + UNHEARD_S, exit=True)

    def close(self) -> None:
        """Nothing is watched any more."""
        self._over.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, max(0.05, self._until - time.monotonic()))):
            if time.monotonic() >= self._until:
                self._end()

    def _end(self) -> None:
        phase = self._phase
        limit = self._limits[phase]
        try:
            self._hand_over(phase, limit)
        finally:
            os._exit(1)

    def _hand_over(self, phase: str, limit: float) -> None:
        faulthandler.dump_traceback(self._last_words)
        self._last_words.seek(0)
        text = f"{phase} has taken more than {limit:g} s\n\n{self._states()}\n{self._last_words.read()}"
        reporting = threading.Thread(target=self._report, args=(phase, text), daemon=True)
        reporting.start()
        reporting.join(GRACE_S * 4)
        time.sleep(GRACE_S)

    def _states(self) -> str:
        """What the system says of the ranks on this machine: running, sleeping, stopped, gone."""
        lines = []
        for rank, pid in self.peers.items():
            try:
                state = psutil.Process(pid).status()
            except psutil.NoSuchProcess:
                state = "gone"
            lines.append(f"rank {rank}, process {pid}: {state}\n")
        return "".join(lines)


def stacks_name(attempt: str, phase: str, rank: int) -> str:
    """Where in a run's folder a rank's stacks go."""
    return str(Path("stacks") / f"{attempt}-{phase}-rank-{rank}.txt")
