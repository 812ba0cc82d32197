"""Damages real data files and reads them, watched: a program for tests/attack/test_fuzz_files.py.

    python -m tests.support.fuzz_files SECONDS SEED FOLDER [KIND ...]

Each case is written into FOLDER/KIND/case and read as a job reads it. The program ends with 1 and a traceback if

- something is raised that is none of the project's errors, or is not one printable line,
- a file outside of the case's folder is opened or listed, a process started, or a host contacted,
- a case takes longer than `CASE_SECONDS`, or all of them together more memory than `MAX_GROWN`.

FOLDER/KIND/case keeps the files of the last case, also if the process dies.
"""

import codecs
import functools
import gzip
import hashlib
import io
import json
import logging
import os
import resource
import shutil
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from crosslmm import storage
from crosslmm.config import BadConfig, DataConfig
from crosslmm.data import feature_cache, manifest_shards
from crosslmm.data.feature_cache import BadFeatures, FeatureCache, IndexEntry
from crosslmm.data.feature_format import FeatureRecipe
from crosslmm.data.frame_sampling import FrameSampling
from crosslmm.data.ingest import check_rows, convert, ray_tasks, retry_unreadable
from crosslmm.data.ingest.ray_tasks import IngestError
from crosslmm.data.manifest import BadManifest, Manifest, Rows
from crosslmm.data.quarantine import TooManyUnreadable
from crosslmm.data.samples.clips import encode_clip
from crosslmm.data.video.decode import decode_video, probe_video
from crosslmm.encode.recorder import EncodingRecorder
from crosslmm.lease import lease
from crosslmm.text import one_printable_line
from crosslmm.train.checkpoint import seals, shards
from tests.support import fuzz_videos
from tests.support.common import conversation
from tests.support.fuzz_mutations import damaged, hostile_texts, mutated
from tests.support.fuzz_watch import Watch

ERRORS = (BadManifest, BadConfig, BadFeatures, IngestError, TooManyUnreadable, storage.BadLocation, shards.Damaged)
# Of the resident set, in which libraries count as they are read: 858 MB in a fresh clone, 136 elsewhere [bytes].
MAX_GROWN = 1200 * 2**20
MAX_ADDRESSES = 8 * 2**30  # of the address space, of which Arrow reserves much [bytes]


@dataclass
class Kind:
    """A kind of files: how they are made in an empty folder, and how they are read."""

    make: Callable[[Path], object]
    read: Callable[[Path], object]
    named: str = ""
    """File that the person who starts the job names; it may be a link."""


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


ROWS = [
    {"id": "a", "video": "a.mp4", "kind": "colour", "messages": conversation("What?", "Red.")},
    {"id": "b", "video": "clips/b.mp4#t=0,1", "messages": conversation("And?", "Blue.")},
    {"id": "c", "messages": conversation("Why?", "So.", video=False)},
]
LLAVA = [
    {"id": 1, "video": "a.mp4", "conversations": [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": ""}]},
    {"image": ["b.png"], "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "!"}]},
]  # fmt: skip
FRAMES = {"type": "video", "video": ["f/1.jpg", "f/2.jpg"], "fps": 2.0, "video_start": 0, "video_end": 1}
FOREIGN = [
    {"messages": [{"role": "user", "content": "<video>?"}, {"role": "assistant", "content": "!"}], "videos": ["a.mp4"]},
    {"messages": [{"role": "user", "content": [FRAMES]},
                  {"role": "assistant", "content": [{"type": "text", "text": ""}]}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "b.png"}}]},
                  {"role": "assistant", "content": "!"}]},
    {"instruction": "<video>?", "output": "!", "videos": ["a.mp4"], "history": [["?", "!"]], "system": "S"},
    {"video": "a.mp4", "start": 0, "end": 1.5, "QA": [{"i": "?", "q": "?", "a": "!"}]},
    {"q": "?", "a": "!", "video_id": "a"},
    {"videoid": 1, "page_dir": "p", "name": "!", "contentUrl": "https://x"},
    {"video": {"bytes": None, "path": "a.mp4"}, "caption": "!"},
]  # fmt: skip
CLIP = encode_clip(np.zeros((4, 32, 32, 3), np.uint8))


