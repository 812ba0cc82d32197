"""Watchdog for hanging ranks: Ray checks only that a process answers, and a rank that waits forever still does."""

import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from crosslmm.config import WatchdogConfig
from crosslmm.run_folder import STACKS_FOLDER
from crosslmm.train.loop import Phase

GRACE_S = 5.0
"""Pause between the report of a hang and the exit of the process, in which other ranks can report theirs [s]."""
NATIVE_MARGIN_S = 60.0
"""How long after a phase's limit a C thread ends a process whose interpreter is stuck [s]."""


class Watchdog:
    """A thread that ends its rank's process when a phase takes too long, after reporting the stacks of all threads.

    All ranks are restarted when one process ends. A rank that was stopped from outside (SIGSTOP, a frozen machine)
    cannot watch itself: its peers on the same machine report its state.

    Args:
        limits: time limit of each phase [s].
        report: called with the phase and a text with all stacks; gets at most four times `grace_s`.
        peers: process ids of the ranks on this machine, by rank.
        grace_s: see `GRACE_S`.
        native_margin_s: see `NATIVE_MARGIN_S`.
    """

    def __init__(
        self,
        limits: WatchdogConfig,
        report: Callable[[str, str], None],
        peers: dict[int, int] | None = None,
        grace_s: float = GRACE_S,
        native_margin_s: float = NATIVE_MARGIN_S,
    ) -> None:
        self.grace_s, self.native_margin_s = grace_s, native_margin_s
        self._limits: dict[Phase, float] = {
            "start-up": limits.startup_s,
            "data": limits.data_s,
            "step": limits.step_s,
            "validation": limits.validation_s,
            "checkpoint": limits.checkpoint_s,
        }
        self._report, self.peers = report, peers or {}
        self._stacks = tempfile.TemporaryFile("w+")  # noqa: SIM115  open until the process ends
        self._phase: Phase = "start-up"
        self._until = float("inf")
        self.enter("start-up")
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def enter(self, phase: Phase) -> None:
        """Begin a phase, and end the one before it."""
        limit = self._limits[phase]
        self._phase, self._until = phase, time.monotonic() + limit
        # While a native call holds the interpreter lock, no Python thread runs; faulthandler's is a C thread.
        faulthandler.dump_traceback_later(limit + self.native_margin_s, exit=True)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, max(0.05, self._until - time.monotonic()))):
            if time.monotonic() >= self._until:
                self._end_process()

    def _end_process(self) -> None:
        phase = self._phase
        try:
            self._report_stacks(phase)
        finally:
            os._exit(1)

    def _report_stacks(self, phase: Phase) -> None:
        """Report in a thread of its own, which may hang too; then give the other ranks time to report."""
        faulthandler.dump_traceback(self._stacks)
        self._stacks.seek(0)
        text = f"{phase} took longer than {self._limits[phase]:g} s\n\n{self._peer_states()}\n{self._stacks.read()}"
        reporting = threading.Thread(target=self._report, args=(phase, text), daemon=True)
        reporting.start()
        reporting.join(self.grace_s * 4)
        time.sleep(self.grace_s)

    def _peer_states(self) -> str:
        """Return the state of each rank on this machine: running, sleeping, stopped, gone; one line each."""
        lines = []
        for rank, pid in self.peers.items():
            try:
                state = psutil.Process(pid).status()
            except psutil.NoSuchProcess:
                state = "gone"
            except Exception as error:  # the stacks are to be reported all the same
                state = f"unknown ({type(error).__name__})"
            lines.append(f"rank {rank}, process {pid}: {state}\n")
        return "".join(lines)


def stacks_name(attempt: str, phase: str, rank: int) -> str:
    """Return the name of a rank's stacks in the run's folder."""
    return str(Path(STACKS_FOLDER) / f"{attempt}-{phase}-rank-{rank}.txt")
