"""Animations give the frames that are on screen, and images are videos of one frame."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crosslmm.data.video.decode import decode_video, probe_video
from tests.support import zoo
from tests.support.ffmpeg import COUNT, DATA, SIDE, expected, needs_ffmpeg, require_right

pytestmark = [pytest.mark.corrupt, needs_ffmpeg]


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
