"""The questions that are read from the benchmarks' folders."""

import json
import re

import numpy as np
import pytest

from crosslmm.evaluate.benchmarks import BENCHMARKS
from crosslmm.evaluate.questions.folder import Folder
from crosslmm.evaluate.questions.question import BadBenchmark, conversation
from tests.support.benchmark_folders import FOLDERS, ROWS, write_json, write_parquet

TIMES = np.arange(4) / 4


def read(name, folder):
    FOLDERS[name](folder)
    return BENCHMARKS[name].read(Folder(str(folder)))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_row_becomes_a_question_with_a_file(name, tmp_path):
    questions = read(name, tmp_path)
    assert len(questions) == ROWS
    assert len({question.id for question in questions}) == ROWS
    for question in questions:
        assert question.error is None
        (video,) = question.videos
        assert video.startswith(("{", str(tmp_path)))
        assert question.answer in question.choices or not question.choices
        assert question.messages[0]["content"][0] == {"type": "video"}


def text_of(messages, frames) -> str:
    """Return a message as text, with a mark for each frame."""
    runs = iter(frames)
    content = messages[-1]["content"]
    return "".join("".join("F" for _ in next(runs)) if p["type"] == "video" else p["text"] for p in content)


def test_spoken_lines_at_the_frames_are_listed(tmp_path):
    questions = read("videomme_w_subtitle", tmp_path)
    text = text_of(*conversation(questions[0], [TIMES]))
    assert text.startswith(
        "FFFFThis video's subtitles are listed below: \nHello 0\nfirst line\nund Umlaute: äöü\nSelect the best answer"
    )
    assert text.endswith("\nThe best answer is:")
    assert text_of(*conversation(questions[9], [TIMES])).startswith(
        "FFFFThis video's subtitles are listed below: \nNo subtitles available\nSelect"
    )


def test_subtitles_stand_between_the_frames(tmp_path):
    questions = read("longvideobench_val_i", tmp_path)
    assert text_of(*conversation(questions[0], [TIMES])).startswith("FFF\none\nF\nAt which moment, 0?\nA. The")
    assert text_of(*conversation(questions[2], [TIMES])).startswith(
        # The third one's end is the video's duration, as lmms-eval has it, and so it comes early.
        "FF\none\ntwo, short\nthree, without an end\nFF\nAt which moment, 2?\nA. The"
    )


def test_part_of_a_whole_video_is_asked_about(tmp_path):
    questions = {question.id: question for question in read("mvbench", tmp_path)}
    assert (
        questions["object_interaction/0"].videos[0].endswith("Charades_v1_480/object_interaction_0.mp4#t=0.250,0.750")
    )
    assert questions["action_antonym/0"].videos[0].endswith("ssv2_video_mp4/action_antonym_0.mp4")


def test_images_in_a_folder_are_a_video(tmp_path):
    questions = {question.id: question for question in read("mvbench", tmp_path)}
    address, part = questions["episodic_reasoning/1"].videos[0].rsplit("#", 1)
    listed = json.loads(address)
    assert part == "t=0.500,2.000"
    assert listed["fps"] == 3.0
    assert [name.rsplit("/", 1)[1] for name in listed["frames"]] == [f"{i:05d}.jpg" for i in range(1, 9)]


def test_digest_covers_tables_and_subtitles(tmp_path):
    def digest() -> str:
        folder = Folder(str(tmp_path))
        BENCHMARKS["videomme_w_subtitle"].read(folder)
        return folder.digest

    FOLDERS["videomme_w_subtitle"](tmp_path)
    before = digest()
    assert digest() == before
    (tmp_path / "subtitle" / "v5.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nother")
    assert digest() != before


WRONG_FOLDERS = {
    "videomme": "videomme/test-*.parquet",
    "mvbench": "json/TASK.json",
    "mlvu_dev": "test-*.parquet",
    "longvideobench_val_v": "lvb_val.json",
    "egoschema_subset": "Subset/test-*.parquet",
    "tempcompass": "caption_matching/test-*.parquet",
    "vnbench": "VNBench-main-4try.json",
}


@pytest.mark.parametrize("name", WRONG_FOLDERS)
def test_wrong_folder_names_the_file_and_the_place(name, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(BadBenchmark, match=re.escape(WRONG_FOLDERS[name])) as error:
        BENCHMARKS[name].read(Folder(str(tmp_path)))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(BadBenchmark, match="there is no such folder"):
        Folder(str(tmp_path / "none"))


def test_another_table_is_refused_by_its_columns(tmp_path):
    write_parquet(tmp_path / "Subset" / "test-0.parquet", [{"question": "?", "video_idx": "1"}])
    with pytest.raises(BadBenchmark, match="no column option; it has question, video_idx"):
        BENCHMARKS["egoschema_subset"].read(Folder(str(tmp_path)))


def test_damaged_rows_cost_themselves_alone(tmp_path):
    rows = FOLDERS["egoschema_subset"](tmp_path)
    rows[0] |= {"answer": "7"}
    rows[1] |= {"answer": "the first"}
    rows[2] |= {"option": None}
    rows[3] |= {"video_idx": "../../etc/passwd"}
    write_parquet(tmp_path / "Subset" / "test-00000-of-00001.parquet", rows)
    questions = BENCHMARKS["egoschema_subset"].read(Folder(str(tmp_path)))
    assert [question.error is None for question in questions[:5]] == [False] * 4 + [True]
    assert questions[0].error == "row 1: its answer is option 7, and it has options 0 to 4"
    assert "row 3: has no option" in questions[2].error
    assert "lies outside" in questions[3].error


@pytest.mark.parametrize(
    "row",
    [
        [],
        {"video": 3, "question": {"a": 1}, "candidates": ["x"], "answer": "x"},
        {"video": "a", "question": "?", "candidates": "xy", "answer": "x"},
        {"video": "a\ud800", "question": "?", "candidates": ["x"], "answer": "x"},
        {"video": "a", "question": "?", "candidates": ["x"], "answer": "y"},
        {"video": "/etc/passwd", "question": "?", "candidates": ["x"], "answer": "x"},
        {"video": "https://example.org/x.mp4", "question": "?", "candidates": ["x"], "answer": "x"},
        {"video": "a", "question": "?", "candidates": ["x"] * 27, "answer": "x"},
    ],
)
def test_hostile_rows_are_refused_or_left_out(row, tmp_path):
    good = {"video": "a.mp4", "question": "?", "candidates": ["x", "y"], "answer": "y"}
    write_json(tmp_path / "json" / "action_antonym.json", [good, row])
    try:
        questions = BENCHMARKS["mvbench"].read(Folder(str(tmp_path)))
    except BadBenchmark as error:
        refused = str(error)
        questions = []
    else:
        refused = questions[1].error or ""
        assert questions[0].error is None
        assert refused or questions[1].videos[0].startswith(f"{tmp_path}/")
    assert "\n" not in refused
    refused.encode()
