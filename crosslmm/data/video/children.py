"""Child processes for decoding: they do not import the main script, and do not outlive it."""

import fcntl
import functools
import multiprocessing
import os
import signal
import types
from multiprocessing import popen_forkserver, spawn
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any


class _WithoutMain:
    """Stands in for `multiprocessing.spawn`. A child would otherwise run the program's main file first: a script
    without an `if __name__ == "__main__"` would run its top level again, in every child."""

    @staticmethod
    def get_preparation_data(name: str) -> dict[str, Any]:
        data = spawn.get_preparation_data(name)
        return {key: value for key, value in data.items() if not key.startswith("init_main")}


class _Popen(popen_forkserver.Popen):
    _launch = types.FunctionType(
        popen_forkserver.Popen._launch.__code__,  # type: ignore[attr-defined]
        {**popen_forkserver.Popen._launch.__globals__, "spawn": _WithoutMain},  # type: ignore[attr-defined]
    )


class _Process(ForkServerProcess):
    @staticmethod
    def _Popen(process: Any) -> popen_forkserver.Popen:  # noqa: N802
        return _Popen(process)


class _Context(ForkServerContext):
    Process = _Process


@functools.cache
def context() -> ForkServerContext:
    """Return a context whose children are forked from a server process with their modules already imported.

    Forking this process would copy its threads and open readers in an unusable state. From the server, a replacement
    starts within milliseconds. s3fs is preloaded because fsspec would import it in each child.
    """
    forking = _Context()
    forking.set_forkserver_preload(["crosslmm.data.video.decode_pool", "s3fs"])
    return forking


def end_with_owner() -> None:
    """Have the kernel kill this child when its owner ends, even if it hangs in native code and the owner was killed.

    The owner keeps a pipe to the child open as long as it lives.
    """
    owner = multiprocessing.parent_process()
    assert owner is not None
    fcntl.fcntl(owner.sentinel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(owner.sentinel, fcntl.F_SETSIG, signal.SIGKILL)
    flags = fcntl.fcntl(owner.sentinel, fcntl.F_GETFL)
    fcntl.fcntl(owner.sentinel, fcntl.F_SETFL, flags | os.O_ASYNC)
    if not owner.is_alive():  # it ended before the kernel was asked
        os._exit(1)
