import json

import numpy as np
import pytest
from PIL import Image

from crosslmm.config import DataConfig
from crosslmm.data.frame_sampling import FrameSampling, split_time_range
from crosslmm.data.video.decode import VideoFailure, decode_video, probe_video, video_version
from crosslmm.data.video.decode_pool import Decoder, HeaderReader
from crosslmm.data.video.frame_list import (
    MAX_FRAMES,
    BadFrameList,
    FrameList,
    describe_video,
    is_frame_list,
    map_files,
    parse_frame_list,
    video_files,
)
from tests.support import zoo

SIDE = 64
DATA = DataConfig(num_frames=4)


@pytest.fixture
def frames(tmp_path):
    """Write twenty numbered pictures -> their paths; every other one is a JPEG."""
    paths = [tmp_path / f"{number:04d}.{'jpg' if number % 2 else 'png'}" for number in range(20)]
    for number, path in enumerate(paths):
        Image.fromarray(zoo.draw(number)).save(path)
    return [str(path) for path in paths]


def numbers(result):
    return [zoo.read_number(image) for image in result.images]


@pytest.mark.parametrize(
    "listed",
    [
        FrameList(("a.jpg",), fps=2.0),
        FrameList(("a.jpg", "/x/b c.jpg", 's3://bucket/é,"#t=1.jpg'), times=(0.0, 0.5, 7)),
    ],
)
def test_address_of_a_list_can_be_parsed(listed):
    assert parse_frame_list(str(listed)) == listed
    assert is_frame_list(str(listed))
    assert str(listed).isascii()
    assert split_time_range(f"{listed}#t=1,2.5") == (str(listed), 1.0, 2.5)
    assert video_files(f"{listed}#t=1,2.5") == listed.frames
    assert not is_frame_list("/data/{frames}.mp4")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"frames": []}, "0 frames"),
        ({"frames": ["a"] * (MAX_FRAMES + 1), "fps": 1}, "10001 frames"),
        ({"frames": ["a"]}, "needs fps or times"),
        ({"frames": ["a"], "fps": 1, "times": [0]}, "needs fps or times"),
        ({"frames": ["a"], "fps": 0}, "fps is 0"),
        ({"frames": ["a"], "fps": True}, "fps is True"),
        ({"frames": ["a"], "fps": float("nan")}, "fps is nan"),
        ({"frames": ["a"], "fps": 10**400}, "fps is 1000"),
        ({"frames": ["a"], "fps": "2"}, "fps is '2'"),
        ({"frames": ["a", "b"], "times": [0]}, "2 frames and 1 times"),
        ({"frames": ["a", "b"], "times": [0, 0]}, r"times\[1\] is 0, which is not after times\[0\]"),
        ({"frames": ["a", "b"], "times": [1, 0.5]}, r"times\[1\] is 0.5"),
        ({"frames": ["a", "b"], "times": [-1, 0]}, "from 0 on"),
        ({"frames": ["a", "b"], "times": [0, None]}, "from 0 on"),
        ({"frames": ["a", "b"], "times": "01"}, "should be lists"),
        ({"frames": "ab", "fps": 1}, "should be lists"),
        ({"frames": ["a", 1], "fps": 1}, "path or URI"),
        ({"frames": ["a", ""], "fps": 1}, "path or URI"),
        ({"frames": ["\ud800"], "fps": 1}, "path or URI"),
        ({"frames": ["a"], "fps": 1, "x": 1}, "a list of frames is"),
    ],
)
def test_malformed_list_is_refused_with_its_reason(fields, reason):
    with pytest.raises(BadFrameList, match=reason):
        parse_frame_list(json.dumps(fields))
    failure = decode_video(json.dumps(fields), DATA, SIDE)
    assert (failure.stage, probe_video(json.dumps(fields), DATA)) == ("check", failure)
    assert failure.reason.isascii()


@pytest.mark.parametrize("text", ['{"frames": [', '{"frames"' + "[" * 9999, '{"frames":["a"],"fps":1}' + " " * 2**25])
def test_list_that_is_no_json_is_refused(text):
    assert decode_video(text, DATA, SIDE).stage == "check"


def test_times_count_from_the_first_frame():
    listed = FrameList(("a", "b", "c"), times=(10.0, 10.5, 12.0))
    assert listed.starts.tolist() == [0, 0.5, 2]
    assert listed.ends.tolist() == [0.5, 2, 3.5]
    assert FrameList(("a",), times=(7.0,)).duration == 1
    assert FrameList(("a", "b"), fps=4).duration == 0.5


