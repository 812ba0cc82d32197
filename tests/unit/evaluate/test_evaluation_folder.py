"""The folder of an evaluation has each reply once; what is damaged is asked again."""

import numpy as np
import pytest

from crosslmm.config import BadConfig
from crosslmm.evaluate.asking.blocks import VideoRows, block_sizes, layout, videos_per_block
from crosslmm.evaluate.evaluation_folder import EvaluationFolder
from crosslmm.evaluate.questions.question import Question, about
from crosslmm.evaluate.scores.judging import Reply

IDENTITY = {"model": "models:/crosslmm/1", "num_frames": 4}


@pytest.fixture
def folder(tmp_path):
    return EvaluationFolder(str(tmp_path), "videomme-1")


def replies(*numbers: int) -> list[tuple[int, Reply]]:
    return [(n, Reply(f"answer {n}", times=[[0.0, 0.5]], prompt_tokens=9, seconds=0.1)) for n in numbers]


def test_second_start_finds_what_the_first_has_begun(folder):
    begun = folder.begin(IDENTITY, 8)
    assert folder.begin(IDENTITY, 16) == begun  # blocks keep their size
    with pytest.raises(BadConfig, match=r"--name videomme-1: .* num_frames 4, and this is 8; give another --name"):
        folder.begin(IDENTITY | {"num_frames": 8}, 8)


def test_finished_blocks_are_read_back(folder):
    folder.write_block(0, replies(0, 1), {"0": b"jpeg"})
    folder.write_block(2, replies(4), {})
    assert folder.done([2, 2, 1]) == {0: replies(0, 1), 2: replies(4)}
    assert list(folder.strips()) == [{"0": "anBlZw=="}, {}]


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]\n[]\n", b'{"number": 0}\n', b'{"number": 0, "x": 1}\n{"number": 1}\n']
)
def test_damaged_block_is_asked_again(folder, tmp_path, damage):
    folder.write_block(0, replies(0, 1), {"0": b"jpeg"})
    folder.write_block(1, replies(2, 3), {})
    (tmp_path / "evaluations" / "videomme-1" / "blocks" / "000000.jsonl").write_bytes(damage)
    assert folder.done([2, 2]) == {1: replies(2, 3)}


def test_block_with_a_row_twice_is_asked_again(folder):
    folder.write_block(0, replies(1, 1), {})
    assert folder.done([2]) == {}


def test_other_files_among_the_blocks_are_ignored(folder, tmp_path):
    folder.write_block(0, replies(0), {})
    blocks = tmp_path / "evaluations" / "videomme-1" / "blocks"
    (blocks / "000000.jsonl.1a2b3c4d.part").write_text("half")
    (blocks / "000009.jsonl").write_text("{}")
    assert folder.done([1]) == {0: replies(0)}


def questions(*videos: str | None) -> list[Question]:
    asked = []
    for i, video in enumerate(videos):
        fields = about(video, "?") if video else {"videos": (), "messages": [{"role": "user", "content": "?"}]}
        asked.append(Question(str(i), answer="A", **fields))
    return asked


def test_questions_about_a_video_are_in_one_block():
    rows = VideoRows(questions("a", "b", "a", None, "c", None, "b"), "m.jsonl", ["/d"])
    assert rows.groups == [[0, 2], [1, 6], [3], [4], [5]]
    assert block_sizes(rows, 2) == [4, 2, 1]
    assert [row["videos"] for row in rows.take(np.array([1, 2]))] == [["b"], []]


def test_rows_that_cannot_be_asked_are_in_no_block():
    asked = questions("a", "b")
    asked[0] = Question("0", (), [{"role": "user", "content": ""}], "", error="row 1: has no option")
    assert VideoRows(asked, "m.jsonl", ["/d"]).groups == [[1]]


def test_pending_blocks_keep_their_positions():
    rows = VideoRows(questions(*"abcdefg"), "m.jsonl", ["/d"])
    pending = layout(rows, 3, [0, 2])
    assert pending.num_blocks == 2
    assert [pending.positions(i).tolist() for i in range(2)] == [[0, 1, 2], [6, 7, 8]]
    index, weight = pending.sampler.rows_at(pending.positions(1))
    assert weight.tolist() == [1, 0, 0]
    assert index[0] == 6


def test_blocks_hold_as_many_frames_as_memory_allows(config):
    data = config.data.model_copy(update={"num_frames": 64})
    assert videos_per_block(data, 384) == 4
    assert videos_per_block(data.model_copy(update={"num_frames": 10_000}), 384) == 1
    assert videos_per_block(config.data, 48) == 32
