"""Rules that find the chosen option in a model's words, shared by several benchmarks. They decide as those of the
pinned lmms-eval, with one exception: where nothing is found they return "" (`NOTHING`) and never guess."""

import re
from collections.abc import Sequence

NOTHING = ""
"""What a rule returns if it finds no answer."""

PHRASES = (
    "the answer is", "answer is", "the correct answer is", "correct answer is", "the best answer is", "best answer is",
    "the correct option is", "correct option is", "the best option is", "best option is", "the choice is", "choice is",
    "the correct choice is", "correct choice is", "i choose", "i select", "i pick", "my answer is", "my choice is",
    "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip
"""Phrases that announce an answer, in lower case."""


def strongest_letter(answer: str, letters: Sequence[str]) -> str:
    """Return the letter that stands in the strongest position: at the start, at the end, after a phrase, in
    parentheses, before a full stop, before a colon, before a parenthesis, before a space, anywhere. Of several in
    equal positions, the last.

    >>> strongest_letter("(B) because A is wrong", "ABCD"), strongest_letter("A and B", "ABCD")
    ('B', 'A')
    """
    if not answer.strip():
        return NOTHING
    bare = _without_marks(answer.strip(), ",.!?;:'\"")
    padded = f" {bare} "
    at = [(strength, place, letter) for letter in letters for strength, place in _positions(letter, padded)]
    at = at or [(0, padded.rfind(letter), letter) for letter in letters if letter in padded]
    return max(at, key=lambda mention: mention[:2])[2] if at else NOTHING


def _positions(letter: str, padded: str) -> list[tuple[int, int]]:
    """Return (strength, place) of each way in which a letter stands in a text between two spaces."""
    shapes = {f"({letter})": 6, f"{letter}.": 5, f"{letter}:": 4, f"{letter})": 3, f"{letter} ": 2}
    mentions = [(strength, padded.rfind(shape)) for shape, strength in shapes.items() if shape in padded]
    lower = padded.lower()
    for phrase in PHRASES:
        announced = lower.find(phrase)
        if announced >= 0 and (place := padded.find(letter, announced + len(phrase))) >= 0:
            mentions.append((7, place))
    text = padded.strip()
    if text.startswith(letter) and not text[1:2].isalpha():
        mentions.append((10, 0))
    if text.endswith(letter) and not text[-2:-1].isalpha():
        mentions.append((9, len(padded) - 1))
    return mentions


def _without_marks(text: str, marks: str) -> str:
    """Remove punctuation at both ends, one kind after the other in the order of `marks`."""
    for mark in marks:
        text = text.strip(mark)
    return text


def staged_letters(answer: str, options: Sequence[str], letters: Sequence[str]) -> tuple[str, dict[str, list[str]]]:
    """Look for letters as MMMU does.

    Args:
        answer: the model's words.
        options: text of each option.
        letters: letter of each option.

    Returns:
        (text, matches): the answer between spaces and without marks at its ends, and the letters that stand in it, by
        how they do: `bracket` "(A)", `space` "A ", `stop` "A.". If there are none and the answer has more than five
        words, `content`: the options whose text the answer contains, in any case.
    """
    text = f" {_without_marks(answer, ',.!?;:' + chr(39))} "
    shapes = {"bracket": "({})", "space": "{} ", "stop": "{}."}
    matches = {name: [x for x in letters if shape.format(x) in text] for name, shape in shapes.items()}
    matches["content"] = []
    if not any(matches.values()) and len(text.split()) > 5:
        lower = text.lower()
        matches["content"] = [x for x, option in zip(letters, options, strict=True) if option.lower() in lower]
    return text, matches


def first_letter(answer: str, pattern: str) -> str:
    """Return the first group of a pattern's first match.

    >>> first_letter("I think B.", r"\\b([A-D])\\b")
    'B'
    """
    match = re.search(pattern, answer)
    return match[1] if match else NOTHING
