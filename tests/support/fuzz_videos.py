"""Videos and pictures of every container, for `fuzz_files`: how they are made, and how they are read."""

import io
import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from crosslmm.config import DataConfig
from crosslmm.data.frame_sampling import SampledFrames
from crosslmm.data.video.decode import decode_video, probe_video
from crosslmm.data.video.frame_list import FrameList
from tests.support import zoo

DATA = DataConfig(num_frames=3, max_frame_pixels=10**6)
SMALL = {"frames": 8, "g": "3"}
VIDEOS: dict[str, Callable[[], bytes]] = {
    "mov": lambda: zoo.video("mov", audio=True, **SMALL),
    "mp4 in fragments": lambda: zoo.video(container={"movflags": "frag_keyframe+empty_moov"}, **SMALL),
    "mkv": lambda: zoo.video("matroska", audio=True, **SMALL),
    "webm": lambda: zoo.video("webm", "libvpx-vp9", **SMALL),
    "avi": lambda: zoo.video("avi", "mpeg4", **SMALL),
    "transport stream": lambda: zoo.video("mpegts", **SMALL),
    "camcorder's stream": lambda: zoo.video("mpegts", container={"mpegts_m2ts_mode": "1"}, **SMALL),
    "mpg": lambda: zoo.video("mpeg", "mpeg2video", **SMALL),
    "vob": lambda: zoo.video("vob", "mpeg2video", **SMALL),
    "flv": lambda: zoo.video("flv", **SMALL),
    "flv of Sorenson's codec": lambda: zoo.video("flv", "flv", **SMALL),
    "wmv": lambda: zoo.video("asf", "wmv2", **SMALL),
    "wmv of version 7": lambda: zoo.video("asf", "wmv1", **SMALL),
    "ogg": lambda: zoo.video("ogg", "libvpx", **SMALL),
    "dv": lambda: zoo.video("avi", "dvvideo", frames=1, size=(720, 576)),
    "raw H.264": lambda: zoo.video("h264", **SMALL),
    "raw MPEG-2": lambda: zoo.video("mpeg2video", "mpeg2video", **SMALL),
    "gif": lambda: picture("gif"),
    "apng": lambda: picture("png"),
    "webp": lambda: picture("webp"),
    "lossy webp": lambda: picture("webp", lossless=False),
    "still webp": lambda: picture("webp", frames=1),
    "jpeg": lambda: picture("jpeg", frames=1),
}


def picture(form: str, frames: int = 6, lossless: bool = True) -> bytes:
    """Return an image, or an animation of several frames."""
    images = [Image.fromarray(zoo.draw(number)) for number in range(frames)]
    several = {"save_all": True, "append_images": images[1:], "duration": 90} if frames > 1 else {}
    file = io.BytesIO()
    images[0].save(file, form, **several, **({"lossless": lossless} if form == "webp" else {}))
    return file.getvalue()


def make_video(folder: Path, name: str) -> None:
    (folder / "video").write_bytes(VIDEOS[name]())


def read_video(folder: Path) -> None:
    """Decode and probe a video, and a part of it, as a manifest in its folder names it."""
    data = DATA.model_copy(update={"roots": [str(folder)]})
    for uri in (f"{folder}/video", f"{folder}/video#t=0.2,0.5"):
        require_good(decode_video(uri, data, 32))
    require_printable(probe_video(f"{folder}/video", data))


def make_frame_list(folder: Path) -> None:
    names = [f"{number}.jpg" for number in range(4)]
    for number, name in enumerate(names):
        Image.fromarray(zoo.draw(number)).save(folder / name)
    (folder / "list.json").write_text(json.dumps({"frames": names, "times": [0, 0.5, 1, 7]}))


def read_frame_list(folder: Path) -> None:
    """Decode a list whose frames lie in the folder, as a row that was checked names it."""
    data = DATA.model_copy(update={"roots": [str(folder)]})
    text = (folder / "list.json").read_text(errors="replace") if (folder / "list.json").is_file() else ""
    require_good(decode_video(text if text.startswith('{"frames"') else '{"frames"' + text[9:], data, 32))
    address = str(FrameList(tuple(f"{folder}/{number}.jpg" for number in range(4)), fps=2))
    require_good(decode_video(address, data, 32))
    require_printable(probe_video(address, data))


def require_good(result: object) -> None:
    """Fail unless the result has good frames, or a reason that a terminal can show."""
    if isinstance(result, SampledFrames):
        assert 1 <= len(result) <= DATA.num_frames
        assert result.images.shape[1:] == (32, 32, 3)
        assert (result.times[1:] > result.times[:-1]).all()
        assert result.times[0] >= 0
        assert result.shortfall is None or result.shortfall.isprintable()
    else:
        require_printable(result)


def require_printable(result: object) -> None:
    reason = getattr(result, "reason", "")
    assert reason.isascii(), reason
    assert reason.isprintable(), reason
