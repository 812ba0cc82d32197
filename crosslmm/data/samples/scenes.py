"""The sample set for pretrained parts: two scenes of real films after each other, each with a handwritten digit on a
card in a corner, and answers in words.

Held-out clips show other parts of the films and other images of digits, and half of their questions are worded as no
training question is. `blacked_out.jsonl` asks the same questions about black frames. The same seed gives the same
bytes.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from crosslmm.data.samples.clips import FPS, Clip, write_split
from crosslmm.data.samples.films import FILMS, read_digits, read_film

SIDE, SCENE_FRAMES = 224, 4
"""Side of a frame [px]; frames of each of the two scenes."""
CARD_SIDE = 98
"""Side of a card [px], in whole patches. Its digit is dark on light, and smooth: DINOv2 tells small, light, blocky
digits apart less well (docs/small.md)."""
CROP = (0.75, 1.0)
"""Side of the part of a film's frame that a clip shows, over the frame's height."""
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CHANCE = {"scene": 1 / 6, "order": 1 / 30, "digit": 1 / 10}
"""Accuracy of an answer that does not depend on the clip, by kind of question."""
REWORDED = "reworded "
"""Begins the kind of a question in words that no training question has."""

ASKED = {
    "scene": (
        ("What does the video show at the beginning?", "What can be seen first?", "Describe the first scene."),
        ("What does the video show at the end?", "What can be seen last?", "Describe the last scene."),
    ),
    "order": (("What happens in the video?", "Describe the video.", "What does the video show, one after the other?"),),
    "digit": (
        ("Which digit is written at the beginning?", "What is the first digit?"),
        ("Which digit is written at the end?", "What is the last digit?"),
    ),
}
"""Questions of training: kind -> about the first scene, about the last one -> wordings."""
ASKED_ANEW = {
    "scene": ("What is visible at the start of this clip?", "What is visible at the end of this clip?"),
    "order": ("Tell me what happens in this clip.",),
    "digit": (
        "Which number can be read at the start of this clip?",
        "Which number can be read at the end of this clip?",
    ),
}
"""The same in other words, for held-out clips."""

Drawn = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""Numbers of the films of a clip, its digits and their corners; of the first and the last scene each."""


def write_scenes(folder: str, train: int = 1000, held_out: int = 120, seed: int = 0) -> None:
    """Write clips and `train.jsonl`, `held_out.jsonl` and `blacked_out.jsonl` into `folder` (a path or an `s3://` URI).

    Raises:
        BadConfig: a package that has the films is not installed.
    """
    for stream, (split, count) in enumerate({"train": train, "held_out": held_out}.items()):
        rng = np.random.default_rng([seed, stream])
        films, digits = [read_film(film, split) for film in FILMS], read_digits(split)
        drawn = _draw(rng, count)
        frames = (_frames(rng, films, digits, one) for one in drawn)
        if split == "train":
            write_split(folder, split, (Clip(f, _conversation(rng, one)) for f, one in zip(frames, drawn, strict=True)))
            continue
        asked = [_questions(i, one) for i, one in enumerate(drawn)]
        write_split(folder, split, (Clip(f, *of_clip) for f, of_clip in zip(frames, asked, strict=True)))
        black = np.zeros((2 * SCENE_FRAMES, SIDE, SIDE, 3), np.uint8)
        write_split(folder, "blacked_out", (Clip(black, *of_clip) for of_clip in asked))


def _draw(rng: np.random.Generator, count: int) -> list[Drawn]:
    """Draw what clips show, all pairs of films equally often, and all digits in all four corners."""
    pairs = _balanced(rng, list(itertools.permutations(range(len(FILMS)), 2)), count)
    first, last = (_balanced(rng, list(itertools.product(range(10), range(4))), count) for _ in range(2))
    return [(pair, (first[i][0], last[i][0]), (first[i][1], last[i][1])) for i, pair in enumerate(pairs)]


def _balanced(rng: np.random.Generator, values: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    repeated = list(itertools.islice(itertools.cycle(values), count))
    return [repeated[i] for i in rng.permutation(count)]


def _frames(rng: np.random.Generator, films: Sequence[np.ndarray], digits: np.ndarray, drawn: Drawn) -> np.ndarray:
    """Draw the frames of a clip, uint8 (2 * SCENE_FRAMES, SIDE, SIDE, 3)."""
    scenes = []
    for film, digit, corner in zip(*drawn, strict=True):
        frames = _scene(rng, films[film], FILMS[film].rate)
        card = _card(digits[digit, rng.integers(digits.shape[1])])
        y, x = (0 if near else SIDE - CARD_SIDE for near in (corner < 2, corner % 2 == 0))
        frames[:, y : y + CARD_SIDE, x : x + CARD_SIDE] = card[:, :, None]
        scenes.append(frames)
    return np.concatenate(scenes)


def _card(digit: np.ndarray) -> np.ndarray:
    """Enlarge a light digit and make it dark on light, uint8 (CARD_SIDE, CARD_SIDE)."""
    return np.asarray(Image.fromarray(255 - digit).resize((CARD_SIDE, CARD_SIDE), Image.Resampling.BICUBIC))


def _scene(rng: np.random.Generator, film: np.ndarray, rate: float) -> np.ndarray:
    """Cut about a second from a film: a square of its frames, mirrored or not."""
    step = min(rate / FPS, (len(film) - 1) / SCENE_FRAMES)
    start = rng.uniform(0, len(film) - 1 - step * (SCENE_FRAMES - 1))
    frames = film[np.round(start + step * np.arange(SCENE_FRAMES)).astype(int)]
    height, width = frames.shape[1:3]
    side = int(height * rng.uniform(*CROP))
    y, x = rng.integers(height - side + 1), rng.integers(max(1, width - side + 1))
    places = np.arange(SIDE) * side // SIDE
    square = frames[:, y + places][:, :, np.minimum(x + places, width - 1)]
    return np.ascontiguousarray(square[:, :, ::-1] if rng.integers(2) else square)


def _conversation(rng: np.random.Generator, drawn: Drawn) -> list[tuple[str, str]]:
    """Return the turns of a training clip, in random order. No answer gives away another one's."""
    kinds = ["digit", str(rng.choice(["scene", "order"]))]
    turns = [
        (str(rng.choice(wordings)), answer)
        for kind in kinds
        for wordings, answer in zip(ASKED[kind], _answers(kind, drawn), strict=True)
    ]
    return [turns[i] for i in rng.permutation(len(turns))]


def _questions(number: int, drawn: Drawn) -> tuple[list[tuple[str, str]], list[str]]:
    """Return a question of each kind about a held-out clip, and the kinds: about its first and its last scene, and in
    the words of training and in others, by turns."""
    reworded, last = number % 2, number // 2 % 2
    turns, kinds = [], []
    for kind, wordings in ASKED.items():
        scene = last % len(wordings)
        question = ASKED_ANEW[kind][scene] if reworded else wordings[scene][number // 4 % len(wordings[scene])]
        turns.append((question, _answers(kind, drawn)[scene]))
        kinds.append(f"{REWORDED * reworded}{kind}")
    return turns, kinds


def _answers(kind: str, drawn: Drawn) -> list[str]:
    films, digits, _ = drawn
    shown = [FILMS[film].shows for film in films]
    if kind == "scene":
        return shown
    if kind == "order":
        return [f"first {shown[0]}, then {shown[1]}"]
    return [f"{'an' if digit == 8 else 'a'} {WORDS[digit]}" for digit in digits]
