import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslmm.data.frame_sampling import FrameSampling, frames_at, split_time_range


def llava_video_frames(total, native_fps, fps, most):
    """Return the frame numbers that LLaVA-Video's load_video takes, as does lmms-eval's adapter for it."""
    every = round(native_fps / fps)
    chosen = list(range(0, total, every))
    if len(chosen) > most:
        chosen = np.linspace(0, total - 1, most, dtype=int).tolist()
    return chosen


def internvl_frames(total, most):
    """Return the frame numbers that InternVL's get_index takes (middles of segments), as does lmms-eval's adapter."""
    segment = total / most
    return [int(segment / 2 + segment * i) for i in range(most)]


def sampled(sampling, total, native_fps):
    times = np.arange(total) / native_fps
    return frames_at(times, sampling.times(total / native_fps, times[-1]) + 1e-6).tolist()


@pytest.mark.parametrize(("total", "native_fps", "fps", "most"), [
    (300, 30, 1, 64), (3000, 30, 1, 64), (1800, 30, 2, 64), (250, 25, 1, 10), (251, 25, 1, 10), (1, 30, 1, 8),
    (7, 24, 1, 8),
])  # fmt: skip
def test_fps_then_uniform_matches_llava_video(total, native_fps, fps, most):
    sampling = FrameSampling(most, "fps_then_uniform", fps)
    assert sampled(sampling, total, native_fps) == llava_video_frames(total, native_fps, fps, most)


@pytest.mark.parametrize(("total", "most"), [(300, 8), (301, 8), (17, 16), (900, 64), (64, 64)])
def test_uniform_matches_internvl(total, most):
    assert sampled(FrameSampling(most), total, 30) == internvl_frames(total, most)


def test_fps_stops_at_num_frames():
    assert FrameSampling(4, "fps", 2.0).times(10).tolist() == [0, 0.5, 1, 1.5]
    assert FrameSampling(64, "fps", 2.0).times(1.75).tolist() == [0, 0.5, 1, 1.5]
    assert FrameSampling(64, "fps", 2.0).times(1.5).tolist() == [0, 0.5, 1]


@given(
    policy=st.sampled_from(["uniform", "fps", "fps_then_uniform"]),
    count=st.integers(1, 100),
    fps=st.floats(0.01, 60),
    total=st.integers(1, 5000),
    native_fps=st.floats(1, 120),
)
def test_times_ascend_within_the_video_and_respect_the_limit(policy, count, fps, total, native_fps):
    duration = total / native_fps
    times = FrameSampling(count, policy, fps).times(duration, duration - 1 / native_fps)
    assert 1 <= len(times) <= count
    assert np.all(np.diff(times) > 0) or total == 1
    assert times[0] >= 0
    assert times[-1] < duration + 1e-9
    assert np.all(np.diff(frames_at(np.arange(total) / native_fps, times)) > 0)


def test_time_range_is_split_from_the_uri():
    assert split_time_range("a.mp4") == ("a.mp4", 0, None)
    assert split_time_range("s3://b/a#1.mp4#t=1.5,20") == ("s3://b/a#1.mp4", 1.5, 20)
    assert split_time_range("a.mp4#t=3") == ("a.mp4", 3, None)
    assert split_time_range("a.mp4#t=,7") == ("a.mp4", 0, 7)
    with pytest.raises(ValueError, match=r"'a.mp4#t=3,3': the part ends before it begins"):
        split_time_range("a.mp4#t=3,3")


@given(
    policy=st.sampled_from(["uniform", "fps", "fps_then_uniform"]),
    most=st.integers(1, 100),
    fps=st.floats(0.1, 10),
    seconds=st.floats(0.01, 1000),
)
def test_count_matches_times(policy, most, fps, seconds):
    sampling = FrameSampling(most, policy, fps)
    assert sampling.count(np.array([seconds, np.nan, 0])).tolist() == [len(sampling.times(seconds)), most, 1]
