"""Files that somebody else wrote name nothing outside of their folder, and cost no more than their size."""

import json
import os
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from crosslmm import storage
from crosslmm.config import BadConfig, DataConfig
from crosslmm.data import manifest_shards
from crosslmm.data.feature_cache import (
    BadFeatures,
    FeatureCache,
    IndexEntry,
    create_feature_folder,
    write_index,
    write_shard,
)
from crosslmm.data.feature_format import FeatureRecipe
from crosslmm.data.frame_sampling import FrameSampling
from crosslmm.data.manifest import BadManifest, Manifest
from crosslmm.data.rows.values import MAX_ROW_BYTES
from crosslmm.encode.recorder import EncodingRecorder
from tests.support.common import conversation

LEADING_OUT = ["/etc/passwd", "../secret/file", "x/../../secret/file", "..", "", ".", "C:/x"]


def sidecar(text="Red."):
    return json.dumps({"messages": conversation("What?", text)})


@pytest.fixture
def folder(tmp_path):
    """A folder with one video and its sidecar; beside it, a secret that looks like a sidecar."""
    for name, content in {"data/a.mp4": "video", "data/a.json": sidecar(), "secret/b.json": sidecar("secret")}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path / "data"


def test_a_sidecar_that_links_out_is_refused(folder, tmp_path):
    (folder / "b.mp4").write_text("video")
    (folder / "b.json").symlink_to("../secret/b.json")
    says = r"data: cannot be read: .*b\.json': a link leads out of its folder; .*, or add its target to --data\.roots"
    with pytest.raises(BadManifest, match=says):
        Manifest(str(folder))
    assert len(Manifest(str(folder), [f"{tmp_path}/secret"])) == 2
    (folder / "b.json").unlink()
    (folder / "b.json").symlink_to("a.json")
    assert len(Manifest(str(folder))) == 2


def test_a_folder_of_videos_that_links_out_is_refused(folder, tmp_path):
    (tmp_path / "secret/b.mp4").write_text("video")
    (folder / "more").symlink_to("../secret")
    with pytest.raises(BadManifest, match=r"more': a link leads out of its folder"):
        Manifest(str(folder))
    assert [row["id"] for row in Manifest(str(folder), [f"{tmp_path}/secret"]).rows] == ["a", "more/b"]


@pytest.mark.timeout(20)
def test_a_sidecar_that_is_a_pipe_is_refused(folder):
    (folder / "b.mp4").write_text("video")
    os.mkfifo(folder / "b.json")
    with pytest.raises(BadManifest, match=r"b\.json': is neither a file nor a folder"):
        Manifest(str(folder))


@pytest.mark.parametrize("text", ["[" * 100_000, "x" * (MAX_ROW_BYTES + 1)])
def test_a_sidecar_too_deep_or_too_large_is_refused(folder, text):
    (folder / "a.json").write_text(text)
    with pytest.raises(BadManifest, match=r"a\.json: Invalid JSON: (nested too deep|.* has more than \d+ bytes)"):
        Manifest(str(folder))


def test_a_line_that_is_too_long_is_named(tmp_path):
    rows = [{"id": f"{i}", "messages": conversation("?", "!" * n, video=False)} for i, n in enumerate([9, 10**7, 9])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BadManifest, match=r"rows\.jsonl: line 2: has 10000\d+ bytes, of at most 4194304$"):
        Manifest(str(tmp_path / "rows.jsonl"))


ROWS_OF_MANY_VALUES = {
    "keys": {f"k{i}": 0 for i in range(300_000)},
    "messages": {"id": "a", "messages": [[]] * 1_000_000},
    "parts": {"id": "a", "messages": [{"role": "user", "content": [0] * 1000}] * 1300},
    "text": {"id": "a", "messages": json.dumps([0] * 1_000_000)},
    "images": {"image": ["a"] * 200_000, "conversations": [{"from": "human", "value": "<image>" * 200_000}]},
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("name", "as_list"), [*((name, False) for name in ROWS_OF_MANY_VALUES), ("parts", True)])
def test_a_row_with_too_many_values_costs_little(tmp_path, name, as_list):
    row = ROWS_OF_MANY_VALUES[name]
    path = tmp_path / ("rows.json" if as_list else "rows.jsonl")
    path.write_text(json.dumps([row] if as_list else row, separators=(",", ":")))
    assert path.stat().st_size <= MAX_ROW_BYTES
    tracemalloc.start()
    try:
        with pytest.raises(BadManifest, match=r"line 1: (messages: )?has more than 10000 values"):
            Manifest(str(path))
        assert tracemalloc.get_traced_memory()[1] < 300e6
    finally:
        tracemalloc.stop()


