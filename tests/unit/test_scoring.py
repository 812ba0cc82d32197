import math
import unicodedata

import pytest

from crosslmm import scoring
from crosslmm.scoring import is_right, question_text, questions_of
from tests.support.common import conversation

SAME = [
    ("A dog jumps.", " A dog jumps.\n"),
    ("A dog  jumps\tover\nit.", "A dog jumps over it."),
    # Qwen's tokenizer composes characters before the model sees them, so no answer has the other form.
    (unicodedata.normalize("NFC", "Café crème"), unicodedata.normalize("NFD", "Café crème")),
    ("", "  "),
]
DIFFERENT = [
    ("a dog jumps.", "A dog jumps."),
    ("A dog jumps", "A dog jumps."),
    ("4", "\uff14"),
    ("red", ""),
    ("re d", "red"),
]


@pytest.mark.parametrize(("answer", "reference"), SAME)
def test_white_space_and_composition_make_no_difference(answer, reference):
    assert is_right(answer, reference)
    assert is_right(reference, answer)


@pytest.mark.parametrize(("answer", "reference"), DIFFERENT)
def test_everything_else_makes_a_difference(answer, reference):
    assert not is_right(answer, reference)


def test_every_answer_is_asked_for_with_what_comes_before_it():
    system = {"role": "system", "content": "Be brief."}
    first, answer, second, last = conversation("What?", "a dog") + conversation("Which colour?", "red", video=False)
    asked = list(questions_of([system, first, answer, second, last]))
    assert asked == [([system, first], "a dog"), ([system, first, answer, second], "red")]
    assert [question_text(prompt) for prompt, _ in asked] == ["What?", "Which colour?"]


def test_accuracies_stand_with_their_counts():
    outcomes = [("b", True), ("b", False), ("", True), (None, False), ("a", None), (None, None)]
    score = scoring.score(outcomes)
    assert score.metrics() == {
        "validation/accuracy": 0.5,
        "validation/accuracy/": 1.0,
        "validation/accuracy/b": 0.5,
        "validation/count": 4.0,
        "validation/count/": 1.0,
        "validation/count/b": 2.0,
        "validation/unreadable": 2.0,
    }
    assert score.to_json() == {
        "accuracy": 0.5,
        "count": 4,
        "accuracy_by_kind": {"": 1.0, "b": 0.5},
        "count_by_kind": {"": 1, "b": 2},
        "unreadable": 2,
    }
    assert str(score.overall) == "0.500 of 4"


def test_without_a_question_there_is_no_accuracy():
    """0 would say that the model is bad."""
    score = scoring.score([("a", None)])
    assert score.metrics() == {"validation/count": 0.0, "validation/unreadable": 1.0}
    assert score.to_json()["accuracy"] is None
    assert math.isnan(score.overall.share)