def read_manifest(uri: Path) -> None:
    """As a run's driver and its readers do."""
    manifest = Manifest(str(uri))
    Rows([manifest]).take(np.arange(min(len(manifest), 50)))
    manifest.estimate_tokens(FrameSampling(4), 9)
    for _, _ in zip(manifest.videos(), range(100), strict=False):
        pass


def make_parquet(folder: Path) -> None:
    def parts(content: Any) -> list[dict[str, Any]]:
        return content if isinstance(content, list) else [{"type": "text", "text": content}]

    rows = [
        {**row, "messages": [{**message, "content": parts(message["content"])} for message in row["messages"]]}
        for row in ROWS * 30
    ]
    rows = [{**row, "id": f"{i}"} for i, row in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=40, compression="zstd")


def make_text_parquet(folder: Path) -> None:
    rows = [{**row, "id": f"{i}", "messages": json.dumps(row["messages"])} for i, row in enumerate(ROWS * 30)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", use_dictionary=False, compression="gzip")


def make_csv(folder: Path) -> None:
    lines = ["video,question,answer", *(f'a.mp4,"What\n""{i}""?",{i}' for i in range(30))]
    (folder / "rows.csv").write_bytes(codecs.BOM_UTF8 + "\r\n".join(lines).encode())


def make_packed(folder: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in [*ROWS, *FOREIGN] * 3 if "id" not in row)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode("utf-16")))


