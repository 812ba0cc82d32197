import os
from pathlib import Path

# Before torch is imported anywhere: tests share two cores with what they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

from crosslmm.command_line import parse_run
from crosslmm.config import RunConfig
from crosslmm.model import CrossLMMForConditionalGeneration, CrossLMMProcessor
from crosslmm.model.pretrained import build_model, build_processor

ROOT = Path(__file__).parent.parent
pytest_plugins = ["browser_page"]


def conversation(question: str, answer: str, video: bool = True) -> list[dict]:
    content = [{"type": "video"}] * video + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def random_frames(count: int, seed: int = 0, side: int = 48) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


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


def open_gates(model: torch.nn.Module, value: float = 1.0) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".gate"):
                parameter.fill_(value)


def processes():
    """(pid, command line) of every process of this machine; a job's driver has a session of its own."""
    for path in Path("/proc").iterdir():
        try:
            if path.name.isdigit():
                yield int(path.name), (path / "cmdline").read_text()
        except OSError:
            continue
