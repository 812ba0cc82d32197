import json
from collections import Counter

import numpy as np
import pytest

from crosslmm.config import DataConfig
from crosslmm.data.manifest import Manifest
from crosslmm.data.samples.shapes import (
    CHANCE,
    COLOURS,
    DIRECTIONS,
    FRAMES,
    QUESTIONS,
    SHAPES,
    SIDE,
    sample_manifests,
    write_sample_set,
)
from crosslmm.data.video.decode import decode_video

TRAIN, HELD_OUT = 240, 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    write_sample_set(str(folder), TRAIN, HELD_OUT)
    return folder


def rows(folder, split):
    return Manifest(str(folder / f"{split}.jsonl")).rows


def answers_of(row):
    """Return the answers of one row by question."""
    texts = [
        m["content"] if isinstance(m["content"], str) else next(p["text"] for p in m["content"] if p["type"] == "text")
        for m in row["messages"]
    ]
    return dict(zip(texts[::2], texts[1::2], strict=True))


def segment(frame):
    """Return the mask of a frame's shape, and its colour."""
    contrast = np.abs(frame.astype(int) - frame[0, 0]).sum(-1)
    mask = contrast > contrast.max() / 2
    median = np.median(frame[mask], axis=0)
    return mask, min(COLOURS, key=lambda colour: np.abs(median - COLOURS[colour]).sum())


def classify(mask):
    """Classify a shape by how it fills its bounding box, which excludes the codec's smear around the shape."""
    height, width = (mask.sum(axis) > mask.sum(axis).max() / 8 for axis in (1, 0))
    box = mask[height][:, width]
    upper, lower = box[: len(box) // 2].mean(), box[len(box) // 2 :].mean()
    if lower > 1.7 * upper:
        return "triangle"
    return "square" if box.mean() > 0.91 else "circle" if box.mean() > 0.6 else "cross"


def direction(first, last):
    (y0, x0), (y1, x1) = (np.mean(np.nonzero(mask), axis=1) for mask in (first, last))
    if abs(x1 - x0) > abs(y1 - y0):
        return "right" if x1 > x0 else "left"
    return "down" if y1 > y0 else "up"


def test_every_answer_is_visible_in_the_pixels(folder):
    for row in [*rows(folder, "train")[:60], *rows(folder, "held_out")]:
        frames = decode_video(row["videos"][0], DataConfig(num_frames=FRAMES), SIDE).images
        assert len(frames) == FRAMES
        shapes = [segment(frame) for frame in frames]
        (first, colour), (middle, _), (last, _) = shapes[0], shapes[FRAMES // 2], shapes[-1]
        readings = {
            "What colour is the shape?": colour,
            "Which colour came first?": colour,
            "Which shape is it?": classify(middle),
            "Which way does it move?": direction(first, last),
        }
        for question, answer in answers_of(row).items():
            assert answer == readings[question], (row["id"], question)


def test_sequence_clip_shows_three_colours(folder):
    for row in [r for r in rows(folder, "held_out") if r["kind"] == "first"]:
        frames = decode_video(row["videos"][0], DataConfig(num_frames=FRAMES), SIDE).images
        assert len({segment(frame)[1] for frame in frames}) == 3


def test_bytes_depend_on_the_seed_only(folder, tmp_path):
    write_sample_set(str(tmp_path / "same"), 8, 4)
    write_sample_set(str(tmp_path / "other"), 8, 4, seed=1)
    for name in ("train/00003.mp4", "held_out/00002.mp4"):
        same, other, reference = (
            (root / name).read_bytes() for root in (tmp_path / "same", tmp_path / "other", folder)
        )
        assert same == reference != other


def test_questions_and_answers_are_balanced(folder):
    pairs = [pair for row in rows(folder, "train") for pair in answers_of(row).items()]
    questions = Counter(question for question, _ in pairs)
    assert questions == dict.fromkeys(QUESTIONS.values(), TRAIN // 4) | {
        QUESTIONS[kind]: TRAIN * 3 // 4 for kind in ("colour", "shape", "direction")
    }
    for kind, choices in {"colour": COLOURS, "shape": SHAPES, "direction": DIRECTIONS, "first": COLOURS}.items():
        answers = Counter(answer for question, answer in pairs if question == QUESTIONS[kind])
        assert answers.keys() == choices.keys()
        even = answers.total() / len(choices)
        assert all(0.4 * even < count < 1.7 * even for count in answers.values())
        assert CHANCE[kind] == pytest.approx(1 / (3 if kind == "first" else len(choices)))


def test_order_of_questions_varies(folder):
    orders = {tuple(answers_of(row)) for row in rows(folder, "train") if len(answers_of(row)) == 3}
    assert len(orders) == 6


def test_held_out_clip_has_one_question_of_its_kind(folder):
    held_out = rows(folder, "held_out")
    assert all(list(answers_of(row)) == [QUESTIONS[row["kind"]]] for row in held_out)
    assert Counter(row["kind"] for row in held_out) == dict.fromkeys(QUESTIONS, HELD_OUT // 4)


def test_splits_share_no_clip(folder):
    trained = {path.read_bytes() for path in (folder / "train").iterdir()}
    assert len(trained) == TRAIN
    assert not trained & {path.read_bytes() for path in (folder / "held_out").iterdir()}


def test_complete_sample_set_is_not_written_again(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    manifests = sample_manifests(str(folder))
    assert manifests == {"manifest": f"{folder}/train.jsonl", "validation_manifest": f"{folder}/held_out.jsonl"}
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_manifest_paths_are_relative(folder):
    lines = (folder / "train.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["video"] == "train/00000.mp4"
