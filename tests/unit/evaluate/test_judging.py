"""Judgements of answers, and what they add up to."""

import pytest

from crosslmm.config import BadConfig
from crosslmm.evaluate.benchmarks import BENCHMARKS
from crosslmm.evaluate.questions.manifest import MANIFEST
from crosslmm.evaluate.questions.question import Question
from crosslmm.evaluate.scores.judging import Reply, compare, judge, load_scorer, score


def question(number: int, answer: str = "A", **fields) -> Question:
    content = [{"type": "video"}, {"type": "text", "text": "Which?"}]
    fields = {"videos": (f"v{number}.mp4",), "options": ("x", "y"), "choices": ("A", "B")} | fields
    return Question(str(number), messages=[{"role": "user", "content": content}], answer=answer, **fields)


def answers(texts, benchmark=BENCHMARKS["videomme"], **fields):
    """Judge texts as answers to questions whose answer is A; None stands for an unreadable video."""
    replies = [Reply(error="no such file") if text is None else Reply(text) for text in texts]
    return [judge(i, question(i, **fields), reply, benchmark) for i, reply in enumerate(replies)]


def test_statuses():
    judged = answers(["A", "B", "", "  ", "!!!!", None])
    assert [answer.status for answer in judged] == [
        "answered", "answered", "empty", "empty", "unparsable", "unreadable",
    ]  # fmt: skip
    assert [answer.right for answer in judged] == [True] + [False] * 5


def test_rows_without_an_answer_count_as_wrong():
    scored = score(answers(["A", "", "!!!!", None]), BENCHMARKS["videomme"])
    assert scored.accuracy.value == pytest.approx(0.25)
    assert scored.counts == {"answered": 1, "empty": 1, "unparsable": 1, "unreadable": 1}
    assert (scored.questions, scored.unreadable) == (4, 0.25)


def test_answers_of_a_manifest_match_exactly():
    judged = answers(["a  dog", "a dog.", "A dog", ""], MANIFEST, answer="a dog")
    assert [answer.right for answer in judged] == [True, False, False, False]


def test_most_likely_choice_needs_no_extraction():
    judged = judge(0, question(0), Reply("A", likelihoods={"A": -0.1, "B": -3.0}), BENCHMARKS["tempcompass"])
    assert (judged.extracted, judged.right) == ("A", True)


def test_tasks_have_equal_weights_where_the_benchmark_says_so():
    judged = [
        judge(i, question(i, groups=(("task", task),)), Reply(text), BENCHMARKS["mlvu_dev"])
        for i, (task, text) in enumerate([("count", "A"), ("count", "A"), ("count", "A"), ("order", "B")])
    ]
    assert score(judged, BENCHMARKS["mlvu_dev"]).accuracy.value == pytest.approx(0.5)
    assert score(judged, BENCHMARKS["videomme"]).accuracy.value == pytest.approx(0.75)
    assert score(judged, BENCHMARKS["mlvu_dev"]).by_group["task"]["count"].value == 1.0


@pytest.mark.parametrize(("texts", "share"), [("AAAA", 1.0), ("AAAB", 0.0), ("AAA", 0.0)])
def test_sample_of_several_tries_is_right_if_all_of_them_are(texts, share):
    judged = [
        judge(i, question(i, unit="sample", groups=(("task", "ret"),)), Reply(text), BENCHMARKS["vnbench"])
        for i, text in enumerate(texts)
    ]
    scored = score(judged, BENCHMARKS["vnbench"])
    assert (scored.accuracy.value, scored.accuracy.count) == (share, 1)


def test_values_of_a_group_may_overlap():
    groups = (("type", "reasoning"), ("type", "summary"))
    scored = score(answers(["A", "B"], groups=groups), BENCHMARKS["lvbench"])
    assert [scored.by_group["type"][value].count for value in ("reasoning", "summary")] == [2, 2]


def test_parts_and_frames_of_a_video_are_one_cluster():
    frames = '{"frames":["/d/a/1.jpg","/d/a/2.jpg"],"fps":3}'
    videos = ["v.mp4", "v.mp4#t=1,2", "w.mp4", frames, f"{frames}#t=0,1"]
    judged = [
        judge(i, question(i, videos=(video,)), Reply("A"), BENCHMARKS["mvbench"]) for i, video in enumerate(videos)
    ]
    assert [answer.cluster for answer in judged] == ["v.mp4", "v.mp4", "w.mp4", "/d/a/1.jpg", "/d/a/1.jpg"]
    assert score(judged, BENCHMARKS["videomme"]).accuracy.clusters == 3


def test_difference_is_paired():
    first, second = answers(["A", "A", "B", None]), answers(["A", "B", "B", "A"])
    estimate = compare(first, second, BENCHMARKS["videomme"])
    assert estimate.value == pytest.approx(0.0)
    assert estimate.count == 4


def test_scorer_decides_about_open_answers():
    def same_first_word(question, expected, answer):
        return expected.split()[0] == answer.split()[0]

    judged = [
        judge(i, question(i, answer="a dog"), Reply(text), MANIFEST, same_first_word)
        for i, text in enumerate(["a cat", "b"])
    ]
    assert [answer.right for answer in judged] == [True, False]


@pytest.mark.parametrize("name", ["nowhere.at_all:f", "json:nothing", "json:__doc__"])
def test_scorer_that_does_not_exist_is_refused(name):
    with pytest.raises(BadConfig, match=f"--scorer {name}"):
        load_scorer(name)
