"""Every benchmark beside lmms-eval's own functions: the same prompts, files, extracted answers and scores.

What differs on purpose: where lmms-eval guesses or asks a model on the net, an answer is unparsable here, and wrong.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crosslmm.evaluate.benchmarks import BENCHMARKS
from crosslmm.evaluate.questions.folder import Folder
from crosslmm.evaluate.questions.question import conversation
from crosslmm.evaluate.scores.judging import Reply, judge, score
from tests.support.benchmark_folders import FOLDERS, PREDICTIONS

pytestmark = [pytest.mark.harness, pytest.mark.filterwarnings("ignore")]

UNKNOWN = object()
"""What a task of lmms-eval says where it has no answer of its own."""
CACHE = {
    "videomme": "videomme", "videomme_w_subtitle": "videomme", "mvbench": "mvbench_video", "mlvu_dev": "mlvu",
    "longvideobench_val_v": "datasets/longvideobench", "longvideobench_val_i": "datasets/longvideobench",
    "lvbench": "lvbench", "perceptiontest_val_mc": "perceptiontest_val", "egoschema_subset": "egoschema",
    "nextqa_mc_test": "nextqa", "tempcompass": "tempcompass",
}  # fmt: skip
"""Folder of each benchmark below HF_HOME. VNBench has no task in lmms-eval."""


def tasks(name: str) -> Any:
    return importlib.import_module(f"lmms_eval.tasks.{name}.utils")


@dataclass
class Theirs:
    """lmms-eval's side of a benchmark."""

    prompt: Callable[[dict], str]
    visual: Callable[[dict], list]
    judge: Callable[[dict, str], Any]
    """Returns what `score` takes."""
    right: Callable[[Any], Any]
    """Whether a judgement is that the answer is right, or UNKNOWN."""
    score: Callable[[list], float]
    """Accuracy of judgements, 0 to 1."""


def videomme(subtitles: bool) -> Theirs:
    u = tasks("videomme")
    settings = (
        {"frame_num": 8}
        if subtitles
        else {"post_prompt": "\nAnswer with the option's letter from the given choices directly."}
    )
    text = u.videomme_doc_to_text_subtitle if subtitles else u.videomme_doc_to_text
    return Theirs(
        prompt=lambda doc: text(doc, settings),
        visual=u.videomme_doc_to_visual,
        judge=lambda doc, answer: u.videomme_process_results(doc, [answer])["videomme_perception_score"],
        right=lambda result: result["score"] == 1.0,
        score=lambda results: u.videomme_aggregate_results(results) / 100,
    )


def mvbench(task: str) -> Theirs:
    u = tasks("mvbench")
    settings = {"sub_task": task, "post_prompt": "Only give the best option.\n"}
    return Theirs(
        prompt=lambda doc: u.mvbench_doc_to_text(doc, settings),
        visual=lambda doc: u.mvbench_doc_to_visual(doc, settings),
        judge=lambda doc, answer: u.mvbench_process_results(doc, [answer])["mvbench_accuracy"],
        right=lambda result: result["score"] == 1,
        score=lambda results: u.mvbench_aggregate_results(results) / 100,
    )


def mlvu() -> Theirs:
    u = tasks("mlvu")
    settings = {"pre_prompt": "", "post_prompt": "\nOnly give the best option.\nBest option: ("}
    return Theirs(
        prompt=lambda doc: u.mlvu_doc_to_text(doc, settings),
        visual=u.mlvu_doc_to_visual_dev,
        judge=lambda doc, answer: u.mlvu_process_results(doc, [answer])["mlvu_percetion_score"],
        right=lambda result: result["pred_answer"] == result["answer"],
        score=lambda results: u.mlvu_aggregate_results_dev(results) / 100,
    )


def longvideobench(subtitles: bool) -> Theirs:
    u = tasks("longvideobench")
    u.random = NoGuess
    settings = {
        "pre_prompt": "", "post_prompt": "Answer with the option's letter from the given choices directly.\n",
        "insert_interleave_subtitles": subtitles,
    }  # fmt: skip
    return Theirs(
        prompt=lambda doc: u.longvideobench_doc_to_text(doc, settings),
        visual=u.longvideobench_doc_to_visual_v,
        judge=lambda doc, answer: u.longvideobench_process_results(doc, [answer])["lvb_acc"],
        right=lambda result: UNKNOWN if result["parsed_pred"] is UNKNOWN else result["parsed_pred"] == result["answer"],
        score=u.longvideobench_aggregate_results,
    )


