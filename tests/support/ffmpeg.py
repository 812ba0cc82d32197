"""Debian's ffmpeg as a witness: it makes files that PyAV cannot make, and decodes whole files from start to end."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.support import zoo

FFMPEG = shutil.which("ffmpeg")
needs_ffmpeg = pytest.mark.skipif(FFMPEG is None, reason="needs ffmpeg: apt-get install ffmpeg")
SIDE = 64


def run(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run ffmpeg on one thread; raise if it fails."""
    command = [FFMPEG or "ffmpeg", "-hide_banner", "-nostdin", "-y", "-threads", "1", *arguments]
    if stdin:
        command.remove("-nostdin")
    return subprocess.run(command, input=stdin, capture_output=True, check=True)


def make(path: Path, *options: str, frames: int = 40, fps: float = 10, audio_s: float = 0, size=(128, 64)) -> Path:
    """Write a video of numbered frames to `path`, with a tone of `audio_s` if that is not 0; `options` go before its
    name."""
    pictures = b"".join(zoo.draw(number, *size).tobytes() for number in range(frames))
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{size[0]}x{size[1]}", "-r", f"{fps}", "-i", "-"]
    tone = ["-f", "lavfi", "-i", f"sine=duration={audio_s}:sample_rate=44100"] if audio_s else []
    run(*source, *tone, *options, str(path), stdin=pictures)
    return path


def decode_all(path: Path) -> tuple[np.ndarray, list[int | None], np.ndarray]:
    """Decode every frame with ffmpeg, from start to end.

    Returns:
        (times, numbers, images): when each frame appears, from the first one on [s]; its number; and the frames, uint8
        (frames, SIDE, SIDE, 3).
    """
    picture = ["-map", "0:v:0", "-vf", "showinfo", "-fps_mode", "passthrough"]
    result = run("-i", str(path), *picture, "-s", f"{SIDE}x{SIDE}", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    times = np.array([float(time) for time in re.findall(rb"pts_time:(\S+)", result.stderr)])
    images = np.frombuffer(result.stdout, np.uint8).reshape(-1, SIDE, SIDE, 3)
    assert len(times) == len(images), "ffmpeg drops or repeats frames"
    return times - times[0], [zoo.read_number(image) for image in images], images