@pytest.mark.timeout(60)
def test_a_text_of_many_placeholders_costs_little(tmp_path):
    turns = [{"from": "human", "value": "<image>" * 500_000}, {"from": "gpt", "value": "!"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": ["a"] * 3000, "conversations": turns}))
    with pytest.raises(BadManifest, match="line 1: has more than 10000 placeholders"):
        Manifest(str(tmp_path / "rows.jsonl"))


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    remedies = {"rows.json": "one a line, as one .jsonl, and convert it", "rows.jsonl": "GB; convert it"}
    for name, remedy in remedies.items():
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**43)
        with pytest.raises(BadManifest, match=rf"has 8796.1 GB; .*{remedy[-10:]}"):
            Manifest(str(tmp_path / name))


# Prepared manifests


@pytest.fixture
def prepared(tmp_path):
    """A prepared manifest of three rows; beside it, another one with secrets."""

    def write(folder, texts):
        rows = [
            {"id": f"{i}", "videos": ["a.mp4"], "messages": json.dumps(conversation("?", text)), "kind": None,
             "line": i + 1, "chars": 2, "seconds": [1.0]}
            for i, text in enumerate(texts)
        ]  # fmt: skip
        table = pa.Table.from_pylist(rows, manifest_shards.SCHEMA)
        manifest_shards.seal(folder, [manifest_shards.write_part(folder, 0, table)], table, {})

    write(str(tmp_path / "secret"), ["x", "y", "z"])
    write(str(tmp_path / "prepared"), ["a", "b", "c"])
    return tmp_path / "prepared"


def reseal(folder, change):
    path = folder / manifest_shards.SEAL
    seal = json.loads(path.read_text())
    change(seal)
    path.write_text(json.dumps(seal))


@pytest.mark.parametrize("name", [*LEADING_OUT, "../secret/part-00000.parquet"])
@pytest.mark.parametrize("key", ["part", "lengths", "waiting", "probes"])
def test_a_seal_names_files_of_its_folder_only(prepared, name, key):
    def change(seal):
        if key == "part":
            seal["parts"][0]["name"] = name
        elif key == "lengths":
            seal["lengths"] = name
        else:
            seal["about"][key] = ["part-00000.parquet", name]

    reseal(prepared, change)
    says = r"prepared: cannot be read: BadSeal: _prepared\.json cannot be used: .* is not a name .*; convert the manif"
    with pytest.raises(BadManifest, match=says):
        Manifest(str(prepared))


@pytest.mark.parametrize("scheme", ["file://{tmp_path}/secret/part-00000.parquet", "s3://other/part-00000.parquet"])
def test_a_scheme_in_a_seal_is_text(prepared, tmp_path, scheme):
    reseal(prepared, lambda seal: seal["parts"][0].update(name=scheme.format(tmp_path=tmp_path)))
    with pytest.raises(BadManifest, match=r"FileNotFoundError: .*/prepared/(file|s3):/"):
        Manifest(str(prepared))


@pytest.mark.parametrize("name", ["part-00000.parquet", "_prepared.json"])
def test_files_of_a_prepared_manifest_that_link_out_are_refused(prepared, tmp_path, name):
    (prepared / name).unlink()
    (prepared / name).symlink_to(f"../secret/{name}")
    with pytest.raises(BadManifest, match=rf"{name}': a link leads out of its folder"):
        Manifest(str(prepared))
    assert len(Manifest(str(prepared), [f"{tmp_path}/secret"])) == 3


def test_lengths_that_link_out_are_refused(prepared):
    manifest = Manifest(str(prepared))
    (lengths,) = prepared.glob("lengths-*")
    lengths.unlink()
    lengths.symlink_to("/etc/passwd")
    with pytest.raises(BadManifest, match="a link leads out"):
        manifest.estimate_tokens(FrameSampling(4), 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda seal: seal.clear(), "rows: Field required"),
        (lambda seal: seal.update(rows=10**12), r"its parts do not have 1000000000000 rows"),
        (lambda seal: seal.update(rows=-3), "rows: Input should be greater"),
        (lambda seal: seal.update(rows=4) or seal["parts"][0].update(rows=4), r"has other rows than the seal says"),
        (lambda seal: seal.update(group_rows=0), "group_rows: Input should be greater"),
        (lambda seal: seal.update(group_rows=1), "has other rows than the seal says"),
        (lambda seal: seal.update(parts={}), "parts: Input should be a valid list"),
        (lambda seal: seal.update(about=[]), "about: "),
        (lambda seal: seal["parts"][0].update(bytes=3), "BadParquet"),
        (lambda seal: seal["parts"][0].update(bytes=10**12), "BadParquet"),
        (lambda seal: seal["parts"][0].update(footer=1), "BadParquet"),
        (lambda seal: seal.update(x="x" * 2**24), r"_prepared\.json'?: has more than"),
    ],
)
def test_a_seal_that_lies_is_refused(prepared, change, reason):
    reseal(prepared, change)
    with pytest.raises(BadManifest, match=reason) as raised:
        Manifest(str(prepared))
    assert "\n" not in str(raised.value)


