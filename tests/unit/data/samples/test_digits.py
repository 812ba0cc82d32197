import itertools
from collections import Counter

import numpy as np
import pytest

from crosslmm.config import DataConfig
from crosslmm.data.manifest import Manifest
from crosslmm.data.samples.digits import CHANCE, PLATES, QUESTION, load_digits, write_digits
from crosslmm.data.samples.shapes import COLOURS, FRAMES, SIDE
from crosslmm.data.video.decode import decode_video

TRAIN, HELD_OUT = 32, 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    write_digits(str(folder), TRAIN, HELD_OUT)
    return folder


@pytest.fixture(scope="module")
def known():
    return load_digits()


def rows(folder, split):
    return Manifest(str(folder / f"{split}.jsonl")).rows


def crop(frames, colour):
    """Find the plate of a colour; return the frames that show it, its upper left corner, and its pixels in grey."""
    background = 0.6 * np.array(COLOURS[colour])
    like = np.abs(frames.astype(float) - background).sum(-1) < 75
    visible = np.flatnonzero(like.sum((1, 2)) > 25)
    # The plate is the window with most pixels of its colour.
    counts = np.pad(like[visible[0]].cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    windows = counts[16:, 16:] - counts[16:, :-16] - counts[:-16, 16:] + counts[:-16, :-16]
    y, x = np.unravel_index(windows.argmax(), windows.shape)
    return visible, np.array([y, x]), frames[visible[0], y : y + 16, x : x + 16].mean(-1)


def test_digit_in_question_is_readable_in_the_decoded_frames(folder, known):
    # Classify the decoded pixels by the nearest training image.
    trained = known["train"].images.reshape(-1, 64)
    trained = trained - trained.mean(1, keepdims=True)
    right, late = [], []
    for row in rows(folder, "held_out"):
        visible, _, pixels = crop(decode_video(row["videos"][0], DataConfig(num_frames=FRAMES), SIDE).images, "red")
        small = pixels.reshape(8, 2, 8, 2).mean((1, 3)).reshape(64)
        small = (small - small.mean()) / 255
        nearest = known["train"].labels[np.square(trained - small).sum(1).argmin()]
        right.append(str(nearest) == row["messages"][1]["content"])
        late.append(visible[0] == FRAMES - 2)
        assert (row["kind"] == "late digit") == late[-1], row["id"]
        assert len(visible) == 2
    assert np.mean(right) > 0.9 > 5 * CHANCE
    assert 0.05 < np.mean(late) < 0.3


def test_splits_share_no_image(known):
    trained, held_out = ({image.tobytes() for image in known[split].images} for split in ("train", "held_out"))
    assert len(trained) + len(held_out) > 1780
    assert not trained & held_out


def test_plates_do_not_overlap(folder):
    for row in rows(folder, "train"):
        frames = decode_video(row["videos"][0], DataConfig(num_frames=FRAMES), SIDE).images
        corners = [crop(frames, colour)[1] for colour in PLATES]
        assert all(abs(a - b).max() >= 16 for a, b in itertools.combinations(corners, 2)), row["id"]


def test_bytes_depend_on_the_seed_only(folder, tmp_path):
    write_digits(str(tmp_path / "same"), TRAIN, HELD_OUT)
    write_digits(str(tmp_path / "other"), 4, 4, seed=1)
    for path in folder.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "same" / path.relative_to(folder)).read_bytes()
    assert (folder / "train/00003.mp4").read_bytes() != (tmp_path / "other/train/00003.mp4").read_bytes()


def test_each_clip_has_one_question_and_answers_are_balanced(folder):
    for split in ("train", "held_out"):
        for row in rows(folder, split):
            (question, answer) = row["messages"]
            assert question["content"][-1]["text"] == QUESTION
            assert answer["content"] in set("0123456789")
    held_out = rows(folder, "held_out")
    assert {row["kind"] for row in held_out} == {"digit", "late digit"}
    answers = Counter(row["messages"][1]["content"] for row in held_out)
    assert answers.keys() == set("0123456789")
    assert max(answers.values()) < 2.5 * HELD_OUT * CHANCE
