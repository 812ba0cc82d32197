"""Processes that contend for a folder, as two starts of one job do.

Each is forked from a process that has imported the lease (two seconds), so that they meet at a chosen moment.

    with Contenders(environment) as contenders:
        first, second = contenders.start(folder), contenders.start(folder, offset_s=0.3)
        second.wait()      # 0 owned it to the end, 1 lost it, 2 was refused
        first.release()

While a contender owns the folder, it appends a line to FOLDER/written.PID each 20 ms, each after asking.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from crosslmm import lease, storage
from crosslmm.cli import start_job
from crosslmm.lease import owners
from tests.support.common import ROOT

WRITE_S = 0.02


class Contender:
    """A process that contends for a folder."""

    def __init__(self, pid: int, answer: Path) -> None:
        self.pid, self._answer = pid, answer

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._answer.exists()

    def release(self) -> None:
        """Let it give the folder up."""
        self._answer.with_suffix(".release").touch()

    def wait(self, seconds: float = 90.0) -> int:
        """Return its exit status."""
        until = time.monotonic() + seconds
        while not self.ended:
            assert time.monotonic() < until, f"process {self.pid} has not ended"
            time.sleep(0.05)
        return int(self.result["status"])

    @property
    def result(self) -> dict[str, Any]:
        """Its status, message, and the time from its start until it owned the folder [s]."""
        return json.loads(self._answer.read_text())


class Contenders:
    """Context manager: a process that forks contenders.

    Args:
        scratch: folder for their answers and what they write.
        environment: of the processes, besides this one's.
        beat_s, lease_s: in place of the lease's own, so that tests take seconds.
        elsewhere: contenders look like processes of different machines to each other.
    """

    def __init__(
        self,
        scratch: Path,
        environment: dict[str, str] | None = None,
        beat_s: float = 0.3,
        lease_s: float = 2.0,
        elsewhere: bool = False,
    ) -> None:
        self.scratch = scratch
        command = [sys.executable, "-m", "tests.support.twins", json.dumps([beat_s, lease_s, elsewhere])]
        self._parent = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=os.environ | (environment or {}) | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        self._started = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        assert self._parent.stdin
        assert self._parent.stdout
        self._parent.stdin.close()
        self._parent.wait(60)
        self._parent.stdout.close()

    def start(self, folder: str, offset_s: float = 0.0) -> Contender:
        """Start a contender that looks at the folder after `offset_s` [s], and holds it until it is released."""
        self._started += 1
        answer = self.scratch / f"answer-{self._started}"
        assert self._parent.stdin
        assert self._parent.stdout
        self._parent.stdin.write(json.dumps([folder, offset_s, str(answer)]) + "\n")
        self._parent.stdin.flush()
        return Contender(int(self._parent.stdout.readline()), answer)

    def require_one_owner_each(self, folders: Sequence[str], seed: int) -> None:
        """Start two contenders for each folder, the second up to 1.5 s later; fail unless exactly one of them owns it
        and the other is refused by the owner's name, and writes nothing."""
        offsets = [0.0, *(random.Random(seed).uniform(0, 1.5) for _ in folders[1:])]
        for owner, refused in self.twins(folders, offsets):
            assert [owner.wait(), refused.wait()] == [0, 2], (owner.result, refused.result)
            assert f"process {owner.pid}, for 0:00:" in refused.result["message"]
            assert self.lines(owner)
            assert not self.lines(refused)

    def twins(self, folders: Sequence[str], offsets_s: Sequence[float]) -> list[tuple[Contender, Contender]]:
        """Start two contenders for each folder, the second after its offset; return who owned it and who was refused.

        The owners are released once one of the two has ended.
        """
        pairs = [
            (self.start(folder), self.start(folder, offset)) for folder, offset in zip(folders, offsets_s, strict=True)
        ]
        ended = []
        for pair in pairs:
            while not any(one.ended for one in pair):
                time.sleep(0.05)
            for one in pair:
                one.release()
            ended.append(sorted(pair, key=lambda one: one.wait()))
        return [(owner, refused) for owner, refused in ended]

    def await_lines(self, contender: Contender) -> None:
        """Wait until a contender owns its folder."""
        until = time.monotonic() + 60
        while not self.lines(contender):
            assert time.monotonic() < until
            time.sleep(0.05)

    def lines(self, contender: Contender) -> list[float]:
        """Return the times at which a contender has written [s, monotonic]."""
        file = self.scratch / f"written.{contender.pid}"
        return [float(line) for line in file.read_text().splitlines()] if file.exists() else []


def contend(folder: str, offset_s: float, answer: str) -> None:
    """Own the folder for a while; write how it went."""
    time.sleep(offset_s)
    status, message, began, waited = 0, "", time.monotonic(), None
    try:
        with lease.claim(folder, "training", "give another --name").take() as fence:
            waited = time.monotonic() - began
            released = False
            while not released:
                released = Path(answer).with_suffix(".release").exists()
                fence.require_unless_recent()
                with Path(answer).with_name(f"written.{os.getpid()}").open("a") as file:
                    file.write(f"{time.monotonic()}\n")
                time.sleep(WRITE_S)
    except lease.FolderInUse as error:
        status, message = 2, str(error)
    except lease.LeaseLost as error:
        status, message = 1, str(error)
    except BaseException as error:
        status, message = 99, repr(error)
    storage.write_bytes(answer, json.dumps({"status": status, "message": message, "waited_s": waited}).encode())


def main() -> None:
    """Fork a contender for each line of stdin; print its process id."""
    from crosslmm.lease import lease as module

    module.BEAT_S, module.LEASE_S, elsewhere = json.loads(sys.argv[1])
    module.RECHECK_S, module.POLL_S = 2 * module.BEAT_S, module.BEAT_S / 3
    for line in iter(sys.stdin.readline, ""):
        if pid := os.fork():
            print(pid, flush=True)
            continue
        os.dup2(2, 1)  # the log; stdout is for process ids
        start_job()
        if elsewhere:
            owners._process = lambda pid: ""  # as where there is no /proc
        contend(*json.loads(line))
        os._exit(0)


if __name__ == "__main__":
    main()
