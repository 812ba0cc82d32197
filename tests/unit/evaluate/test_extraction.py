"""What is found in a model's words. tests/harness compares the same rules with lmms-eval's own functions."""

import pytest

from crosslmm.evaluate.benchmarks import BENCHMARKS
from crosslmm.evaluate.questions.question import Question
from tests.support.benchmark_folders import PREDICTIONS, TEXTS


def question(*options: str, task: str = "", answer: str = "") -> Question:
    messages = [{"role": "user", "content": "What?"}]
    return Question("1", (), messages, answer, options or tuple(TEXTS), groups=(("task", task),))


@pytest.mark.parametrize(
    ("name", "answer", "letter"),
    [
        ("videomme", "(B) because A is wrong", "B"),
        ("videomme", "A and B", "A"),
        ("videomme", "b", ""),
        ("videomme", "I first thought of C. The answer is (D)", "D"),
        ("mvbench", "b", "B"),
        ("mvbench", "(B) because A is wrong", "B"),
        ("mvbench", "the dog is red", ""),
        ("mvbench", "it is a dog", "A"),
        ("mlvu_dev", "Best option: (C", "C"),
        ("longvideobench_val_v", "The best answer is D", "D"),
        ("longvideobench_val_v", "the dog", ""),
        ("lvbench", "!!!!", ""),
        ("perceptiontest_val_mc", "I think B.", "B"),
        ("perceptiontest_val_mc", "NASA", ""),
        ("egoschema_subset", "(A) (B) C", "A"),
        ("egoschema_subset", "I think that it is surely a. the dog is red", "A"),
        ("nextqa_mc_test", "(A) (B) C", "B"),
        ("nextqa_mc_test", "I think that the dog is red here", "A"),
        ("vnbench", "I choose D, not A", "A"),
        ("vnbench", "D. A", "D"),
    ],
)
def test_letter_in_an_answer(name, answer, letter):
    assert BENCHMARKS[name].extract(answer, question()) == letter


@pytest.mark.parametrize(
    ("task", "options", "answer", "extracted"),
    [
        ("multi-choice", ["A. up", "B. down"], "B. down", "B"),
        ("multi-choice", ["A. up", "B. down"], "down", ""),
        ("yes_no", ["yes", "no"], "YES!", "yes"),
        ("yes_no", ["yes", "no"], "nothing", "no"),
        ("yes_no", ["yes", "no"], "maybe yes", ""),
        ("caption_matching", ["Caption A: it rises", "Caption B: it falls"], "B", "Caption B"),
        ("caption_matching", ["Option 1: it rises", "Option 2: it falls"], "it falls", "Option 2"),
        ("caption_matching", ["Option 1: it rises", "Option 2: it falls"], "it sinks", ""),
    ],
)
def test_option_in_an_answer_of_tempcompass(task, options, answer, extracted):
    assert BENCHMARKS["tempcompass"].extract(answer, question(*options, task=task)) == extracted


@pytest.mark.parametrize("name", BENCHMARKS)
def test_nothing_is_guessed(name):
    for task in ("multi-choice", "yes_no", "caption_matching"):
        for answer in ("", " ", "!!!!", "?"):
            assert BENCHMARKS[name].extract(answer, question(task=task)) == ""


@pytest.mark.parametrize("name", BENCHMARKS)
def test_same_answer_gives_the_same_letter(name):
    # A rule that guesses gives another one sooner or later.
    for answer in PREDICTIONS:
        found = {BENCHMARKS[name].extract(answer, question(task="multi-choice")) for _ in range(20)}
        assert len(found) == 1
