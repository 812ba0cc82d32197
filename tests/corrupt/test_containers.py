"""Every container gives the frames and times that ffmpeg gives when it decodes the whole file, headers or not."""

import functools
import io
import json
import re
import struct
import subprocess
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from crosslmm.config import DataConfig
from crosslmm.data.formats import VIDEO_SUFFIXES
from crosslmm.data.frame_sampling import SampledFrames
from crosslmm.data.video import pyav
from crosslmm.data.video.decode import VideoFailure, decode_video, probe_video
from crosslmm.data.video.frame_list import FrameList
from tests.support import ffmpeg, zoo
from tests.support.common import ROOT
from tests.support.ffmpeg import make, needs_ffmpeg, run

pytestmark = [pytest.mark.corrupt, needs_ffmpeg]

COUNT, SIDE = 8, ffmpeg.SIDE
DATA = DataConfig(num_frames=COUNT)
H264 = ("-c:v", "libx264", "-g", "10", "-bf", "2", "-pix_fmt", "yuv420p", "-threads", "1", "-c:a", "aac")
MPEG2 = ("-c:v", "mpeg2video", "-g", "10", "-bf", "2", "-c:a", "mp2")
MPEG4 = ("-c:v", "mpeg4", "-g", "10", "-c:a", "mp3")
VP8 = ("-c:v", "libvpx", "-g", "10", "-c:a", "libvorbis")
THEORA = ("-c:v", "libtheora", "-q:v", "8", "-g", "10", "-c:a", "libvorbis")
FRAGMENTS = ("-movflags", "frag_keyframe+empty_moov+skip_trailer")
SLOW = {"fps": 10, "frames": 40}
FAST = {"fps": 25, "frames": 100}

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


def expected(path: Path, start: float = 0.0, end: float = np.inf, duration: float = 0.0):
    """Return the times and pictures that are right by ffmpeg's decoding of everything; without a `duration` [s], the
    last frame is on screen for as long as most are."""
    times, numbers, images = ffmpeg.decode_all(path)
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


def last_times(name: str, times: np.ndarray) -> list[str]:
    """Return ffmpeg's filter that shows the frames at these times [s]."""
    expression = "+".join(f"{time}*eq(N\\,{i})" for i, time in enumerate(times))
    return ["-vf", f"setpts=({expression})/TB", "-fps_mode", "passthrough", *H264, name]


AUDIO_OUTLASTS = {
    **{f"mkv with audio of {s} s": ("a.mkv", H264, s) for s in (4.3, 5, 6, 7)},
    "webm": ("a.webm", VP8, 7),
    "mkv with open groups": ("a.mkv", (*H264, "-x264-params", "open-gop=1"), 7),
    "mkv with one keyframe": ("a.mkv", (*H264, "-g", "250"), 7),
    "mkv of a browser": ("a.mkv", (*H264, "-live", "1"), 7),
    "mp4": ("a.mp4", H264, 7),
    "mp4 in fragments": ("a.mp4", (*H264, *FRAGMENTS), 7),
    "mp4 with a segment index": ("a.mp4", (*H264, "-movflags", "dash+global_sidx"), 7),
    "mov": ("a.mov", H264, 7),
    "avi": ("a.avi", MPEG4, 7),
    "transport stream": ("a.ts", H264, 7),
    "flv": ("a.flv", H264, 7),
    "flv without a duration": ("a.flv", (*H264, "-flvflags", "no_duration_filesize"), 7),
    "wmv": ("a.wmv", ("-c:v", "wmv2", "-g", "10", "-c:a", "wmav2"), 7),
    "ogv": ("a.ogv", THEORA, 7),
    "mpg": ("a.mpg", MPEG2, 7),
}


@pytest.mark.parametrize("kind", AUDIO_OUTLASTS)
def test_audio_that_outlasts_the_video_changes_nothing(tmp_path, kind):
    name, options, audio_s = AUDIO_OUTLASTS[kind]
    size = FAST if options is MPEG2 else SLOW
    require_right(make(tmp_path / name, *options, audio_s=audio_s, **size))


