import contextlib
import logging
import os
from collections.abc import Iterator

# Before torch is imported anywhere: tests share two cores with what they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

from crosslmm.cli import parse_run
from crosslmm.config import RunConfig
from crosslmm.model import CrossLMMForConditionalGeneration, CrossLMMProcessor
from crosslmm.model.loading import build_model, build_processor

# Hypothesis fails a case that takes over 0.2 s, which depends on what else the machine does.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

pytest_plugins = ["tests.support.browser_page"]


@contextlib.contextmanager
def logging_restored() -> Iterator[None]:
    """Context manager: undo what jobs do to the package's logger, which would change what later tests see in a log."""
    log = logging.getLogger("crosslmm")
    before = log.level, log.propagate, list(log.handlers)
    yield
    log.setLevel(before[0])
    log.propagate, log.handlers = before[1:]


@pytest.fixture(autouse=True, scope="module")
def logging_after_a_module() -> Iterator[None]:
    with logging_restored():
        yield


@pytest.fixture(autouse=True)
def logging_after_a_test() -> Iterator[None]:
    with logging_restored():
        yield


@pytest.fixture(scope="session")
def config() -> RunConfig:
    # 6 x 6 patches and 4 tokens a frame, whatever the preset is tuned to.
    return parse_run(["--model.vision.patch_size=8", "--model.pool_stride=3"], "")


@pytest.fixture(scope="session")
def processor(config) -> CrossLMMProcessor:
    return build_processor(config.model)


@pytest.fixture
def model(config, processor) -> CrossLMMForConditionalGeneration:
    """The tiny model with random weights and gates still at zero."""
    return build_model(config.model, processor, seed=0).eval()