def test_a_part_that_is_lost_or_damaged_later_ends_with_its_name(prepared):
    manifest = Manifest(str(prepared))
    part = prepared / "part-00000.parquet"
    data = part.read_bytes()
    for content in (data[:100], bytes(len(data)), bytes(600) + data[600:]):
        part.write_bytes(content)
        for read in (lambda: list(manifest.videos()), lambda: Manifest(str(prepared)).take([2])):
            with pytest.raises(BadManifest, match=r"prepared: cannot be read: BadParquet: "):
                read()
    part.unlink()
    with pytest.raises(BadManifest, match=r"FileNotFoundError: .*part-00000"):
        manifest.take([0])


@pytest.mark.parametrize("column", ["id", "videos", "messages", "line", "missing", "typed", "element"])
def test_a_part_with_other_columns_is_refused(tmp_path, column):
    rows = {"id": "a", "videos": ["a.mp4"], "messages": "[]", "kind": None, "line": 1, "chars": 2, "seconds": [1.0]}
    table = pa.Table.from_pylist([rows | {column: None}], manifest_shards.SCHEMA)
    folder = str(tmp_path / "prepared")
    part = manifest_shards.write_part(folder, 0, table)
    if column in ("missing", "typed", "element"):
        table = {
            "missing": table.drop_columns("messages"),
            "typed": table.set_column(1, "videos", pa.array([{"a": 1}])),
            "element": table.set_column(1, "videos", pa.array([["a.mp4", None]])),
        }[column]
        data = manifest_shards.to_bytes(table)
        storage.write_bytes(f"{folder}/part-00000.parquet", data)
        part |= {"bytes": len(data), "footer": int.from_bytes(data[-8:-4], "little") + 8}
    manifest_shards.seal(folder, [part], pa.Table.from_pylist([rows], manifest_shards.SCHEMA), {})
    with pytest.raises(BadManifest, match="prepared: cannot be read: BadParquet: "):
        Manifest(folder)


# Features


@pytest.fixture
def features(tmp_path):
    """(folder, URI, entry) of the features of one video; beside the folder, a secret of the same size."""
    video = tmp_path / "a.mp4"
    video.write_bytes(b"video")
    recipe = FeatureRecipe.from_config(DataConfig(num_frames=2), 48, "fp32", 6, 8, "e" * 64, "bf16")
    folder = create_feature_folder(str(tmp_path / "features"), recipe)
    x_FPD = np.zeros((2, 6, 8), np.float32)
    ((entry,), _, _) = write_shard(folder, [(str(video), storage.version(str(video)), x_FPD, [0.0, 1.5])], "bf16")
    (tmp_path / "secret").write_bytes(bytes(entry.size))
    return folder, str(video), entry


@pytest.mark.parametrize("shard", [*LEADING_OUT, "../../secret"])
def test_an_index_names_shards_of_its_folder_only(features, shard):
    folder, _, entry = features
    write_index(folder, [IndexEntry(**vars(entry) | {"shard": shard})])
    with pytest.raises(
        BadConfig, match=r"data\.features: .*is not a name inside .*; give the folder that jobs/encode\.py"
    ):
        FeatureCache(folder)