def copied(source: Path, name: str, *options: str, before: tuple[str, ...] = ()) -> Path:
    """Copy the streams of a video into another file."""
    target = source.with_name(name)
    run(*before, "-i", str(source), "-c", "copy", *options, str(target))
    return target


@pytest.mark.parametrize("form", ["mkv", "mp4", "ts", "flv"])
def test_video_that_begins_after_the_audio_is_read_whole(tmp_path, form):
    sound, video = make(tmp_path / "sound.mkv", *H264, audio_s=7, **SLOW), make(tmp_path / "video.mkv", *H264, **SLOW)
    path = tmp_path / f"late.{form}"
    run("-i", str(sound), "-itsoffset", "2", "-i", str(video), "-map", "1:v", "-map", "0:a", "-c", "copy", str(path))
    require_right(path)


@pytest.mark.parametrize(("form", "codec"), [("mkv", "srt"), ("mp4", "mov_text"), ("webm", "webvtt")])
def test_subtitles_that_outlast_the_video_change_nothing(tmp_path, form, codec):
    video = make(tmp_path / f"video.{form}", *(VP8 if form == "webm" else H264), **SLOW)
    (tmp_path / "s.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nhi\n\n2\n00:00:50,000 --> 00:01:00,000\nbye\n")
    path = tmp_path / f"both.{form}"
    run(
        "-i",
        str(video),
        "-i",
        str(tmp_path / "s.srt"),
        "-map",
        "0:v",
        "-map",
        "1",
        "-c:v",
        "copy",
        "-c:s",
        codec,
        str(path),
    )
    require_right(path)


def with_duration(path: Path, factor: float) -> Path:
    """Let the header of a Matroska file claim another duration."""
    data = bytearray(path.read_bytes())
    at = data.index(b"\x44\x89\x88") + 3
    struct.pack_into(">d", data, at, struct.unpack_from(">d", data, at)[0] * factor)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("factor", [0.3, 0.8, 1.2, 3, 1000])
@pytest.mark.parametrize("cues", ["with an index", "without an index"])
def test_a_wrong_duration_of_a_matroska_file_is_not_used(tmp_path, cues, factor):
    path = with_duration(make(tmp_path / "a.mkv", *H264, **SLOW), factor)
    if cues == "without an index":
        data = path.read_bytes()
        path.write_bytes(data[: data.rindex(b"\x1c\x53\xbb\x6b")])
    require_right(path)


@pytest.mark.parametrize("factor", [0.3, 0.8, 1.2, 3])
def test_a_wrong_duration_of_an_mp4_track_is_not_used(tmp_path, factor):
    path = make(tmp_path / "a.mp4", *H264, **SLOW)
    data = bytearray(path.read_bytes())
    for box, at in ((b"mdhd", 20), (b"mvhd", 20), (b"tkhd", 24)):
        start = data.index(box) + at
        struct.pack_into(">I", data, start, int(struct.unpack_from(">I", data, start)[0] * factor))
    path.write_bytes(data)
    require_right(path)


@pytest.mark.parametrize("factor", [0.3, 0.8, 1.2, 3])
def test_a_wrong_number_of_frames_of_an_avi_is_not_used(tmp_path, factor):
    path = make(tmp_path / "a.avi", *MPEG4, **SLOW)
    data = bytearray(path.read_bytes())
    for start in (data.index(b"avih") + 24, data.index(b"strh") + 40):
        struct.pack_into("<I", data, start, int(struct.unpack_from("<I", data, start)[0] * factor))
    path.write_bytes(data)
    require_right(path)
    assert probe_video(str(path), DATA).frames == 40


@pytest.mark.parametrize("factor", [0.3, 3])
def test_a_wrong_duration_of_an_flv_is_not_used(tmp_path, factor):
    path = make(tmp_path / "a.flv", *H264, **SLOW)
    data = bytearray(path.read_bytes())
    at = data.index(b"\x00\x08duration\x00") + 11
    struct.pack_into(">d", data, at, struct.unpack_from(">d", data, at)[0] * factor)
    path.write_bytes(data)
    require_right(path)


