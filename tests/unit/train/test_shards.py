"""The format of a checkpoint's tensors: any number of ranks reads what any other wrote, and every damage is noticed."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

from crosslmm import storage
from crosslmm.train.checkpoint import shards
from crosslmm.train.checkpoint.seals import Checkpoint
from crosslmm.train.checkpoint.shards import Damaged, Part
from crosslmm.train.distributed.parallel import shard_rows

WHOLE = {
    "weights": torch.arange(35, dtype=torch.float32).reshape(7, 5),
    "half": torch.arange(24).reshape(4, 3, 2).to(torch.bfloat16),
    "one row": torch.ones(1, 3, dtype=torch.float64),
    "flags": torch.tensor([True, False, True]),
}
STEP = torch.tensor(12.0)


def write(folder, world_size: int) -> Checkpoint:
    """Write a checkpoint of `WHOLE`, whose rows are spread over the ranks, and of a replicated number."""
    files, indexes = {}, []
    for rank in range(world_size):
        parts = {}
        for name, tensor in WHOLE.items():
            first, end = shard_rows(len(tensor), rank, world_size)
            parts[name] = Part(tensor[first:end].contiguous(), first, tuple(tensor.shape), sharded=True)
        if rank == 0:
            parts["step"] = Part(STEP, 0, (), sharded=False)
        entry, index = shards.write_shard(str(folder), rank, parts)
        files[f"rank-{rank:05d}.safetensors"] = entry
        indexes.append(shards.index_from_json(json.loads(json.dumps(shards.index_to_json(index)))))
    files["index.json"] = shards.write_index(str(folder), indexes)
    return Checkpoint(str(folder), 1, world_size, 0.0, {}, files)


@pytest.mark.parametrize("readers", [1, 2, 3, 5])
@pytest.mark.parametrize("writers", [1, 2, 3, 8])
def test_any_number_of_ranks_reads_what_any_other_wrote(tmp_path, writers, readers):
    checkpoint = write(tmp_path, writers)
    for rank in range(readers):
        tensors = shards.read(checkpoint, rank, readers)
        assert tensors.pop("step").equal(STEP)
        assert tensors.keys() == WHOLE.keys()
        for name, rows in tensors.items():
            first, end = shard_rows(len(WHOLE[name]), rank, readers)
            assert rows.dtype == WHOLE[name].dtype
            assert rows.equal(WHOLE[name][first:end])


def test_rows_are_split_as_torch_splits_them():
    for rows in range(1, 20):
        for world_size in range(1, 8):
            chunks = [len(chunk) for chunk in torch.arange(rows).chunk(world_size)]
            sizes = [end - first for first, end in (shard_rows(rows, rank, world_size) for rank in range(world_size))]
            assert sizes == chunks + [0] * (world_size - len(chunks))


def test_a_shard_is_a_safetensors_file(tmp_path):
    checkpoint = write(tmp_path, 2)
    first, second = (load_file(tmp_path / f"rank-0000{rank}.safetensors") for rank in range(2))
    assert torch.cat([first["weights"], second["weights"]]).equal(WHOLE["weights"])
    assert first["step"].equal(STEP)
    data = (tmp_path / "rank-00001.safetensors").read_bytes()
    assert checkpoint.files["rank-00001.safetensors"] == (len(data), hashlib.sha256(data).hexdigest())


def test_only_requested_tensors_are_read(tmp_path):
    checkpoint = write(tmp_path, 1)
    assert shards.read(checkpoint, 0, 1, lambda name: name == "half").keys() == {"half"}


def test_a_chunk_larger_than_a_piece_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "PIECE_BYTES", 7)
    checkpoint = write(tmp_path, 3)
    for rank in range(2):
        first, end = shard_rows(7, rank, 2)
        assert shards.read(checkpoint, rank, 2)["weights"].equal(WHOLE["weights"][first:end])


def test_every_flipped_byte_of_the_tensors_is_noticed(tmp_path):
    checkpoint = write(tmp_path, 2)
    path = tmp_path / "rank-00001.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for position in range(start, len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(Damaged, match=r"^rank-00001\.safetensors is not what was written"):
            shards.read(checkpoint, 0, 1)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is not what was written"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read: Is a directory"),
    ],
)
@pytest.mark.parametrize("name", ["rank-00001.safetensors", "index.json"])
def test_damage_is_named(tmp_path, harm, message, name):
    checkpoint = write(tmp_path, 2)
    harm(tmp_path / name)
    with pytest.raises(Damaged, match=message):
        shards.read(checkpoint, 0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "PICKLE"}, "'weights' has the unknown type 'PICKLE'"),
        ({"shape": [10**12, 5]}, "'weights' is larger than the files"),
        ({"shape": [7, 10**12]}, "'weights' is larger than the files"),
        ({"shape": [0, 2**62, 2**62], "chunks": []}, "'weights' is larger than the files"),
        ({"shape": [0, 10**12], "chunks": []}, "'weights' is larger than the files"),
        ({"shape": [2**70]}, "'weights' is larger than the files"),
        ({"shape": [-7, 5]}, "greater than or equal to 0"),
        ({"chunks": []}, "the chunks of 'weights' are not those of its files"),
        ({"chunks": 3}, "valid array"),
    ],
)
def test_an_index_that_lies_is_refused_before_anything_is_read(tmp_path, change, message):
    """Whoever can write to storage can seal it; it must not cost memory, or lead to other files."""
    checkpoint = write(tmp_path, 1)
    index = json.loads((tmp_path / "index.json").read_text())
    index["weights"] |= change
    with pytest.raises(Damaged, match=message):
        shards.read(resealed(checkpoint, tmp_path, index), 0, 1)


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "index.json"])
def test_a_file_that_links_out_of_the_checkpoint_is_not_read(tmp_path, name):
    folder = tmp_path / "run"
    folder.mkdir()
    checkpoint = write(folder, 1)
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(Damaged, match="a link leads out of its folder"):
        shards.read(checkpoint, 0, 1)


@pytest.mark.parametrize("file", ["/etc/passwd", "../secret", "rank-00009.safetensors", "s3://bucket/key"])
def test_an_index_names_only_files_of_the_seal(tmp_path, file):
    checkpoint = write(tmp_path, 1)
    index = json.loads((tmp_path / "index.json").read_text())
    index["weights"]["chunks"][0]["file"] = file
    with pytest.raises(Damaged, match="the chunks of 'weights' are not those of its files"):
        shards.read(resealed(checkpoint, tmp_path, index), 0, 1)


def resealed(checkpoint: Checkpoint, folder, index: dict) -> Checkpoint:
    data = json.dumps(index).encode()
    storage.write_bytes(str(folder / "index.json"), data)
    checkpoint.files["index.json"] = len(data), hashlib.sha256(data).hexdigest()
    return checkpoint
