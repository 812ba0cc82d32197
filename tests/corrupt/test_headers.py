"""What headers say of bad and odd files: what the frames bear out, or a harmless reason."""

import contextlib
import io
import struct

import av
import pytest

from crosslmm.config import DataConfig
from crosslmm.data.video.decode import VideoFailure, probe_video
from crosslmm.data.video.decode_pool import HeaderReader
from crosslmm.data.video.probe import Probe, probe
from crosslmm.data.video.pyav import UnreadableVideo
from tests.corrupt import test_zoo
from tests.support import zoo

pytestmark = pytest.mark.corrupt

DATA = DataConfig()
KINDS = test_zoo.RIGHT | test_zoo.SALVAGED | test_zoo.BAD


@pytest.mark.parametrize(
    ("form", "container", "codec", "says"),
    [
        ("mp4", "mov", "libx264", Probe(4, 40, 128, 64, "h264", 0, 4)),
        ("mp4", "mov", "mpeg4", Probe(4, 40, 128, 64, "mpeg4", 0, 4)),
        ("matroska", "matroska", "libx264", Probe(4, None, 128, 64, "h264", 0, 4)),
        ("webm", "matroska", "libvpx-vp9", Probe(4, None, 128, 64, "vp9", 0, 4)),
        ("avi", "avi", "mpeg4", Probe(4, 40, 128, 64, "mpeg4", 0, 4)),
        ("mpegts", "mpegts", "libx264", Probe(4, None, 128, 64, "h264", 0, None)),
    ],
)
def test_a_header_says_what_was_encoded(form, container, codec, says):
    assert probe(io.BytesIO(zoo.video(form, codec)), container, DATA) == says


@pytest.mark.parametrize("clockwise", test_zoo.QUARTERS)
def test_a_turn_is_read_from_the_header(clockwise):
    file = io.BytesIO(zoo.turned(zoo.video(), test_zoo.QUARTERS[clockwise]))
    # Frames are turned by np.rot90(image, rotation // 90).
    assert probe(file, "mov", DATA).rotation // 90 % 4 == (-clockwise) % 4


def test_boxes_that_lie_about_their_size_end_the_search():
    data = zoo.video()
    moov = data.index(b"moov") - 4
    for size in (0, 1, 4, 9, 2**32 - 1):
        broken = bytearray(data)
        struct.pack_into(">I", broken, moov, size)
        with contextlib.suppress(av.FFmpegError, UnreadableVideo):
            assert abs(probe(io.BytesIO(broken), "mov", DATA).rotation) <= 180


def test_the_whole_zoo_is_probed_in_children(tmp_path):
    """What cannot be decoded may have a good header; what can be decoded has one."""
    for i, (content, *_) in enumerate(KINDS.values()):
        (tmp_path / f"{i}.mp4").write_bytes(content)
    with HeaderReader(DATA) as prober:
        found = dict(zip(KINDS, prober([f"{tmp_path}/{i}.mp4" for i in range(len(KINDS))]), strict=True))
    for kind, one in found.items():
        if isinstance(one, VideoFailure):
            test_zoo.harmless(one)
            assert kind in test_zoo.BAD, one
            assert one.stage in ("check", "decode")
        else:
            assert one.bytes == len(KINDS[kind][0])
            assert one.seconds > 0
            assert one.codec.isidentifier()
    assert found["edit list that ends early"].seconds == pytest.approx(2)
    for kind in ("empty", "zeros", "text", "sound alone", "mp4 cut before its index", "10,000 x 10,000 pixels"):
        assert isinstance(found[kind], VideoFailure)


def test_a_missing_file_and_a_limit_are_named_as_in_decoding(tmp_path):
    assert probe_video(str(tmp_path / "none.mp4"), DATA) == VideoFailure("no such file", "read")
    (tmp_path / "clip.mp4").write_bytes(zoo.video())
    found = probe_video(str(tmp_path / "clip.mp4"), DataConfig(max_video_s=3.5))
    assert (found.stage, found.reason) == ("check", "it lasts 4 s, and data.max_video_s is 3.5")