def test_list_decodes_like_the_video_of_its_frames(frames, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(zoo.video(frames=20))
    for part in ("", "#t=0.55,1.5", "#t=1"):
        for policy in ({}, {"sampling": "fps", "fps": 3}, {"sampling": "fps_then_uniform", "fps": 5}):
            data = DataConfig(num_frames=4, **policy)
            ours = decode_video(f"{FrameList(tuple(frames), fps=zoo.FPS)}{part}", data, SIDE)
            video = decode_video(f"{tmp_path}/clip.mp4{part}", data, SIDE)
            assert numbers(ours) == numbers(video)
            assert ours.times == pytest.approx(video.times)
            assert ours.shortfall == video.shortfall
            assert ours.images.shape[1:] == (SIDE, SIDE, 3)


def test_frames_are_chosen_by_their_times(frames):
    times = tuple(np.cumsum([3, *[0.1, 0.7] * 9, 2.0]).tolist())
    result = decode_video(str(FrameList(tuple(frames), times=times)), DATA, SIDE)
    starts = np.array(times) - 3
    moments = (np.arange(4) + 0.5) * (starts[-1] + 2.0) / 4
    chosen = np.searchsorted(starts, moments, side="right") - 1
    assert numbers(result) == chosen.tolist()
    assert result.times == pytest.approx(starts[chosen])


def test_few_frames_are_named(frames):
    result = decode_video(str(FrameList(tuple(frames[:2]), times=(0.0, 10.0))), DATA, SIDE)
    assert numbers(result) == [0, 1]
    assert result.shortfall == "2 of 4 frames: one picture stays from 0.0 s to 10.0 s, at 2 of the moments"


def test_only_sampled_frames_are_opened(frames, tmp_path):
    for number, path in enumerate(frames):
        if number not in (2, 7, 12, 17):
            (tmp_path / path).unlink()
    result = decode_video(str(FrameList(tuple(frames), fps=1)), DATA, SIDE)
    assert numbers(result) == [2, 7, 12, 17]
    assert result.shortfall is None


def test_unreadable_frame_costs_itself_and_is_named(frames, tmp_path):
    (tmp_path / frames[7]).write_bytes(b"\x1b[2Jno picture")
    result = decode_video(str(FrameList(tuple(frames), fps=1)), DATA, SIDE)
    assert numbers(result) == [2, 12, 17]
    assert result.times.tolist() == [2, 12, 17]
    assert result.shortfall.startswith(
        f"3 of 4 frames: none can be decoded at 1 moments from 7.5 s to 7.5 s; {frames[7]}: not"
    )
    assert result.shortfall.isascii()
    assert result.shortfall.isprintable()


def test_list_without_a_readable_frame_is_unreadable(tmp_path):
    address = str(FrameList(tuple(f"{tmp_path}/{number}.jpg" for number in range(8)), fps=1))
    assert decode_video(address, DATA, SIDE) == VideoFailure(f"{tmp_path}/1.jpg: no such file", "read")
    assert probe_video(address, DATA) == VideoFailure("no such file", "read")


def test_frames_are_images(frames, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(zoo.video(frames=2))
    failure = decode_video(str(FrameList((f"{tmp_path}/clip.mp4",), fps=1)), DATA, SIDE)
    assert failure.reason.endswith("the frames of a list are images, and this is none")
    animation = [Image.fromarray(zoo.draw(number)) for number in range(5)]
    for form in ("gif", "webp", "png"):
        animation[0].save(tmp_path / f"a.{form}", save_all=True, append_images=animation[1:], duration=100)
    result = decode_video(
        str(FrameList(tuple(f"{tmp_path}/a.{form}" for form in ("gif", "webp", "png")), fps=1)), DATA, SIDE
    )
    assert numbers(result) == [0, 0, 0]


def test_frames_stay_inside_of_the_roots(frames, tmp_path):
    root = tmp_path / "inside"
    root.mkdir()
    (root / "link.png").symlink_to(frames[0])
    data = DataConfig(num_frames=4, roots=[str(root)])
    for name, reason in {f"{root}/link.png": "a link leads outside", frames[0]: "lies outside of"}.items():
        failure = decode_video(str(FrameList((name,), fps=1)), data, SIDE)
        assert reason in failure.reason
        assert isinstance(probe_video(str(FrameList((name,), fps=1)), data), VideoFailure)


def test_limits_hold_for_lists(frames):
    address = str(FrameList(tuple(frames), fps=0.1))
    for read in (lambda data: decode_video(address, data, SIDE), lambda data: probe_video(address, data)):
        assert "it lasts 200 s" in read(DATA.model_copy(update={"max_video_s": 100})).reason
        assert "data.max_frame_pixels is 100" in read(DATA.model_copy(update={"max_frame_pixels": 100})).reason
        assert "data.max_video_bytes is 9" in read(DATA.model_copy(update={"max_video_bytes": 9})).reason


def test_header_of_a_list_is_that_of_its_first_frame(frames):
    header = probe_video(f"{FrameList(tuple(frames), fps=2)}#t=1", DATA)
    assert (header.seconds, header.frames, header.width, header.height, header.codec) == (10, 20, 128, 64, "png")


def test_children_read_lists(frames):
    address = str(FrameList(tuple(frames), fps=1))
    with Decoder(DATA, SIDE) as decoder, HeaderReader(DATA) as reader:
        missing = str(FrameList(("/nowhere/1.jpg",), fps=1))
        result, failure = decoder([address, missing])
        assert numbers(result) == [2, 7, 12, 17]
        assert failure.stage == "read"
        assert [type(header).__name__ for header in reader([address, missing])] == ["Probe", "VideoFailure"]


def test_version_changes_with_a_sampled_frame_only(frames):
    address, sampling = str(FrameList(tuple(frames), fps=1)), FrameSampling(4)
    version = video_version(address, sampling)
    assert len(version) == 64
    Image.fromarray(zoo.draw(99)).save(frames[3])
    assert video_version(address, sampling) == version
    Image.fromarray(zoo.draw(99)).save(frames[2])
    assert video_version(address, sampling) != version
    assert video_version(f"{address}#t=3,4", sampling) not in (None, version)
    assert video_version(f"{address}#t=99", sampling) is None
    assert video_version(str(FrameList(("/nowhere.jpg",), fps=1)), sampling) is None


def test_names_in_messages_are_short(frames):
    assert describe_video(str(FrameList(tuple(frames), fps=1))) == f"{frames[0]} and the frames after it"
    assert describe_video("clip.mp4#t=1") == "clip.mp4#t=1"
    assert len(describe_video('{"frames":' + "x" * 9999)) < 300


def test_files_of_a_video_are_renamed():
    listed = FrameList(("a", "b"), fps=1)
    assert map_files(f"{listed}#t=1,2", "/x/{}".format) == str(FrameList(("/x/a", "/x/b"), fps=1)) + "#t=1,2"
    assert map_files("clip.mp4#t=1", "/x/{}".format) == "/x/clip.mp4#t=1"
