"""Which errors of the workers are worth a restart."""

from types import SimpleNamespace

import pytest
from ray.train import TrainingFailedError

from crosslmm.data.quarantine import TooManyUnreadable
from crosslmm.train import launcher


@pytest.fixture
def fit(monkeypatch, tmp_path):
    """Run `launcher.fit` with workers that end with these errors, one after another; return the number of attempts."""
    monkeypatch.setattr(launcher.time, "sleep", lambda seconds: None)

    def fit(*errors):
        attempts = []

        def train():
            attempts.append(errors[min(len(attempts), len(errors) - 1)])
            error = TrainingFailedError("training failed")
            error.worker_failures = {0: attempts[-1]}
            raise error

        monkeypatch.setattr(launcher, "_trainer", lambda job: SimpleNamespace(fit=train))
        config = SimpleNamespace(scaling=SimpleNamespace(max_failures=3))
        with pytest.raises(launcher.TrainingFailed) as failed:
            launcher.fit(SimpleNamespace(folder=str(tmp_path), config=config))
        return len(attempts), str(failed.value)

    return fit


@pytest.mark.parametrize(
    "error", [ValueError("shape mismatch"), KeyError("content"), TypeError("not a str"), AssertionError("no frames")]
)
def test_an_error_of_code_or_data_that_comes_back_is_not_tried_again(fit, error):
    attempts, message = fit(error)
    assert attempts == 2
    assert message.startswith(f"worker 0: {type(error).__name__}: ")
    assert message.endswith("given up after 1 restarts without a new checkpoint")


def test_errors_that_differ_or_come_from_the_machine_are_tried_again(fit):
    assert fit(ValueError("a"), ValueError("b"), ValueError("c"), ValueError("d"))[0] == 4
    assert fit(RuntimeError("NCCL error"))[0] == 4
    assert fit(OSError("disk"))[0] == 4


def test_too_many_unreadable_rows_end_the_run_at_once(fit):
    attempts, message = fit(TooManyUnreadable("3 steps without a readable sample"))
    assert (attempts, message) == (1, "worker 0: TooManyUnreadable: 3 steps without a readable sample")
