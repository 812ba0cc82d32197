import os

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
