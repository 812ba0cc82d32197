"""Frames are taken at the times of their own stream, whatever headers, other streams and clocks say."""

import io
import re
import struct
from pathlib import Path

import av
import numpy as np
import pytest

from crosslmm.data.video import probe, pyav, timeline
from crosslmm.data.video.decode import decode_video, probe_video
from tests.support import zoo
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
    make,
    needs_ffmpeg,
    require_right,
    run,
)

pytestmark = [pytest.mark.corrupt, needs_ffmpeg]


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


@pytest.mark.parametrize("kind", ["mkv with audio of 7 s", "mp4", "mp4 in fragments", "avi", "transport stream"])
def test_frames_are_the_same_with_a_pyav_that_shows_no_index(tmp_path, kind, monkeypatch):
    """As that of lmms-eval's environment, whose streams have no such attribute."""
    assert timeline.index_of(object()) == ()
    for module in (timeline, pyav, probe):
        monkeypatch.setattr(module, "index_of", lambda stream: ())
    name, options, audio_s = AUDIO_OUTLASTS[kind]
    path = make(tmp_path / name, *options, audio_s=audio_s, **SLOW)
    require_right(path)
    assert isinstance(probe_video(str(path), DATA), probe.Probe)


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
        path.write_bytes(data.replace(b"\x1c\x53\xbb\x6b", b"\x1c\x53\xbb\x6a"))  # a name that nobody knows
    require_right(path)


def with_other_duration(path: Path, factor: float) -> None:
    """Let the headers of an mp4 claim another duration than its index, so that this counts."""
    data = bytearray(path.read_bytes())
    for box, at in ((b"mdhd", 20), (b"mvhd", 20), (b"tkhd", 24)):
        start = data.index(box) + at
        struct.pack_into(">I", data, start, int(struct.unpack_from(">I", data, start)[0] * factor))
    path.write_bytes(data)


@pytest.mark.parametrize("factor", [0.3, 0.8, 1.2, 3])
def test_a_wrong_duration_of_an_mp4_track_is_not_used(tmp_path, factor):
    path = make(tmp_path / "a.mp4", *H264, **SLOW)
    with_other_duration(path, factor)
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
    path, grain = tmp_path / "a.mp4", np.random.default_rng(0).integers(-30, 30, (160, 900, 3))
    options = {"movflags": "dash+global_sidx+frag_keyframe"}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "10", "threads": "1", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 320, 160, "yuv420p"
        for number in range(600):
            picture = (zoo.draw(number, 320, 160) + grain[:, number % 580 :][:, :320]).clip(0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    read = []

    class Counted(io.FileIO):
        def read(self, size=-1):
            read.append(len(data := super().read(size)))
            return data

    with Counted(path) as file:
        result = pyav.with_pyav(file, "mov", DATA, SIDE)
    assert [zoo.read_number(image) for image in result.images] == [37, 112, 187, 262, 337, 412, 487, 562]
    assert sum(read) < 0.4 * path.stat().st_size


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


@pytest.mark.parametrize("share", [0.6, 0.97])
@pytest.mark.parametrize("kind", ["a.mp4", "disagrees.mp4", "a.avi", "a.mkv"])
def test_a_file_that_was_cut_off_is_named_even_if_it_gives_all_frames(tmp_path, kind, share):
    options = {"avi": MPEG4, "mkv": H264, "mp4": (*H264, "-movflags", "faststart")}[kind[-3:]]
    path = make(tmp_path / kind, *options, fps=10, frames=100)
    assert decode_video(str(path), DATA, SIDE).shortfall is None
    if kind == "disagrees.mp4":
        with_other_duration(path, 0.8)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    shortfall = decode_video(str(path), DATA, SIDE).shortfall
    assert f"the file was cut off: it has {int(len(whole) * share)} of its " in shortfall


def test_frames_of_a_file_whose_index_leads_back_are_in_order(tmp_path):
    """Found by fuzzing: with 96 bytes of the header repeated, libav's index of an avi begins with another frame."""
    data = zoo.video("avi", "mpeg4", frames=8, g="3")
    (tmp_path / "a.avi").write_bytes(data[:211] + data[215:311] + data[211:])
    times = decode_video(f"{tmp_path}/a.avi", DATA, SIDE).times
    assert len(times)
    assert (times[1:] > times[:-1]).all()
