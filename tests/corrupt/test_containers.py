"""Every container, and every line of the docs, gives the frames and times that ffmpeg gives when it decodes the whole
file."""

import functools
import json
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from crosslmm.data.rows.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from crosslmm.data.video.decode import decode_video, probe_video
from crosslmm.data.video.frame_list import FrameList
from tests.support import zoo
from tests.support.common import ROOT
from tests.support.ffmpeg import (
    COUNT,
    DATA,
    FAST,
    FRAGMENTS,
    H264,
    MPEG2,
    MPEG4,
    SIDE,
    SLOW,
    THEORA,
    VP8,
    expected,
    make,
    needs_ffmpeg,
    require_right,
)

pytestmark = [pytest.mark.corrupt, needs_ffmpeg]


# Name of the file, options of ffmpeg, frames, duration of the audio [s].
CONTAINERS = {
    "mp4": ("a.mp4", H264, SLOW, 4),
    "mp4 in fragments": ("a.mp4", (*H264, *FRAGMENTS), SLOW, 4),
    "mov": ("a.mov", H264, SLOW, 4),
    "mkv": ("a.mkv", H264, SLOW, 4),
    "webm": ("a.webm", VP8, SLOW, 4),
    "avi": ("a.avi", MPEG4, SLOW, 0),
    "transport stream": ("a.ts", H264, SLOW, 4),
    "camcorder's transport stream": ("a.m2ts", H264, SLOW, 4),
    "transport stream of MPEG-2": ("a.ts", MPEG2, FAST, 4),
    "mpg": ("a.mpg", MPEG2, FAST, 4),
    "mpg of MPEG-1": ("a.mpg", ("-c:v", "mpeg1video", "-g", "10", "-bf", "2"), FAST, 0),
    "vob": ("a.vob", MPEG2, FAST, 4),
    "flv": ("a.flv", H264, SLOW, 4),
    "flv of Sorenson's codec": ("a.flv", ("-c:v", "flv", "-g", "10", "-c:a", "aac"), SLOW, 4),
    "flv with an index": ("a.flv", (*H264, "-flvflags", "add_keyframe_index"), SLOW, 4),
    "wmv": ("a.wmv", ("-c:v", "wmv2", "-g", "10", "-c:a", "wmav2"), SLOW, 4),
    "wmv of version 7": ("a.wmv", ("-c:v", "wmv1", "-g", "10", "-c:a", "wmav2"), SLOW, 4),
    "ogv": ("a.ogv", THEORA, SLOW, 4),
    "mxf": ("a.mxf", MPEG2[:-2], FAST, 0),
    "dv in avi": ("a.avi", ("-c:v", "dvvideo", "-s", "720x576", "-pix_fmt", "yuv420p"), {"fps": 25, "frames": 20}, 0),
    "3gp": ("a.3gp", ("-c:v", "h263", "-s", "128x96", "-g", "10"), SLOW, 0),
    "raw H.264": ("a.h264", (*H264, "-f", "h264"), SLOW, 0),
    "raw MPEG-2": ("a.m2v", (*MPEG2[:-2], "-f", "mpeg2video"), FAST, 0),
    "gif": ("a.gif", (), SLOW, 0),
    "animated png": ("a.apng", ("-plays", "0"), SLOW, 0),
}  # fmt: skip


@functools.cache
def built(kind: str, folder: str) -> Path:
    name, options, frames, audio_s = CONTAINERS[kind]
    path = Path(folder) / kind.replace(" ", "-") / name
    path.parent.mkdir()
    return make(path, *options, audio_s=audio_s, **frames)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("containers"))


@pytest.mark.parametrize("kind", CONTAINERS)
def test_container_gives_the_frames_that_ffmpeg_gives(folder, kind):
    path = built(kind, folder)
    assert len(require_right(path)) == COUNT


@pytest.mark.parametrize("kind", CONTAINERS)
def test_part_of_a_container_gives_these_frames_too(folder, kind):
    require_right(built(kind, folder), 0.3, 0.75)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_header_of_a_container_is_read(folder, kind):
    path = built(kind, folder)
    header = probe_video(str(path), DATA)
    *_, duration = expected(path)
    assert header.seconds == pytest.approx(duration, abs=2e-3)
    assert header.frames in (None, CONTAINERS[kind][2]["frames"])
    assert (header.width, header.height) in ((128, 64), (128, 96), (720, 576))


LINES = re.findall(r"^\| .*`(ffmpeg [^`]+)` \|$", (ROOT / "docs/data.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("line", LINES, ids=[line.rpartition(" ")[2] for line in LINES])
def test_each_line_of_the_docs_makes_a_file_that_is_read(tmp_path, line):
    make(tmp_path / "clip.mp4", *H264, audio_s=5, size=(352, 288), **SLOW)
    command, *arguments = line.split()
    subprocess.run([command, "-nostdin", "-v", "error", *arguments], cwd=tmp_path, check=True)
    path = tmp_path / arguments[-1]
    if path.stem == "still":
        result = decode_video(str(path), DATA, SIDE)
        assert [zoo.read_number(image) for image in result.images] == [0]
    elif path.suffix == ".webp":  # which ffmpeg writes, and does not read
        result = decode_video(str(path), DATA, SIDE)
        assert [zoo.read_number(image) for image in result.images] == [2, 7, 12, 17, 22, 27, 32, 37]
    else:
        result = require_right(path)
    assert result.shortfall is None


def test_the_docs_have_a_line_for_every_suffix():
    made = {Path(line.rpartition(" ")[2]).suffix for line in LINES}
    table = (ROOT / "docs/data.md").read_text().partition("## Videos and images")[2].partition("\n- ")[0]
    for suffix in VIDEO_SUFFIXES + IMAGE_SUFFIXES:
        assert f"`{suffix[1:]}`" in table, suffix
    assert len(made) >= 18


@pytest.mark.parametrize("row", re.findall(r'^\{"id": "list.*$', (ROOT / "docs/data.md").read_text(), re.MULTILINE))
def test_each_list_of_frames_in_the_docs_is_read(tmp_path, row):
    (tmp_path / "f").mkdir()
    for number in (1, 2, 3):
        Image.fromarray(zoo.draw(number)).save(tmp_path / f"f/{number:04d}.jpg")
    fields = json.loads(row)
    part = fields if "video" in fields else fields["messages"][0]["content"][0]
    names = tuple(f"{tmp_path}/{name}" for name in part["video"])
    times = tuple(part["times"]) if "times" in part else None
    result = decode_video(str(FrameList(names, part.get("fps"), times)), DATA, SIDE)
    assert len(result) == len(names)
