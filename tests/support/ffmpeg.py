"""Debian's ffmpeg as a witness: it makes files that PyAV cannot make, and decodes whole files from start to end."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from crosslmm.config import DataConfig
from crosslmm.data.frame_sampling import SampledFrames
from crosslmm.data.video.decode import decode_video
from tests.support import zoo

FFMPEG = shutil.which("ffmpeg")
needs_ffmpeg = pytest.mark.skipif(FFMPEG is None, reason="needs ffmpeg: apt-get install ffmpeg")
COUNT, SIDE = 8, 64
DATA = DataConfig(num_frames=COUNT)
H264 = ("-c:v", "libx264", "-g", "10", "-bf", "2", "-pix_fmt", "yuv420p", "-threads", "1", "-c:a", "aac")
MPEG2 = ("-c:v", "mpeg2video", "-g", "10", "-bf", "2", "-c:a", "mp2")
MPEG4 = ("-c:v", "mpeg4", "-g", "10", "-c:a", "mp3")
VP8 = ("-c:v", "libvpx", "-g", "10", "-c:a", "libvorbis")
THEORA = ("-c:v", "libtheora", "-q:v", "8", "-g", "10", "-c:a", "libvorbis")
FRAGMENTS = ("-movflags", "frag_keyframe+empty_moov+skip_trailer")
SLOW = {"fps": 10, "frames": 40}
FAST = {"fps": 25, "frames": 100}


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


def expected(path: Path, start: float = 0.0, end: float = np.inf, duration: float = 0.0):
    """Return the times and pictures that are right by ffmpeg's decoding of everything; without a `duration` [s], the
    last frame is on screen for as long as most are."""
    times, numbers, images = decode_all(path)
    duration = duration or times[-1] + (np.median(np.diff(times)) if len(times) > 1 else 0.1)
    end = min(end, duration)
    moments = start + (np.arange(COUNT) + 0.5) * (end - start) / COUNT + 1e-5
    chosen = np.unique(np.searchsorted(times, moments, side="right") - 1)
    return times[chosen], [numbers[i] for i in chosen], images[chosen], duration


def require_right(path: Path, start: float = 0.0, end: float = np.inf) -> SampledFrames:
    """Compare what is decoded with what is right; return it."""
    times, numbers, images, _ = expected(path, start, end)
    result = decode_video(f"{path}#t={start},{end}" if end < np.inf else str(path), DATA, SIDE)
    assert isinstance(result, SampledFrames), result
    assert [zoo.read_number(image) for image in result.images] == numbers
    assert result.times == pytest.approx(times, abs=2e-3)
    assert abs(result.images.astype(int) - images).mean() < 4
    assert (result.shortfall is None) == (len(numbers) == COUNT)
    return result