@pytest.mark.parametrize(("start", "forms"), [(1.35, "mkv mp4 ts mov"), (1.0, "mkv mp4 flv")])
def test_a_part_cut_without_encoding_is_read_as_it_plays(tmp_path, start, forms):
    whole = make(tmp_path / "a.mp4", *H264, **SLOW)
    for form in forms.split():
        require_right(copied(whole, f"cut.{form}", before=("-ss", str(start))))


def test_fragments_with_a_segment_index_cost_only_those_of_the_frames(tmp_path):
    path = make(tmp_path / "a.mp4", *H264, "-movflags", "dash+global_sidx", frames=600, audio_s=70)
    read = []

    class Counted(io.FileIO):
        def readinto(self, buffer):
            count = super().readinto(buffer)
            read.append(count)
            return count

    with Counted(path) as file:
        result = pyav.with_pyav(file, "mov", DATA, SIDE)
    assert [zoo.read_number(image) for image in result.images] == [37, 112, 187, 262, 337, 412, 487, 562]


@pytest.mark.parametrize(
    ("first_s", "second_s"), [(0, 0), (0, 1000), (1000, 0), (0, 20), (95440, 0)], ids=str
)  # a 33 bit clock wraps after 95443.7 s
@pytest.mark.parametrize("form", ["ts", "m2ts", "mpg"])
def test_two_recordings_in_one_stream_follow_each_other(tmp_path, form, first_s, second_s):
    options, size = (MPEG2, FAST) if form == "mpg" else (H264, SLOW)
    parts = [
        make(tmp_path / f"{i}.{form}", *options, "-output_ts_offset", str(offset), **size).read_bytes()
        for i, offset in enumerate((first_s, second_s))
    ]
    path = tmp_path / f"both.{form}"
    path.write_bytes(parts[0] + parts[1])
    result = require_right(path)
    middle = size["frames"] // 2
    assert len(result) == COUNT
    assert result.times[-1] > 7
    assert [zoo.read_number(image) // middle for image in result.images] == [0, 0, 1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize("form", ["mkv", "mp4", "mov"])
def test_a_gap_in_time_is_named_with_its_place(tmp_path, form):
    times = np.append(np.arange(20) / 10, 1002 + np.arange(20) / 10)
    source = make(tmp_path / "a.mp4", *H264, **SLOW)
    path = tmp_path / f"gap.{form}"
    run("-i", str(source), *last_times(str(path), times))
    result = require_right(path)
    assert result.shortfall == ("1 of 8 frames: one picture stays from 1.9 s to 1002.0 s, at 8 of the moments")


def test_a_short_gap_in_a_transport_stream_is_named(tmp_path):
    """Of the first recording, the last frame counts as damaged: libav misses the packets that would follow it."""
    first, second = (make(tmp_path / f"{i}.ts", *H264, "-output_ts_offset", f"{7 * i}", **SLOW) for i in (0, 1))
    (tmp_path / "both.ts").write_bytes(first.read_bytes() + second.read_bytes())
    result = decode_video(f"{tmp_path}/both.ts", DATA, SIDE)
    assert [zoo.read_number(image) for image in result.images] == [6, 20, 33, 38, 6, 19, 33]
    assert re.fullmatch(r"7 of 8 frames: one picture stays from 3\.8 s to .*, at 2 of the moments", result.shortfall)


@pytest.mark.parametrize("form", ["mkv", "mp4", "ts"])
def test_slides_with_a_keyframe_each_stay_on_screen(tmp_path, form):
    times = np.array([0, 0.1, 0.2, 3, 4, 7, 9.1])
    source = make(tmp_path / "a.mp4", *H264, frames=len(times))
    path = tmp_path / f"slides.{form}"
    arguments = last_times(str(path), times)
    run("-i", str(source), *arguments[:-1], "-g", "1", "-bf", "0", arguments[-1])
    result = decode_video(str(path), DATA, SIDE)
    assert [zoo.read_number(image) for image in result.images] == [2, 4, 5]
    assert result.times == pytest.approx([0.2, 4, 7], abs=2e-3)
    assert result.shortfall == "3 of 8 frames: one picture stays from 0.2 s to 3.0 s, at 3 of the moments"


def test_a_camcorder_recording_is_decoded_from_its_keyframes(tmp_path, monkeypatch):
    path = make(tmp_path / "long.m2ts", *H264, frames=600, audio_s=60)
    decoded = []
    intact = pyav._intact
    monkeypatch.setattr(pyav, "_intact", lambda *arguments: decoded.append(1) or intact(*arguments))
    require_right(path)
    assert len(decoded) < COUNT * 20


def test_a_program_stream_is_decoded_from_its_keyframes(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    with av.open(str(tmp_path / "long.mpg"), "w", format="vob") as container:
        stream = container.add_stream("mpeg2video", rate=25, options={"g": "10", "bf": "2", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 320, 160, "yuv420p", 4_000_000
        for number in range(500):
            picture = zoo.draw(number, 320, 160).astype(int) + rng.integers(-30, 30, (160, 320, 1))
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    decoded = []
    intact = pyav._intact
    monkeypatch.setattr(pyav, "_intact", lambda *arguments: decoded.append(1) or intact(*arguments))
    require_right(tmp_path / "long.mpg")
    assert len(decoded) < COUNT * 30


def test_a_stream_without_frames_gives_way_to_the_next(tmp_path):
    """Old WMV files announce a stream for each bit rate, and hold one of them."""
    video = make(tmp_path / "a.wmv", "-c:v", "wmv2", "-g", "10", **SLOW)
    path = tmp_path / "both.wmv"
    run("-t", "0", "-i", str(video), "-i", str(video), "-map", "0:v", "-map", "1:v", "-c", "copy", str(path))
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 2
        assert {packet.stream_index for packet in container.demux() if packet.size} == {1}
    result = decode_video(str(path), DATA, SIDE)
    assert [zoo.read_number(image) for image in result.images] == [2, 7, 12, 17, 22, 27, 32, 37]
    assert probe_video(str(path), DATA).seconds == pytest.approx(4)


def animated_webp(path: Path, milliseconds, lossless=True, **options) -> np.ndarray:
    """Write an animated WebP of numbered frames; return when each appears [s]."""
    images = [Image.fromarray(zoo.draw(number)) for number in range(len(milliseconds))]
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=list(milliseconds), lossless=lossless, **options
    )
    return np.append(0, np.cumsum(milliseconds)[:-1]) / 1000


@pytest.mark.parametrize("milliseconds", [[100] * 40, [50, 300, 20, 1000, 10] * 4], ids=["even", "uneven"])
@pytest.mark.parametrize("lossless", [True, False])
def test_animated_webp_gives_the_frames_on_screen(tmp_path, milliseconds, lossless):
    starts = animated_webp(tmp_path / "a.webp", milliseconds, lossless)
    duration = sum(milliseconds) / 1000
    for start, end in ((0.0, duration), (0.4, 1.6)):
        result = decode_video(f"{tmp_path}/a.webp#t={start},{end}", DATA, SIDE)
        moments = start + (np.arange(COUNT) + 0.5) * (end - start) / COUNT
        chosen = np.unique(np.searchsorted(starts, moments + 1e-6, side="right") - 1)
        assert [zoo.read_number(image) for image in result.images] == chosen.tolist()
        assert result.times == pytest.approx(starts[chosen])
        assert (result.shortfall is None) == (len(chosen) == COUNT)
    header = probe_video(f"{tmp_path}/a.webp", DATA)
    assert (header.frames, header.codec) == (len(milliseconds), "webp")
    assert header.seconds == pytest.approx(duration)


def test_animated_avif_gives_all_its_frames(tmp_path):
    """Its first frame stands in it a second time, as an image."""
    images = [Image.fromarray(zoo.draw(number)) for number in range(40)]
    images[0].save(tmp_path / "a.avif", save_all=True, append_images=images[1:], duration=100)
    result = decode_video(f"{tmp_path}/a.avif", DATA, SIDE)
    assert [zoo.read_number(image) for image in result.images] == [2, 7, 12, 17, 22, 27, 32, 37]
    assert result.times == pytest.approx([0.2, 0.7, 1.2, 1.7, 2.2, 2.7, 3.2, 3.7])
    assert probe_video(f"{tmp_path}/a.avif", DATA).seconds == pytest.approx(4)


def test_image_in_tiles_is_refused_by_name(tmp_path):
    """libav would show one tile of a phone's photo."""
    Image.fromarray(zoo.draw(1)).save(tmp_path / "a.avif")
    data = (tmp_path / "a.avif").read_bytes()
    (tmp_path / "a.heic").write_bytes(data.replace(b"ftypavif", b"ftypheic").replace(b"av01", b"grid", 1))
    failure = decode_video(f"{tmp_path}/a.heic", DATA, SIDE)
    assert failure == probe_video(f"{tmp_path}/a.heic", DATA)
    assert failure.reason == "its picture is stored in tiles, as in photos of an iPhone; convert it to JPEG"


@pytest.mark.parametrize("form", ["webp", "gif", "png", "avif", "jpg"])
def test_still_picture_is_an_image_of_one_frame(tmp_path, form):
    Image.fromarray(zoo.draw(77)).save(tmp_path / f"a.{form}")
    result = decode_video(f"{tmp_path}/a.{form}", DATA, SIDE)
    assert [zoo.read_number(image) for image in result.images] == [77]
    assert result.times.tolist() == [0]
    assert result.shortfall is None
    header = probe_video(f"{tmp_path}/a.{form}", DATA)
    assert (header.seconds, header.frames, header.width, header.height) == (0, 1, 128, 64)


def uneven_pictures(path: Path, **options) -> float:
    """Write an animation of a growing bar on a clear ground, drawn in parts; return its duration [s]."""
    milliseconds = [100, 700, 30, 400, 90, 1000, 60]
    images = []
    for number in range(len(milliseconds)):
        image = Image.new("RGBA", (128, 64), (0, 0, 0, 0) if number else (20, 90, 160, 255))
        image.paste((200, 40 * number % 256, 30, 255), (8, 8, 16 + 14 * number, 40))
        images.append(image)
    images[0].save(path, save_all=True, append_images=images[1:], duration=milliseconds, loop=0, **options)
    return sum(milliseconds) / 1000


@pytest.mark.parametrize("disposal", [0, 1, 2])
@pytest.mark.parametrize("form", ["gif", "png"])
def test_frames_drawn_over_each_other_look_as_in_ffmpeg(tmp_path, form, disposal):
    path = tmp_path / f"a.{form}"
    duration = uneven_pictures(path, disposal=disposal, **({"blend": 1} if form == "png" else {}))
    times, _, images, _ = expected(path, duration=duration)
    result = decode_video(str(path), DATA, SIDE)
    assert result.times == pytest.approx(times, abs=2e-3)
    assert abs(result.images.astype(int) - images).mean() < 4
    assert abs(result.images[1:].astype(int) - result.images[:-1]).mean() > 1, "frames that are alike prove nothing"


def test_gif_without_delays_plays_ten_frames_a_second(tmp_path):
    images = [Image.fromarray(zoo.draw(number)) for number in range(40)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=0)
    require_right(tmp_path / "a.gif")
    assert probe_video(f"{tmp_path}/a.gif", DATA).seconds == pytest.approx(4)


# Encrypted files, and how they are called.


def cenc(path, scheme="cenc"):
    key = ["-encryption_scheme", "cenc-aes-ctr", "-encryption_key", "7" * 32, "-encryption_kid", "a" * 32]
    make(path, *H264, *key, **SLOW)
    path.write_bytes(path.read_bytes().replace(b"cenc", scheme.encode()))


def fairplay(path):
    make(path, *H264, **SLOW)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"drmi", 2))


def scrambled(path):
    data = bytearray(make(path, *H264, audio_s=4, **SLOW).read_bytes())
    size, start = (192, 4) if path.suffix == ".m2ts" else (188, 0)
    for at in range(start, len(data), size):
        if int.from_bytes(data[at + 1 : at + 3]) & 0x1FFF in (0x100, 0x1011):
            data[at + 3] |= 0x80
    path.write_bytes(data)


def css(path):
    data = bytearray(make(path, *MPEG2, **FAST).read_bytes())
    at = data.find(b"\x00\x00\x01\xe0")
    while at >= 0:
        data[at + 6] |= 0x10
        at = data.find(b"\x00\x00\x01\xe0", at + 4)
    path.write_bytes(data)


def drm(path):
    data = make(path, "-c:v", "wmv2", "-g", "10", **SLOW).read_bytes()
    content_encryption = bytes.fromhex("fbb3112223bdd211b4b700a0c955fc6e") + struct.pack("<Q", 40) + bytes(16)
    size = struct.unpack_from("<Q", data, 16)[0]
    head = data[:16] + struct.pack("<QI", size + 40, struct.unpack_from("<I", data, 24)[0] + 1) + data[28:30]
    path.write_bytes(head + content_encryption + data[30:])


def element(name, content):
    return name + struct.pack(">I", 0x10000000 | len(content)) + content


def encrypted_webm(path):
    """Insert ContentEncodings into the track, as packagers do."""
    data = make(path, *VP8, **SLOW).read_bytes()
    encryption = element(b"\x50\x35", element(b"\x47\xe1", b"\5"))
    encodings = element(b"\x6d\x80", element(b"\x62\x40", element(b"\x50\x33", b"\1") + encryption))
    tracks = data.index(b"\x16\x54\xae\x6b", data.index(b"\x16\x54\xae\x6b") + 4)  # after the seek head
    path.write_bytes(grown(data, tracks, encodings))


def grown(data, tracks, addition):
    """Return a Matroska file with an addition at the end of its first track."""

    def size_at(at):
        length = 9 - data[at].bit_length()
        return int.from_bytes(data[at : at + length]) & ((1 << 7 * length) - 1), length

    tracks_size, tracks_length = size_at(tracks + 4)
    entry = tracks + 4 + tracks_length
    entry_size, entry_length = size_at(entry + 1)
    content = data[entry + 1 + entry_length : entry + 1 + entry_length + entry_size] + addition
    rest = data[entry + 1 + entry_length + entry_size : tracks + 4 + tracks_length + tracks_size]
    return (
        data[:tracks]
        + element(b"\x16\x54\xae\x6b", element(b"\xae", content) + rest)
        + data[tracks + 4 + tracks_length + tracks_size :]
    )


ENCRYPTED = {
    "mp4": ("a.mp4", cenc, "cenc"),
    "mp4 of Apple's scheme": ("a.mp4", functools.partial(cenc, scheme="cbcs"), "cbcs"),
    "film of iTunes": ("a.mp4", fairplay, "FairPlay"),
    "webm": ("a.webm", encrypted_webm, "ContentEncryption"),
    "transport stream": ("a.ts", scrambled, "a scrambled transport stream"),
    "camcorder's transport stream": ("a.m2ts", scrambled, "a scrambled transport stream"),
    "dvd": ("a.vob", css, "CSS, as on DVDs"),
    "wmv": ("a.wmv", drm, "Windows Media DRM"),
}


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize("kind", ENCRYPTED)
def test_encrypted_file_is_refused_as_such(tmp_path, kind, backend):
    name, make_file, scheme = ENCRYPTED[kind]
    make_file(tmp_path / name)
    failure = VideoFailure(f"its video is encrypted ({scheme})", "check")
    assert decode_video(f"{tmp_path}/{name}", DATA.model_copy(update={"decoder": backend}), SIDE) == failure
    assert probe_video(f"{tmp_path}/{name}", DATA) == failure


def test_audio_that_is_encrypted_alone_is_no_obstacle(tmp_path):
    path = make(tmp_path / "a.ts", *H264, audio_s=4, **SLOW)
    data = bytearray(path.read_bytes())
    for at in range(0, len(data), 188):
        if int.from_bytes(data[at + 1 : at + 3]) & 0x1FFF == 0x101:
            data[at + 3] |= 0x80
    path.write_bytes(data)
    result = decode_video(str(path), DATA, SIDE)
    assert all(a < b for a, b in pairwise(zoo.read_number(image) for image in result.images))
    assert len(result) == COUNT


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
    for suffix in VIDEO_SUFFIXES:
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
