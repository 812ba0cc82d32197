"""Limits come before the cost: files that would take much memory or time are refused while they have taken little."""

import functools
import io
import re
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from crosslmm.config import DataConfig
from crosslmm.data.frame_sampling import SampledFrames
from crosslmm.data.video.decode import VideoFailure, decode_video, probe_video
from crosslmm.data.video.decode_pool import HEADER_CHILDREN, Decoder, HeaderReader, VideoPool
from tests.support import misbehave, zoo

pytestmark = pytest.mark.corrupt

DATA = DataConfig(num_frames=4, decode_timeout_s=60, decode_memory_gib=4)
MAX_MIB, MAX_S = 120, 4.0
"""Bounds of what a refusal may cost: libav's buffers and a busy machine [MiB, s]."""
TOO_LARGE = r"its frames are \d+ x \d+, and data\.max_frame_pixels is 35651584"


def png(width, height, *more_chunks):
    """Return a black PNG of 1 byte per pixel, which compresses a thousandfold."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(width + 1)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            *(chunk(name, data) for name, data in more_chunks),
            chunk(b"IDAT", rows),
            chunk(b"IEND", b""),
        ]
    )


def jpeg(width, height):
    """Return a JPEG whose header states another size than its picture has."""
    encoder = av.codec.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 64, 64, "yuvj420p", Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(zoo.draw(0, 64, 64), format="rgb24").reformat(format="yuvj420p")
    data = b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def lying_avi(frame):
    """Return an .avi that claims frames of 64 x 64 and has this one."""
    data = zoo.video("avi", "mjpeg", frames=1, size=(64, 64))
    start = data.index(b"\xff\xd8\xff")
    size = struct.unpack_from("<I", data, start - 4)[0]
    chunk = frame + b"\0" * (len(frame) % 2)
    grown = bytearray(data[: start - 4] + struct.pack("<I", len(frame)) + chunk + data[start + size + size % 2 :])
    movi = data.rindex(b"movi", 0, start) - 4
    struct.pack_into("<I", grown, movi, struct.unpack_from("<I", data, movi)[0] + len(chunk) - size - size % 2)
    return bytes(grown)


def cropped(width, height, form="mpegts"):
    """Return an H.264 stream whose frames are coded in this size and cropped to 64 x 64."""
    crop = f"h264_metadata=crop_right={width - 64}:crop_bottom={height - 64}"
    fast = {"preset": "ultrafast", "tune": "zerolatency", "bf": "0"}
    source = zoo.video("mp4", frames=2, size=(width, height), picture=black, **fast)
    with av.open(io.BytesIO(source)) as container, io.BytesIO() as file:
        stream = container.streams.video[0]
        with av.open(file, "w", format=form) as output:
            copy = output.add_stream_from_template(stream)
            to_annex_b = av.bitstream.BitStreamFilterContext("h264_mp4toannexb", stream, copy)
            filters = av.bitstream.BitStreamFilterContext(crop, copy, copy)
            for packet in container.demux(stream):
                for one in to_annex_b.filter(packet):
                    for other in filters.filter(one):
                        other.stream = copy
                        output.mux(other)
        return file.getvalue()


def black(number, width, height):
    return np.zeros((height, width, 3), np.uint8)


def webp(name, content):
    """Return a WebP of one chunk, whose picture is missing."""
    chunk = name + struct.pack("<I", len(content) + 500) + content + bytes(500)
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def gif(side, frames):
    """Return a GIF of this size, each of whose frames changes one pixel."""
    change = b"!\xf9\4\0\4\0\0\0" + struct.pack("<cHHHHBB", b",", 0, 0, 1, 1, 0, 2) + b"\2\x44\1\0"
    return b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + bytes(6) + change * frames + b";"


def animated_png(side, frames):
    """Return an animated PNG of this size, each of whose frames but the first changes one pixel."""
    pixel = zlib.compress(bytes(2))
    changes = []
    for number in range(frames - 1):
        changes.append((b"fcTL", struct.pack(">5I2H2B", 2 * number + 1, 1, 1, 0, 0, 1, 25, 0, 0)))
        changes.append((b"fdAT", struct.pack(">I", 2 * number + 2) + pixel))
    start = (
        (b"acTL", struct.pack(">II", frames, 0)),
        (b"fcTL", struct.pack(">5I2H2B", 0, side, side, 0, 0, 1, 25, 0, 0)),
    )
    whole = png(side, side, *start)
    end = png(1, 1, *changes)[8 + 25 :]  # after IHDR
    at = whole.index(b"IEND") - 4
    return whole[:at] + end[: end.index(b"IDAT") - 4] + whole[at:]


def animated_webp(side, frames):
    """Return a WebP of this size, each of whose frames changes one pixel."""
    file = io.BytesIO()
    images = [Image.new("RGB", (1, 1), (number, 0, 0)) for number in (0, 9)]
    images[0].save(file, "webp", save_all=True, append_images=images[1:], duration=40, lossless=True)
    data = bytearray(file.getvalue())
    at = data.index(b"VP8X") + 12
    data[at : at + 6] = (side - 1).to_bytes(3, "little") * 2
    last = data.rindex(b"ANMF")
    data += data[last:] * frames
    struct.pack_into("<I", data, 4, len(data) - 8)
    return bytes(data)


def lying_wmv(width, height):
    """Return a .wmv whose header claims frames of this size."""
    data = zoo.video("asf", "wmv2", frames=3)
    return data.replace(struct.pack("<II", 128, 64), struct.pack("<II", width, height))


def unpacks_to(mib):
    """Return zlib data that unpacks to this much."""
    packer = zlib.compressobj(1)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(mib)) + packer.flush()


def box(name, *contents):
    content = b"".join(contents)
    return struct.pack(">I4s", 8 + len(content), name) + content


def compressed_header(mib, *containers):
    """Return an .mp4 whose index, in these boxes, is compressed."""
    packed = box(b"cmvd", struct.pack(">I", mib * 2**20), unpacks_to(mib))
    index = box(b"cmov", box(b"dcom", b"zlib"), packed)
    for container in reversed(containers):
        index = box(container, index)
    return box(b"ftyp", b"qt  \0\0\0\0qt  ") + index


def growing_stream(width, height):
    """Return a transport stream whose frames become too large halfway."""
    fast = {"preset": "ultrafast", "tune": "zerolatency", "bf": "0"}
    large = zoo.video("mpegts", frames=2, times=[2, 2.1], size=(width, height), picture=black, **fast)
    return zoo.video("mpegts", frames=20) + large


COMPRESSED = r"its header is compressed \(cmov\)"
REFUSED = {
    "png": (lambda: png(17000, 17000), TOO_LARGE),
    "jpeg": (lambda: jpeg(20000, 20000), TOO_LARGE),
    "png called mp4": (lambda: png(9000, 9000), TOO_LARGE),
    "png that is one row": (lambda: png(36_000_000, 1), TOO_LARGE),
    "png that is one column": (lambda: png(1, 1_000_000), "Invalid argument"),
    "png of no pixels": (lambda: png(0, 9), "no frames that can be decoded"),
    "jpeg whose container claims less": (lambda: lying_avi(jpeg(20000, 20000)), "."),
    "large frames whose container claims less": (
        lambda: lying_avi(zoo.video("avi", "mjpeg", frames=1, size=(6144, 6144))), r"pixels of data\.max_frame_pixels"
    ),
    "mp4 whose header is compressed": (lambda: compressed_header(400, b"moov"), COMPRESSED),
    "mp4 that is compressed at its top": (lambda: compressed_header(400), COMPRESSED),
    "mp4 whose track is compressed": (lambda: compressed_header(400, b"moov", b"trak", b"mdia"), COMPRESSED),
    "gif": (lambda: b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(900), TOO_LARGE),
    "webp": (lambda: webp(b"VP8X", bytes(4) + b"\xff\xff\xff" * 2), TOO_LARGE),
    "webp of VP8": (lambda: webp(b"VP8 ", b"\0\0\0\x9d\x01\x2a\xff\x3f\xff\x3f"), TOO_LARGE),
    "webp of VP8L": (lambda: webp(b"VP8L", b"\x2f\xff\xff\xff\x0f"), TOO_LARGE),
    "gif of many frames": (lambda: gif(5000, 5000), "5000 frames of 5000 x 5000 are more than"),
    "animated png of many frames": (lambda: animated_png(5000, 400), "400 frames of 5000 x 5000 are more than"),
    "animated webp of many frames": (lambda: animated_webp(5000, 5000), r"\d+ frames of 5000 x 5000 are more than"),
    "animated png": (lambda: png(9000, 9000, (b"acTL", struct.pack(">II", 2, 0))), TOO_LARGE),
    "wmv": (lambda: lying_wmv(20000, 20000), r"more than the 35651584 pixels of data\.max_frame_pixels"),
    "svg": (lambda: b'<svg width="99999" height="99999"><image href="http://127.0.0.1:9/a.png"/></svg>', "not an mp4"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_large_file_is_refused_before_it_costs_much(measured, kind):
    make, reason = REFUSED[kind]
    result, mib, seconds = measured(make())
    assert isinstance(result, VideoFailure), result
    assert re.search(reason, result.reason), result
    assert mib < MAX_MIB
    assert seconds < MAX_S


@pytest.mark.parametrize("form", ["mpegts", "mpeg", "matroska", "h264"])
def test_frames_that_are_large_before_cropping_are_refused_at_the_first(measured, form):
    """libav has decoded two when it tells their size: 54 MiB each, and as much of its own."""
    result, mib, seconds = measured(cropped(6144, 6144, form))
    assert isinstance(result, VideoFailure), result
    assert result.reason == "its frames are 6144 x 6144, and data.max_frame_pixels is 35651584"
    assert mib < 2 * MAX_MIB
    assert seconds < 2 * MAX_S


def test_frames_that_become_too_large_are_not_decoded(measured):
    result, mib, seconds = measured(growing_stream(6144, 6144))
    assert [zoo.read_number(frame) is not None for frame in result.images] == [True] * len(result)
    assert mib < MAX_MIB
    assert seconds < MAX_S


KEPT = {
    "png with a comment that unpacks to 400 MiB": lambda: png(64, 64, (b"zTXt", b"Comment\0\0" + unpacks_to(400))),
    "png with a profile that unpacks to 400 MiB": lambda: png(64, 64, (b"iCCP", b"p\0\0" + unpacks_to(400))),
    "png with a second one after it": lambda: png(64, 64) + png(17000, 1000),
    "png that announces more frames than it has": lambda: png(
        64, 64, (b"acTL", struct.pack(">II", 10**6, 0)), (b"fcTL", struct.pack(">5I2H2B", 0, 64, 64, 0, 0, 1, 9, 0, 0))
    ),
    "animated png with a comment that unpacks to 400 MiB": lambda: png(
        64, 64, (b"acTL", struct.pack(">II", 1, 0)), (b"zTXt", b"Comment\0\0" + unpacks_to(400)),
        (b"fcTL", struct.pack(">5I2H2B", 0, 64, 64, 0, 0, 1, 9, 0, 0)),
    ),
    "gif of one frame": lambda: gif(64, 1),
    "jpeg with another one after it": lambda: jpeg(64, 64) + jpeg(20000, 20000),
    "jpeg with a thousand after it": lambda: jpeg(64, 64) * 1000,
    "png of one row": lambda: png(1_000_000, 1),
}  # fmt: skip


@pytest.mark.parametrize("kind", KEPT)
def test_image_is_its_first_frame_at_little_cost(measured, kind):
    result, mib, seconds = measured(KEPT[kind]())
    assert isinstance(result, SampledFrames), result
    assert result.images.shape == (1, 64, 64, 3)
    assert result.shortfall is None
    assert mib < MAX_MIB
    assert seconds < MAX_S


@pytest.mark.parametrize(
    "kind",
    [
        "png",
        "jpeg",
        "png that is one row",
        "png of no pixels",
        "mp4 whose header is compressed",
        "gif",
        "webp",
        "gif of many frames",
        "animated png of many frames",
        "animated webp of many frames",
        "wmv",
    ],
)
def test_probing_refuses_the_same(tmp_path, kind):
    make, reason = REFUSED[kind]
    (tmp_path / "file").write_bytes(make())
    failure = probe_video(str(tmp_path / "file"), DATA)
    assert isinstance(failure, VideoFailure), failure
    assert re.search(reason, failure.reason), failure


@pytest.mark.parametrize(("width", "height"), [(64, 48), (1, 9), (3000, 2)])
def test_size_of_an_image_is_read_from_its_header(tmp_path, width, height):
    for make in (png, jpeg):
        (tmp_path / "image").write_bytes(make(width, height))
        header = probe_video(str(tmp_path / "image"), DATA)
        assert (header.width, header.height, header.frames, header.seconds) == (width, height, 1, 0)


@pytest.fixture(scope="module")
def measuring():
    with VideoPool(DATA, functools.partial(misbehave.decode_measured, data=DATA)) as pool:
        yield pool


@pytest.fixture
def measured(measuring, tmp_path):
    def measured(content):
        """Decode a file in a child: the result, how far memory grew [MiB], the time [s]."""
        (tmp_path / "clip.mp4").write_bytes(content)
        (result,) = measuring([str(tmp_path / "clip.mp4")])
        return result if isinstance(result, tuple) else (result, 0, 0)

    return measured


def test_animations_that_are_too_long_are_refused(tmp_path):
    data = DATA.model_copy(update={"max_video_s": 0.5})
    for name, content in {"gif": gif(64, 20), "webp": animated_webp(64, 20), "png": animated_png(64, 20)}.items():
        (tmp_path / name).write_bytes(content)
        for failure in (probe_video(f"{tmp_path}/{name}", data), decode_video(f"{tmp_path}/{name}", data, 64)):
            assert re.match(r"it lasts \d+ s, and data.max_video_s is 0.5", failure.reason), (name, failure)


def test_children_that_probe_share_the_memory_of_one(tmp_path):
    with HeaderReader(DATA) as reader, Decoder(DATA, 64) as decoder:
        assert reader.data.decode_memory_gib * HEADER_CHILDREN == decoder.data.decode_memory_gib