@pytest.mark.parametrize("shard", ["file:///etc/passwd", "s3://other/x"])
def test_a_scheme_in_an_index_is_text(features, shard):
    folder, video, entry = features
    write_index(folder, [IndexEntry(**vars(entry) | {"shard": shard})])
    with pytest.raises(BadFeatures, match=r"its features are lost: .* is missing; run python jobs/encode\.py"):
        FeatureCache(folder).read(video)


def test_features_that_link_out_are_refused(features, tmp_path):
    folder, video, entry = features
    write_index(folder, [entry])
    assert FeatureCache(folder).read(video).images.shape == (2, 6, 8)
    shard = tmp_path / "features" / folder.rpartition("/")[2] / entry.shard
    shard.unlink()
    shard.symlink_to(tmp_path / "secret")
    with pytest.raises(BadFeatures, match=r"its features cannot be read: .*a link leads out of its folder"):
        FeatureCache(folder).read(video)
    for name in ("index-9.parquet", "features.json"):
        path = shard.with_name(name)
        path.unlink(missing_ok=True)
        path.symlink_to(tmp_path / "secret")
        with pytest.raises(BadConfig, match=rf"{name}': a link leads out of its folder"):
            FeatureCache(folder)
        path.unlink()


@pytest.mark.parametrize(
    "change",
    [{"size": 2**45}, {"frames": 2**30}, {"frames": -1}, {"frames": 0}, {"offset": -8}, {"offset": 2**62},
     {"shard": None}, {"sha256": None}, {"frames": 1, "size": 96, "offset": 500}, {"times": None}, {"times": [0.0]},
     {"times": [0.0, None]}, {"times": [0.0, np.inf]}, {"times": [-1.0, 0.0]}],
)  # fmt: skip
def test_an_entry_that_lies_costs_nothing(features, change):
    folder, video, entry = features
    write_index(folder, [IndexEntry(**vars(entry) | change)])
    says = r"a\.mp4: its (entry in the index is damaged|features are damaged|features cannot be read).*jobs/encode"
    with pytest.raises(BadFeatures, match=says):
        FeatureCache(folder).read(video)


@pytest.mark.parametrize("change", [{"uri": None}, {"frames": None}, {"offset": None}, {"attempts": None}])
def test_an_index_with_holes_is_refused(features, change):
    folder, _, entry = features
    write_index(folder, [entry, IndexEntry(**vars(entry) | change)])
    with pytest.raises(BadConfig, match=r"index-\d.* has no (uri|frames|offset|attempts) in some row"):
        FeatureCache(folder)


def test_a_reason_in_an_index_is_printable(features):
    folder, video, entry = features
    change = {"reason": "\x1b[2J\n", "stage": "nonsense", "frames": 0, "shard": None}
    write_index(folder, [IndexEntry(**vars(entry) | change)])
    failure = FeatureCache(folder).read(video)
    assert (failure.reason, failure.stage) == ("\\x1b[2J\\n", "decode")


@pytest.mark.parametrize("line", ["{", "[]", '{"uri": 3}', "[" * 100_000, "{}"])
def test_a_damaged_ledger_of_features_is_named(features, line):
    folder, _, _ = features
    good = {"manifest": "m", "line": 1, "id": "a", "uri": "b", "version": None, "stage": "read", "reason": "c"}
    lines = [json.dumps(good | {"attempts": 1}), line]
    storage.write_bytes(f"{folder}/quarantine.jsonl", "\n".join(lines).encode())
    with pytest.raises(BadConfig, match=r"line 2 of quarantine\.jsonl cannot be used: .*; remove it"):
        EncodingRecorder(folder, {}, DataConfig())


def test_a_ledger_of_features_that_links_out_is_refused(features, tmp_path):
    folder, _, _ = features
    (tmp_path / "ledger").write_text("")
    (tmp_path / "features" / folder.rpartition("/")[2] / "quarantine.jsonl").symlink_to(tmp_path / "ledger")
    with pytest.raises(BadConfig, match="a link leads out of its folder"):
        EncodingRecorder(folder, {}, DataConfig())
