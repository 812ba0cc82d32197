"""The page of an evaluation."""

import json
import re

import pytest

from crosslmm.evaluate import report
from crosslmm.evaluate.scores.judging import Reply, compare
from tests.support.evaluations import evaluated, replies, source


@pytest.fixture
def videomme(tmp_path):
    return source("videomme", tmp_path / "data")


def page(one, data, rival=None, difference=None) -> str:
    return report.page(one, rival, difference, data)


def test_page_has_the_score_and_every_answer(videomme, tmp_path):
    one = evaluated(videomme, tmp_path, replies(videomme, ["A", "B"]))
    text = page(one, videomme)
    assert "Accuracy 0.500 [" in text
    assert "clustered by video" in text
    assert "24: 24 answered, 0 empty, 0 unparsable, 0 unreadable" in text
    assert text.count('class="question ') == 24
    assert text.count("data:image/jpeg;base64,") == 8
    assert "<td>duration</td><td>long</td>" in text
    assert "4 frames, 0 s to 0.75 s" in text


def test_expected_and_chosen_options_are_marked(videomme, tmp_path):
    text = page(evaluated(videomme, tmp_path, replies(videomme, ["B"])), videomme)
    first = text[text.index("000-0") : text.index("000-1")]
    assert re.findall(r"<li class=\"([^\"]+)\">(.)", first) == [("expected", "A"), ("chosen", "B")]


def test_without_a_score_the_page_says_why(videomme, tmp_path):
    one = evaluated(videomme, tmp_path, replies(videomme, ["A"], unreadable=[0, 1]))
    text = page(one, videomme)
    assert "No score: 2 of 24 questions could not be asked, which is 8.3%." in text
    assert "Accuracy" not in text
    assert "no such file" in text
    assert "<h2>By group" not in text


def test_comparison_is_shown(videomme, tmp_path):
    one = evaluated(videomme, tmp_path, replies(videomme, ["A"]))
    rival = evaluated(videomme, tmp_path, replies(videomme, ["B"]), name="rival")
    text = page(one, videomme, rival, compare(one.answers, rival.answers, videomme.benchmark))
    assert "Difference, paired by question: 0.000 [" in text


def test_page_is_limited(videomme, tmp_path, monkeypatch):
    one = evaluated(videomme, tmp_path, [Reply("A" * 10_000)] * 24)
    monkeypatch.setattr(report, "MAX_ANSWERS", 10)
    monkeypatch.setattr(report, "MAX_STRIP_BYTES", 30_000)
    text = page(one, videomme)
    assert text.count('class="question ') == 10
    assert 0 < text.count("data:image/jpeg;base64,") < 4
    assert "A" * 2000 not in text
    assert "10 of 24 answers are on this page, wrong ones rather" in text


def test_wrong_answers_come_before_right_ones(videomme, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MAX_ANSWERS", 12)
    text = page(evaluated(videomme, tmp_path, replies(videomme, ["A", "B", "C", "A"])), videomme)
    assert text.count('data-verdict="wrong"') == 6
    assert text.count('data-verdict="right"') == 6


def test_files_of_the_evaluation(videomme, tmp_path):
    one = evaluated(videomme, tmp_path, replies(videomme))
    uri = report.write(one, None, None, videomme)
    assert uri == str(tmp_path / "evaluations" / "evaluation" / "report.html")
    lines = [json.loads(line) for line in one.folder.read("answers.jsonl").splitlines()]
    assert [line["number"] for line in lines] == list(range(24))
    assert {"question", "options", "prediction", "extracted", "right", "frames", "times", "seconds"} <= lines[0].keys()
    assert json.loads(one.folder.read("scores.json"))["counts"]["unreadable"] == 0
