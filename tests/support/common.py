"""Helpers that many tests share."""

from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]


def conversation(question: str, answer: str, video: bool = True) -> list[dict]:
    content = [{"type": "video"}] * video + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def random_frames(count: int, seed: int = 0, side: int = 48) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


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
