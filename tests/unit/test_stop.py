"""A driver that is told to stop."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from crosslmm.train import launcher
from crosslmm.train.worker import Stopped


def test_who_is_told_to_stop_waits_for_the_last_checkpoint():
    told, taken = threading.Event(), []

    def workers():
        assert told.wait(30)
        time.sleep(0.5)
        taken.append("checkpoint")
        raise Stopped("after step 1")

    job = SimpleNamespace(events=SimpleNamespace(request_stop=SimpleNamespace(remote=told.set)))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            launcher._waiting(job, workers)
    finally:
        signal.signal(signal.SIGINT, before)
    assert taken == ["checkpoint"]
