import json

import pytest

from crosslmm.data.manifest import Manifest
from crosslmm.inference.answerer import score
from tests.support.common import conversation


def write_manifest(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return Manifest(str(path))


def test_score_counts_exact_matches_by_kind(tmp_path):
    rows = [
        {"id": "a", "video": "a.mp4", "messages": conversation("Which colour?", "red"), "kind": "colour"},
        {"id": "b", "video": "b.mp4", "messages": conversation("Which colour?", "blue"), "kind": "colour"},
        {"id": "c", "video": "c.mp4", "messages": conversation("Which shape?", "red")},
        {"id": "no video", "messages": conversation("What?", "red", video=False)},
    ]
    batches = []

    def predict(videos, questions):
        batches.append(len(videos))
        return [("red", None)] * len(questions)

    result = score(predict, write_manifest(tmp_path / "rows.jsonl", rows), batch_size=2)
    assert batches == [2, 1]
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.accuracy_by_kind == {"colour": 0.5}
    assert result.predictions[1] == (f"{tmp_path}/b.mp4", "Which colour?", "red", "blue")


def test_a_kind_is_not_mixed_up_with_rows_without_one(tmp_path):
    rows = [
        {
            "id": f"kind {kind}",
            "video": "a.mp4",
            "messages": conversation("What?", "red" if kind else "blue"),
            "kind": kind,
        }
        for kind in ("all", "", None)
    ]
    result = score(
        lambda videos, questions: [("red", None)] * len(videos), write_manifest(tmp_path / "rows.jsonl", rows)
    )
    assert result.accuracy_by_kind == {"": 0.0, "all": 1.0}
    assert result.accuracy == pytest.approx(1 / 3)


def test_score_refuses_a_manifest_without_videos(tmp_path):
    rows = [{"id": "a", "messages": conversation("What?", "red", video=False)}]
    with pytest.raises(ValueError, match="no row has exactly one video"):
        score(lambda videos, questions: [], write_manifest(tmp_path / "rows.jsonl", rows))


def test_score_leaves_out_rows_with_an_error(tmp_path, caplog):
    rows = [{"id": f"{i}", "video": f"{i}.mp4", "messages": conversation("?", "red")} for i in range(4)]
    manifest = write_manifest(tmp_path / "rows.jsonl", rows)
    results = [("red", None), (None, "gone"), ("blue", None), (None, "gone")]
    result = score(lambda videos, questions: results, manifest)
    assert (result.accuracy, result.accuracy_by_kind) == (0.5, {})
    assert [answer for _, _, answer, _ in result.predictions] == ["red", None, "blue", None]
    assert "2 of 4 rows could not be answered and do not count; '1': gone" in caplog.text
    with pytest.raises(ValueError, match=r"rows\.jsonl: no row could be answered; '0': gone"):
        score(lambda videos, questions: [(None, "gone")] * 4, manifest)
