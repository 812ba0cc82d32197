"""The launcher: a driver that is told to stop."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from crosslmm.train import launcher
from crosslmm.train.worker import Stopped


def test_a_stopped_driver_waits_for_the_last_checkpoint():
    stop_requested, saved = threading.Event(), []

    def workers():
        assert stop_requested.wait(30)
        time.sleep(0.5)
        saved.append("checkpoint")
        raise Stopped("after step 1")

    job = SimpleNamespace(events=SimpleNamespace(request_stop=SimpleNamespace(remote=stop_requested.set)))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            launcher.run_interruptibly(job, workers)
    finally:
        signal.signal(signal.SIGINT, before)
    assert saved == ["checkpoint"]
