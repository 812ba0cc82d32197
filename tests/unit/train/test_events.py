"""The channel between workers and driver."""

import pytest

from crosslmm.train.events import EventChannel

Channel = EventChannel.__ray_metadata__.modified_class


@pytest.mark.parametrize("kind", ["started", "step"])
def test_a_stop_waits_for_workers_that_train(kind):
    """A channel whose process was killed begins anew, and sees steps only: their checkpoint must not be skipped."""
    channel = Channel()
    assert channel.request_stop() is False
    channel.post(kind, ())
    assert channel.request_stop() is True
