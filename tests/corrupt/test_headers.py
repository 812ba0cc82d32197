"""Headers of damaged and unusual files agree with the frames, or give a printable reason."""

import contextlib
import io
import struct

import av
import pytest

from crosslmm.config import DataConfig
from crosslmm.data.video.container import UnreadableVideo
from crosslmm.data.video.decode import VideoFailure, probe_video
from crosslmm.data.video.decode_pool import HeaderReader
from crosslmm.data.video.probe import Probe, probe
from tests.corrupt import test_zoo
from tests.support import zoo

pytestmark = pytest.mark.corrupt

DATA = DataConfig()
KINDS = test_zoo.RIGHT | test_zoo.SALVAGED | test_zoo.BAD


@pytest.mark.parametrize(
    ("form", "container", "codec", "expected"),
    [
        ("mp4", "mov", "libx264", Probe(4, 40, 128, 64, "h264", 0, 4)),
        ("mp4", "mov", "mpeg4", Probe(4, 40, 128, 64, "mpeg4", 0, 4)),
        ("matroska", "matroska", "libx264", Probe(4, None, 128, 64, "h264", 0, 4)),
        ("webm", "matroska", "libvpx-vp9", Probe(4, None, 128, 64, "vp9", 0, 4)),
        ("avi", "avi", "mpeg4", Probe(4, 40, 128, 64, "mpeg4", 0, 4)),
        ("mpegts", "mpegts", "libx264", Probe(4, None, 128, 64, "h264", 0, None)),
    ],
)
def test_header_matches_encoded_video(form, container, codec, expected):
    assert probe(io.BytesIO(zoo.video(form, codec)), container, DATA) == expected


@pytest.mark.parametrize("clockwise", test_zoo.ROTATIONS)
def test_rotation_is_read_from_header(clockwise):
    file = io.BytesIO(zoo.with_rotation(zoo.video(), test_zoo.ROTATIONS[clockwise]))
    # Decoding rotates frames by np.rot90(image, rotation // 90).
    assert probe(file, "mov", DATA).rotation // 90 % 4 == (-clockwise) % 4


def test_boxes_with_wrong_sizes_end_the_search():
    data = zoo.video()
    moov = data.index(b"moov") - 4
    for size in (0, 1, 4, 9, 2**32 - 1):
        broken = bytearray(data)
        struct.pack_into(">I", broken, moov, size)
        with contextlib.suppress(av.FFmpegError, UnreadableVideo):
            assert abs(probe(io.BytesIO(broken), "mov", DATA).rotation) <= 180


def test_all_bad_files_are_probed_in_children(tmp_path):
    """An undecodable file may have a good header; a decodable file has one."""
    for i, (content, *_) in enumerate(KINDS.values()):
        (tmp_path / f"{i}.mp4").write_bytes(content)
    with HeaderReader(DATA) as header_reader:
        results = dict(zip(KINDS, header_reader([f"{tmp_path}/{i}.mp4" for i in range(len(KINDS))]), strict=True))
    for kind, result in results.items():
        if isinstance(result, VideoFailure):
            test_zoo.require_printable(result)
            assert kind in test_zoo.BAD, result
            assert result.stage in ("check", "decode")
        else:
            assert result.bytes == len(KINDS[kind][0])
            assert result.seconds > 0
            assert result.codec.isidentifier()
    assert results["edit list that ends early"].seconds == pytest.approx(2)
    for kind in ("empty", "zeros", "text", "audio only", "mp4 cut before its index", "10,000 x 10,000 pixels"):
        assert isinstance(results[kind], VideoFailure)


def test_probing_reports_the_same_reasons_as_decoding(tmp_path):
    assert probe_video(str(tmp_path / "none.mp4"), DATA) == VideoFailure("no such file", "read")
    (tmp_path / "clip.mp4").write_bytes(zoo.video())
    failure = probe_video(str(tmp_path / "clip.mp4"), DataConfig(max_video_s=3.5))
    assert (failure.stage, failure.reason) == ("check", "it lasts 4 s, and data.max_video_s is 3.5")
