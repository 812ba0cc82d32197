import json
import pickle

import numpy as np
import pyarrow as pa
import pytest

from crosslmm import storage
from crosslmm.data import manifest_shards
from crosslmm.data.frame_sampling import FrameSampling
from crosslmm.data.manifest import BadManifest, Manifest, Rows
from crosslmm.data.manifest_shards import SCHEMA
from crosslmm.data.row_schema import parse_rows
from tests.support.common import conversation

COUNT = 1300


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared manifest: three parts of several row groups, of which the last ones are shorter."""
    folder = str(tmp_path_factory.mktemp("prepared") / "train")
    tables = [
        pa.Table.from_pylist(rows, SCHEMA) for rows in (records(0, 600), records(600, 1250), records(1250, COUNT))
    ]
    parts = [manifest_shards.write_part(folder, number, table) for number, table in enumerate(tables)]
    assert not manifest_shards.is_prepared(folder)
    manifest_shards.seal(
        folder, parts, pa.concat_tables(tables).select(manifest_shards.LENGTH_COLUMNS), {"made_from": "rows.jsonl"}
    )
    return folder


def records(start, end):
    lines = []
    for i in range(start, end):
        video = f"clips/{i}.mp4" if i % 2 else f"/elsewhere/{i}.mp4"
        lines.append((i + 1, json.dumps({"id": f"row {i}", "video": video, "messages": conversation("What?", str(i))})))
    rows, malformed = parse_rows(lines, ["", "/elsewhere"])
    assert not malformed
    return rows


def test_rows_are_read_in_any_order_across_groups_and_parts(folder):
    manifest = Manifest(folder, ["/elsewhere"])
    assert len(manifest) == COUNT
    wanted = np.random.default_rng(0).permutation(COUNT)[:200]
    rows = manifest.take(wanted)
    assert [row["id"] for row in rows] == [f"row {i}" for i in wanted]
    assert [row["line"] for row in rows] == [i + 1 for i in wanted]
    assert [row["messages"][1]["content"] for row in rows] == [str(i) for i in wanted]
    assert {row["manifest"] for row in rows} == {folder}
    uris = [f"{folder}/clips/{i}.mp4" if i % 2 else f"/elsewhere/{i}.mp4" for i in wanted]
    assert [row["videos"] for row in rows] == [[uri] for uri in uris]


def test_reading_a_row_fetches_its_row_group_only(folder, monkeypatch):
    manifest, requests = Manifest(folder, ["/elsewhere"]), []
    read = storage.read_bytes

    def counting(uri, start=None, end=None):
        requests.append((uri, end - start))
        return read(uri, start, end)

    manifest.take([0])
    monkeypatch.setattr(storage, "read_bytes", counting)
    manifest.take([3, 5, 511, 4])
    ((uri, size),) = requests
    file_size = len(read(uri))
    assert size < file_size * 512 / 600 * 1.1


def test_pickle_does_not_contain_the_rows(folder):
    manifest = Manifest(folder, ["/elsewhere"])
    manifest.take([0, 700])
    pickled = pickle.dumps(manifest)
    assert len(pickled) < 2000
    assert pickle.loads(pickled).take([1299])[0]["id"] == "row 1299"


def test_digest_depends_on_the_content_only(folder, tmp_path):
    tables = [pa.Table.from_pylist(records(0, 5), SCHEMA), pa.Table.from_pylist(records(1, 6), SCHEMA)]
    digests = []
    for number, table in enumerate([tables[0], tables[0], tables[1]]):
        target = str(tmp_path / str(number))
        manifest_shards.seal(target, [manifest_shards.write_part(target, 0, table)], table, {})
        digests.append(Manifest(target, ["/elsewhere"]).digest)
    assert digests[0] == digests[1] != digests[2]


def test_folder_without_seal_is_refused(tmp_path):
    manifest_shards.write_part(str(tmp_path), 0, pa.Table.from_pylist(records(0, 5), SCHEMA))
    with pytest.raises(BadManifest, match="is a conversion that has not finished"):
        Manifest(str(tmp_path))


def test_rows_of_several_manifests_are_numbered_consecutively(folder, tmp_path):
    rows = [{"id": name, "messages": conversation("?", name, video=False)} for name in "abc"]
    (tmp_path / "three.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = Rows([Manifest(str(tmp_path / "three.jsonl")), Manifest(folder, ["/elsewhere"])])
    numbers = np.array([4, 0, 3, 1302, 2, 4])
    assert [row["id"] for row in both.take(numbers)] == ["row 1", "a", "row 0", "row 1299", "c", "row 1"]


def test_a_manifest_with_too_many_rows_must_be_prepared(tmp_path):
    lines = [json.dumps({"id": f"{i}", "messages": conversation("?", "!", video=False)}) for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:3]))
    assert len(Manifest(str(tmp_path / "rows.jsonl"), max_rows=3)) == 3
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(BadManifest, match=r"rows.jsonl: .*more than 3 rows.*jobs/prepare.py convert"):
        Manifest(str(tmp_path / "rows.jsonl"), max_rows=3)


def test_tokens_are_estimated_without_opening_videos(tmp_path):
    question = {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "1234"}]}
    rows = [
        {"id": "words", "messages": conversation("12", "1234567890", video=False)},
        {"id": "video", "video": "a.mp4", "messages": conversation("12", "12")},
        {"id": "image", "messages": [question, {"role": "assistant", "content": "1234"}]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    estimates = Manifest(str(tmp_path / "rows.jsonl")).estimate_tokens(FrameSampling(64), 9)
    assert estimates.tolist() == [3, 1 + 64 * 9, 2 + 9]
    rows = [{**record, "seconds": [10.0], "chars": 8} for record in records(0, 2)]
    table = pa.Table.from_pylist([*rows, {**rows[0], "seconds": [None]}, {**rows[0], "seconds": []}], SCHEMA)
    folder = str(tmp_path / "prepared")
    manifest_shards.seal(folder, [manifest_shards.write_part(folder, 0, table)], table, {})
    assert Manifest(folder, ["/elsewhere"]).estimate_tokens(FrameSampling(64, "fps", 2.0), 9).tolist() == [
        2 + 20 * 9
    ] * 2 + [
        2 + 64 * 9,
        2,
    ]
    assert Manifest(folder, ["/elsewhere"]).estimate_tokens(FrameSampling(8, "fps", 2.0), 9)[0] == 2 + 8 * 9


def test_videos_lists_every_video_with_its_row(folder):
    videos = Rows([Manifest(folder, ["/elsewhere"])]).videos()
    assert len(videos) == COUNT
    assert videos[f"{folder}/clips/1299.mp4"].row == 1299
    assert videos["/elsewhere/700.mp4"].row == 700