def lvbench() -> Theirs:
    u = tasks("lvbench")
    settings = {"pre_prompt": "", "post_prompt": "\nAnswer the question with the option letter"}
    return Theirs(
        prompt=lambda doc: u.lvbench_doc_to_text(doc, settings),
        visual=u.lvbench_doc_to_visual,
        judge=lambda doc, answer: u.lvbench_process_results(doc, [answer])["lvbench_score"],
        right=bool,
        score=np.mean,
    )


def perceptiontest() -> Theirs:
    u = tasks("perceptiontest.val")
    return Theirs(
        prompt=lambda doc: u.perceptiontest_val_doc_to_text(doc, {"pre_prompt": "", "post_prompt": ""}),
        visual=u.perceptiontest_val_doc_to_visual,
        judge=lambda doc, answer: u.perceptiontest_val_process_results_mc(doc, [answer])["accuracy"],
        right=lambda result: result["correct"] == 1,
        score=lambda results: u.perceptiontest_val_aggregate_accuracy(results, None),
    )


def egoschema() -> Theirs:
    u = tasks("egoschema")
    u.random = NoGuess
    return Theirs(
        prompt=lambda doc: u.egoschema_doc_to_text(doc, {"pre_prompt": "", "post_prompt": ""}),
        visual=u.egoschema_doc_to_visual,
        judge=lambda doc, answer: u.egoschema_process_results_generation(doc, [answer])["score"],
        right=lambda result: UNKNOWN if result["pred"] == -1 else str(result["pred"]) == result["ground_truth"],
        score=lambda results: u.egoschema_aggregate_score(results, None),
    )


def nextqa() -> Theirs:
    u = tasks("nextqa")
    u.random = NoGuess

    def right(doc: dict, answer: str) -> Any:
        index2ans, choices = u.get_multi_choice_info(doc)
        found = u.parse_multi_choice_response(answer, choices, index2ans)
        return UNKNOWN if found is UNKNOWN else u.nextqa_mc_process_results(doc, [answer])["exact_match"]

    return Theirs(
        prompt=u.nextqa_doc_to_text_mc,
        visual=u.nextqa_doc_to_visual,
        judge=right,
        right=lambda result: result,
        score=lambda results: np.mean([result is True for result in results]),
    )


def tempcompass(task: str) -> Theirs:
    u = tasks("tempcompass")
    u.get_eval_result = lambda prompt: (None, UNKNOWN)  # would ask a model on the net
    ending = {"yes_no": "\nPlease answer yes or no:"}.get(task, "\nPlease directly give the best option:")
    name = task.replace("-", "_")
    return Theirs(
        prompt=lambda doc: getattr(u, f"tempcompass_doc_to_text_{name}")(
            doc, {"pre_prompt": "", "post_prompt": {task: ending}}
        ),
        visual=u.tempcompass_doc_to_visual,
        judge=lambda doc, answer: getattr(u, f"tempcompass_process_results_{name}")(doc, [answer])["avg_accuracy"],
        right=lambda result: UNKNOWN if result["rating"] is UNKNOWN else result["rating"] == 1,
        score=lambda results: u.tempcompass_aggregate_rating(results, None) / 100,
    )


class NoGuess:
    """Takes the place of the module `random` in tasks that guess where they find no answer."""

    @staticmethod
    def choice(_: object) -> object:
        return UNKNOWN


@pytest.fixture(scope="module")
def rows():
    """Rows of each benchmark, whose folder is where lmms-eval looks for it: (task within the benchmark, document)."""
    made: dict[str, list[tuple[str, dict]]] = {}
    for name, folder in CACHE.items():
        found = FOLDERS[name](Path(os.environ["HF_HOME"], folder))
        made[name] = [row if isinstance(row, tuple) else ("", row) for row in found]
    return made