def make_tar(folder: Path) -> None:
    with tarfile.open(folder / "rows.tar", "w") as file:
        for i in range(4):
            row = {"caption": f"{i}", "url": "https://x"}
            for suffix, data in (("mp4", CLIP), ("json", json.dumps(row).encode()), ("txt", f"{i}".encode())):
                info = tarfile.TarInfo(f"{i}.{suffix}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))


def make_blobs(folder: Path) -> None:
    rows = [{"video": {"bytes": CLIP, "path": f"{i}.mp4"}, "caption": f"{i}"} for i in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=2)


def convert_file(uri: Path) -> None:
    convert.convert(str(uri), str(uri.parent / "out"), True, True, 1500, DataConfig())
    read_manifest(uri.parent / "out")


def make_videos(folder: Path) -> None:
    for name in ("a", "clips/b"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.mp4").write_bytes(CLIP)
        (folder / f"{name}.json").write_text(json.dumps({"messages": conversation("What?", "Red.")}))


def run_here(function: Any, calls: dict[int, tuple[Any, ...]], *_: Any) -> Any:
    """Stands in for Ray's tasks."""
    for key, arguments in calls.items():
        yield key, function(*arguments)


class HereReader:
    """Stands in for the child processes that read videos, so that what they open is seen."""

    def __init__(self, data: DataConfig, *_: Any) -> None:
        self.data = data

    def __enter__(self) -> "HereReader":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class HereDecoder(HereReader):
    def __call__(self, uris: list[str]) -> list[Any]:
        return [decode_video(uri, self.data, 32) for uri in uris]


class HereProber(HereReader):
    def __call__(self, uris: list[str]) -> list[Any]:
        return [probe_video(uri, self.data) for uri in uris]


def make_conversion(folder: Path) -> None:
    """A conversion that stopped before its last chunk and its seal, of a manifest with every kind of bad row."""
    (folder / "a.mp4").write_bytes(CLIP)
    rows = [{**row, "id": f"{i}"} for i, row in enumerate(ROWS * 4)]
    write_rows(folder / "rows.jsonl", [*rows, {"id": "x"}, rows[0]])
    convert.convert(str(folder / "rows.jsonl"), str(folder / "out"), True, True, 1500, DataConfig())
    (folder / "out/_prepared.json").unlink()
    max((folder / "out/pieces").glob("?????.json")).unlink()


def resume_conversion(folder: Path) -> None:
    convert.convert(str(folder / "rows.jsonl"), str(folder / "out"), True, True, 1500, DataConfig())


def make_prepared(folder: Path) -> None:
    """A prepared folder with rows that wait for a video."""
    (folder / "a.mp4").write_bytes(CLIP)
    write_rows(folder / "rows.jsonl", [{**row, "id": f"{i}"} for i, row in enumerate(ROWS * 4)])
    convert.convert(str(folder / "rows.jsonl"), str(folder / "out"), True, True, 900, DataConfig())
    for path in (folder / "out").iterdir():
        shutil.move(path, folder / path.name)
    (folder / "clips").mkdir()
    (folder / "clips/b.mp4").write_bytes(CLIP)


def requeue(folder: Path) -> None:
    retry_unreadable.requeue(str(folder), DataConfig())
    read_manifest(folder)


LEDGER = [
    {"manifest": "m.jsonl", "line": i, "id": f"{i}", "uri": uri, "version": None, "stage": "read", "reason": "no",
     "attempts": 1}
    for i, uri in enumerate(["a.mp4", "clips/b.mp4#t=0,1", "\\xe9.mp4"])
]  # fmt: skip


def make_ledger(folder: Path) -> None:
    (folder / "a.mp4").write_bytes(CLIP)
    write_rows(folder / "quarantine.jsonl", LEDGER)


def read_quarantine(folder: Path) -> None:
    EncodingRecorder(str(folder), {}, DataConfig())
    retry_unreadable.requeue(str(folder / "quarantine.jsonl"), DataConfig())


RECIPE = FeatureRecipe.from_config(DataConfig(num_frames=2), 48, "fp32", 6, 8, "e" * 64, "bf16")


def make_features(folder: Path) -> None:
    (folder / "a.mp4").write_bytes(CLIP)
    features = feature_cache.create_feature_folder(str(folder), RECIPE)
    uri = str(folder / "a.mp4")
    x_FPD = np.ones((2, 6, 8), np.float32)
    for _ in range(2):
        entries, _, _ = feature_cache.write_shard(features, [(uri, storage.version(uri), x_FPD, [0.0, 0.5])], "bf16")
        feature_cache.write_index(features, [*entries, IndexEntry("gone.mp4", None, 0, reason="no such file")])


def read_features(folder: Path) -> None:
    cache = FeatureCache(str(folder / RECIPE.key))
    cache.require(RECIPE, [str(folder / "a.mp4")])
    cache([str(folder / "a.mp4"), "gone.mp4"])


def make_checkpoints(folder: Path) -> None:
    for step in (1, 2):
        uri = folder / f"step-0000000{step}-test"
        uri.mkdir()
        (uri / "shard").write_bytes(b"weights")
        files = {"shard": (7, "0" * 64)}
        checkpoint = seals.Checkpoint(str(uri), step, 1, 1.5, {"validation/loss": 0.5}, files)
        seals.write_seal(checkpoint)
    seals.break_seal(checkpoint, "dropped")


def read_checkpoints(folder: Path) -> None:
    sealed = seals.list_sealed(str(folder))
    seals.best_first(sealed, "validation/loss")
    for uri in seals.list_unsealed(str(folder), sealed):
        seals.unsealed_reason(uri)
    for checkpoint in sealed:
        seals.verify(checkpoint)


def make_tensors(folder: Path) -> None:
    parts = {
        "model/w": shards.Part(torch.ones(6, 4), 0, (6, 4), True),
        "step": shards.Part(torch.ones(()), 0, (), False),
    }
    shards.write_index(str(folder), [shards.write_shard(str(folder), 0, parts)[1]])


def read_tensors(folder: Path) -> None:
    """Read a checkpoint whose seal fits whatever its files are now."""
    files = {
        path.name: (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.iterdir()
        if path.is_file() and not path.is_symlink()
    }
    shards.read(seals.Checkpoint(str(folder), 1, 1, 1.5, {}, files), 0, 2)


KINDS = {
    "jsonl": Kind(
        lambda f: write_rows(f / "rows.jsonl", [*ROWS, *LLAVA]), lambda f: read_manifest(f / "rows.jsonl"), "rows.jsonl"
    ),
    "foreign rows": Kind(
        lambda f: write_rows(f / "rows.jsonl", FOREIGN), lambda f: read_manifest(f / "rows.jsonl"), "rows.jsonl"
    ),
    "csv": Kind(make_csv, lambda f: read_manifest(f / "rows.csv"), "rows.csv"),
    "packed": Kind(make_packed, lambda f: read_manifest(f / "rows.jsonl.gz"), "rows.jsonl.gz"),
    "tar": Kind(make_tar, lambda f: convert_file(f / "rows.tar"), "rows.tar"),
    "blobs": Kind(make_blobs, lambda f: convert_file(f / "rows.parquet"), "rows.parquet"),
    "json": Kind(
        lambda f: (f / "rows.json").write_text(json.dumps(LLAVA)), lambda f: read_manifest(f / "rows.json"), "rows.json"
    ),
    "parquet": Kind(make_parquet, lambda f: read_manifest(f / "rows.parquet"), "rows.parquet"),
    "parquet of texts": Kind(make_text_parquet, lambda f: read_manifest(f / "rows.parquet"), "rows.parquet"),
    "sidecars": Kind(make_videos, read_manifest),
    "seals": Kind(make_prepared, read_manifest),
    "waiting rows": Kind(make_prepared, requeue),
    "conversions": Kind(make_conversion, resume_conversion, "rows.jsonl"),
    "ledgers": Kind(make_ledger, read_quarantine),
    "features": Kind(make_features, read_features),
    "checkpoints": Kind(make_checkpoints, read_checkpoints),
    "tensors of a checkpoint": Kind(make_tensors, read_tensors),
    "frame lists": Kind(fuzz_videos.make_frame_list, fuzz_videos.read_frame_list, "list.json"),
} | {
    f"videos: {name}": Kind(functools.partial(fuzz_videos.make_video, name=name), fuzz_videos.read_video)
    for name in fuzz_videos.VIDEOS
}


@st.composite
def changed_file(draw: Any, name: str, data: bytes, outside: str) -> bytes:
    """The content of a file, changed in a way that its format lets through, or in any way."""
    if draw(st.integers(0, 2)) == 0:
        return draw(damaged(data))
    if name.endswith(".json"):
        return as_json(draw(mutated(json.loads(data), outside)))
    if name.endswith(".jsonl") and data:
        lines = data.splitlines()
        number = draw(st.integers(0, len(lines) - 1))
        lines[number] = as_json(draw(mutated(json.loads(lines[number]), outside)))
        return b"\n".join(lines) + draw(st.sampled_from([b"", b"\n", b"\r\n\r\n"]))
    if name.endswith(".parquet"):
        return draw(changed_table(data, outside))
    return draw(damaged(data))


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


@st.composite
def changed_table(draw: Any, data: bytes, outside: str) -> bytes:
    """A Parquet file with another value in one row, or with other columns, codecs and encodings."""
    table = pq.read_table(io.BytesIO(data))
    rows = table.to_pylist()
    with_texts = [field.name for field in table.schema if pa.types.is_string(field.type)]
    options = {
        "compression": draw(st.sampled_from(["zstd", "gzip", "none", "snappy"])),
        "use_dictionary": draw(st.booleans()),
        "row_group_size": draw(st.sampled_from([None, 1, 40])),
    }
    buffer = io.BytesIO()
    try:
        match draw(st.sampled_from(["text", "row", "column", "drop"])):
            case "text" if rows and with_texts:
                text = draw(hostile_texts(outside))
                draw(st.sampled_from(rows))[draw(st.sampled_from(with_texts))] = text
                table = pa.Table.from_pylist(rows, table.schema)
            case "row" if rows:
                row = draw(st.sampled_from(rows))
                row |= draw(mutated(json.loads(json.dumps(row, default=str)), outside))
                table = pa.Table.from_pylist(rows)
            case "column" if table.num_columns:
                value = draw(st.sampled_from([None, {"a": 1}, [], b"\xff"]))
                values = pa.array([value] * len(rows))
                table = table.set_column(0, draw(st.sampled_from(table.column_names)), values)
            case _ if table.num_columns > 1:
                table = table.drop_columns([draw(st.sampled_from(table.column_names))])
        pq.write_table(table, buffer, **options)
    except (pa.ArrowException, ValueError, TypeError, AttributeError, KeyError, OverflowError):
        return data
    return buffer.getvalue()


REPLACED_BY = {
    "link": lambda path, outside: path.symlink_to(outside),
    "link to a device": lambda path, outside: path.symlink_to("/dev/zero"),
    "link to itself": lambda path, outside: path.symlink_to(path),
    "pipe": lambda path, outside: os.mkfifo(path),
    "folder": lambda path, outside: path.mkdir(),
    "nothing": lambda path, outside: None,
}


def run(kind: Kind, seconds: float, number: int, folder: Path, watch: Watch) -> int:
    """Run cases for some seconds; return how many."""
    outside = folder / "outside/secret.json"
    outside.parent.mkdir(parents=True)
    outside.write_text(json.dumps({"messages": conversation("?", "secret")}))
    real, case = folder / "real", folder / "case"
    case.mkdir()
    kind.make(case)
    shutil.copytree(case, real, symlinks=True)
    names = [str(path.relative_to(real)) for path in sorted(real.rglob("*")) if path.is_file()]
    files = {name: (real / name).read_bytes() for name in names}
    kind.read(case)  # the unchanged file; also triggers the late imports, which open files
    end, count = time.monotonic() + seconds, 0

    def check(data: st.DataObject) -> None:
        nonlocal count
        count += 1
        wanted = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
        changes = {name: data.draw(changed_file(name, files[name], str(outside))) for name in wanted}
        replaced = data.draw(st.sampled_from([None] * 8 + list(REPLACED_BY)))
        shutil.rmtree(case)
        shutil.copytree(real, case, symlinks=True)
        for name, content in changes.items():
            (case / name).write_bytes(content)
        fix_sizes(case, changes)
        if replaced and (wanted[0] != kind.named or replaced != "link"):
            (case / wanted[0]).unlink()
            REPLACED_BY[replaced](case / wanted[0], outside)
        with watch.case(case):
            read_expecting_errors(kind, case)

    rounds = settings(deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    while (left := end - time.monotonic()) > 0:
        cases = max(1, int(min(left, 5) * count / (seconds - left)))
        seed(number + count)(settings(rounds, max_examples=cases)(given(st.data())(check)))()
    return count


def read_expecting_errors(kind: Kind, case: Path) -> None:
    message = ""
    try:
        kind.read(case)
    except ERRORS as error:
        message = str(error)
    assert message == one_printable_line(message), message


def fix_sizes(case: Path, changes: dict[str, bytes]) -> None:
    """Let a seal give the sizes of changed parts, which would otherwise be refused for them."""
    path = case / manifest_shards.SEAL
    if not path.exists() or manifest_shards.SEAL in changes:
        return
    seal = json.loads(path.read_bytes())
    for part in seal["parts"]:
        if data := changes.get(part["name"]):
            part |= {"bytes": len(data), "footer": int.from_bytes(data[-8:-4], "little") + 8}
    path.write_text(json.dumps(seal))


def main() -> None:
    seconds, number, folder, *kinds = sys.argv[1:]
    kinds = kinds or list(KINDS)
    logging.disable()
    ray_tasks.run_tasks = run_here
    lease.LEASE_S, lease.POLL_S = 0.5, 0.1  # how long a start waits beside a damaged file of an owner
    retry_unreadable.Decoder = HereDecoder
    retry_unreadable.HeaderReader = check_rows.HeaderReader = HereProber
    watch, counts = Watch(), {}
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MAX_ADDRESSES,) * 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind in kinds:
        print(f"fuzzing {kind}", file=sys.stderr, flush=True)
        counts[kind] = run(KINDS[kind], float(seconds) / len(kinds), int(number), Path(folder) / kind, watch)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown * 1024 < MAX_GROWN, f"{kind}: grew by {grown // 1024} MB"
    print(json.dumps({"cases": counts, "grown_mb": grown // 1024}))


if __name__ == "__main__":
    main()
