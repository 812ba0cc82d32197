"""A video whose features cannot be stored is quarantined, and its block's other videos are stored."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from crosslmm.config import DataConfig
from crosslmm.data.dataset import BlockLayout, ReadSamples
from crosslmm.data.feature_cache import FeatureCache, IndexEntry, create_feature_folder, write_index
from crosslmm.data.feature_format import FeatureRecipe
from crosslmm.data.frame_sampling import SampledFrames
from crosslmm.data.sampler import DeterministicSampler
from crosslmm.data.video.decode import VideoFailure
from crosslmm.encode.actor import Encode
from crosslmm.encode.recorder import EncodingRecorder

URIS = ["a.mp4", "gone.mp4", "b.mp4", "c.mp4"]
RECIPE = FeatureRecipe.from_config(
    DataConfig(num_frames=2), image_size=8, precision="fp32", patches=4, width=6, encoder="e" * 64, dtype="int8"
)


class Rows:
    """A row for each video."""

    uris, versions, roots = URIS, [None] * len(URIS), ()

    def take(self, numbers):
        fields = {"manifest": "m.jsonl", "messages": [], "kind": None}
        return [{**fields, "line": i + 1, "id": f"row {i}", "videos": [URIS[i]]} for i in numbers.tolist()]


@pytest.fixture
def block():
    """The block of all videos, of which one cannot be read."""

    def decode(uris):
        frames = SampledFrames(np.zeros((2, 8, 8, 3), np.uint8), np.array([0.5, 1.5]))
        return [VideoFailure("no such file", "read") if uri == "gone.mp4" else frames for uri in uris]

    read = ReadSamples.__new__(ReadSamples)
    read.layout = BlockLayout(DeterministicSampler((len(URIS),), len(URIS), None), 1, 0, 1, len(URIS))
    read.rows, read.decoder, read.unreadable = Rows(), decode, {}
    return read({"block": np.array([0])})


@pytest.mark.parametrize("damage", [np.nan, np.inf, 1e30])
def test_one_video_costs_no_other(block, tmp_path, monkeypatch, damage):
    def encode(videos):
        x_VFPD = np.ones((len(videos), 2, 4, 6), np.float32)
        x_VFPD[1, 0, 0, 0] = damage  # of b.mp4
        return list(x_VFPD)

    folder = create_feature_folder(str(tmp_path), RECIPE)
    actor = Encode.__new__(Encode)
    actor.rows, actor.folder, actor.recipe = Rows(), folder, RECIPE
    monkeypatch.setattr(actor, "_encode", encode)
    report = json.loads(actor(block)["done"][0])
    assert [(one["line"], one["uri"], one["stage"]) for one in report["quarantined"]] == [
        (2, "gone.mp4", "read"), (3, "b.mp4", "process"),
    ]  # fmt: skip
    assert "not finite, or too large" in report["quarantined"][1]["reason"]
    write_index(folder, [IndexEntry(**entry) for entry in report["entries"]])
    cache = FeatureCache(folder)
    assert [cache.find(uri).frames for uri in URIS] == [2, 0, 0, 2]
    assert cache.find("c.mp4").times == [0.5, 1.5]
    assert cache.find("b.mp4").stage == "process"
    with EncodingRecorder(folder, dict.fromkeys(URIS, SimpleNamespace()), DataConfig()) as recorder:
        recorder.add(report)
    assert (recorder.videos, len(recorder.quarantined)) == (2, 2)