def sides(name: str, rows: list[tuple[str, dict]]) -> list[tuple[Theirs, dict, Any]]:
    """Return (their side, document, our question) of each row."""
    make = {
        "videomme": lambda _: videomme(False), "videomme_w_subtitle": lambda _: videomme(True), "mvbench": mvbench,
        "mlvu_dev": lambda _: mlvu(), "longvideobench_val_v": lambda _: longvideobench(False),
        "longvideobench_val_i": lambda _: longvideobench(True), "lvbench": lambda _: lvbench(),
        "perceptiontest_val_mc": lambda _: perceptiontest(), "egoschema_subset": lambda _: egoschema(),
        "nextqa_mc_test": lambda _: nextqa(), "tempcompass": tempcompass,
    }[name]  # fmt: skip
    questions = BENCHMARKS[name].read(Folder(str(Path(os.environ["HF_HOME"], CACHE[name]))))
    if rows[0][0]:
        # Benchmarks of several tasks are read task by task; their documents come in turn.
        order = list(dict.fromkeys(dict(question.groups)["task"] for question in questions))
        rows = sorted(rows, key=lambda row: order.index(row[0]))
    return [(make(task), doc, question) for (task, doc), question in zip(rows, questions, strict=True)]


@pytest.mark.parametrize("name", CACHE)
def test_prompts_are_equal(name, rows):
    for theirs, doc, question in sides(name, rows[name]):
        if name == "videomme_w_subtitle" and not question.videos[0].endswith(".mp4"):
            continue  # lmms-eval loses the subtitles of a video that is not called .mp4
        # The frames that lmms-eval takes of a clip of 8 frames in a second; of LongVideoBench, one a second.
        times = np.arange(1.0) if name == "longvideobench_val_i" else np.arange(8) / 8
        messages, frames = conversation(question, [times])
        runs = iter(frames)
        parts = [
            "\n".join(["<image>"] * len(next(runs))) if part["type"] == "video" else part["text"]
            for part in messages[-1]["content"]
        ]
        if name != "longvideobench_val_i":
            parts = parts[1:]  # without subtitles between them, the frames stand before the text
        assert "".join(parts) == theirs.prompt(doc)


@pytest.mark.parametrize("name", CACHE)
def test_files_are_equal(name, rows):
    for theirs, doc, question in sides(name, rows[name]):
        if "#t=" in question.videos[0]:  # whole videos and images, which lmms-eval 0.7.3 does not read
            continue
        assert theirs.visual(doc) == [question.videos[0]]


@pytest.mark.parametrize("name", CACHE)
def test_judgements_are_equal(name, rows):
    unknown = 0
    for theirs, doc, question in sides(name, rows[name]):
        for answer in PREDICTIONS:
            ours = judge(0, question, Reply(answer), BENCHMARKS[name])
            right = theirs.right(theirs.judge(doc, answer))
            unknown += right is UNKNOWN
            if right is UNKNOWN:
                assert ours.status in ("unparsable", "empty"), answer
            else:
                assert ours.right == bool(right), answer
    guesses = {"longvideobench_val_v", "longvideobench_val_i", "egoschema_subset", "nextqa_mc_test", "tempcompass"}
    assert bool(unknown) == (name in guesses)


@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize("name", CACHE)
def test_scores_are_equal(name, rows, shift):
    results: dict[str, list] = {}
    judged, dropped = [], {}
    for number, (theirs, doc, question) in enumerate(sides(name, rows[name])):
        answer = PREDICTIONS[(number * 7 + shift * 13) % len(PREDICTIONS)]
        task = dict(question.groups).get("task", "") if name in ("mvbench", "tempcompass") else ""
        result = theirs.judge(doc, answer)
        results.setdefault(task, []).append((theirs, result))
        judged.append(judge(number, question, Reply(answer), BENCHMARKS[name]))
        dropped[task] = dropped.get(task, 0) + (name == "mvbench" and answer == "")
    scored = score(judged, BENCHMARKS[name])
    for task, of_task in results.items():
        theirs = of_task[0][0].score([result for _, result in of_task])
        ours = scored.by_group["task"][task] if task else scored.accuracy
        # MVBench's empty answers leave lmms-eval's denominator.
        assert ours.value * ours.count == pytest.approx(theirs * (ours.count - dropped[task]), abs=1e-4 * ours.count)
