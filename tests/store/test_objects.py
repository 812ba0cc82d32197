"""Reads from a real object store over HTTP: bytes and requests that they cost, and the cause of errors."""

import json
import os
import re
import socket
import time
from fractions import Fraction

import av
import numpy as np
import pyarrow as pa
import pytest
from s3fs import S3FileSystem

from crosslmm import storage
from crosslmm.config import DataConfig
from crosslmm.data import manifest_shards
from crosslmm.data.feature_cache import BadFeatures, FeatureCache, create_feature_folder, write_index, write_shard
from crosslmm.data.feature_format import FeatureRecipe
from crosslmm.data.frame_sampling import SampledFrames
from crosslmm.data.manifest import BadManifest, Manifest
from crosslmm.data.samples.clips import encode_clip
from crosslmm.data.video.decode import VideoFailure, decode_video
from crosslmm.data.video.decode_pool import Decoder
from tests.support.common import conversation
from tests.support.s3rver import STORES, running_store
from tests.support.wire import Wire

SIDE = 32


@pytest.fixture(scope="module", params=STORES)
def store(request, tmp_path_factory):
    with running_store(request.param, tmp_path_factory.mktemp("store") / request.param) as store:
        store.make_bucket("videos")
        yield store


@pytest.fixture
def wire(store, monkeypatch):
    with Wire(int(store.endpoint.rsplit(":", 1)[1])) as wire:
        use(monkeypatch, store.environment() | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{wire.port}"})
        yield wire


def use(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()


def grey(*levels):
    return np.stack([np.full((48, 64, 3), level, np.uint8) for level in levels])


@pytest.fixture
def clip(wire):
    uri = "s3://videos/good.mp4"
    storage.write_bytes(uri, encode_clip(grey(40, 200)))
    return uri


@pytest.fixture
def no_retries():
    with storage.retrying(storage.NO_RETRIES):
        yield


@pytest.fixture
def decoder(wire, no_retries):
    with Decoder(DataConfig(num_frames=2, decode_timeout_s=10), SIDE, store_timeout_s=2.0) as decoder:
        yield decoder


def test_reads_after_seeks_return_the_right_bytes(wire):
    data = np.random.default_rng(0).bytes(3_000_000)
    storage.write_bytes("s3://videos/bytes", data)
    jumps = np.random.default_rng(1)
    with storage.open_read("s3://videos/bytes") as file:
        storage.will_read(file, [(500_000, 700_000), (600_000, 800_000), (2_000_000, 2_000_010), (2_999_000, 10**9)])
        for _ in range(60):
            at, length = int(jumps.integers(3_000_100)), int(jumps.integers(1, 100_000))
            assert file.seek(at) == file.tell() == at
            piece = file.read(length)
            assert data[at:].startswith(piece)
            assert len(piece) <= length
            assert piece or at >= len(data)
        file.seek(0)
        assert file.read() == data


def test_announced_ranges_cost_one_request_each(wire):
    storage.write_bytes("s3://videos/bytes", bytes(3_000_000))
    with storage.open_read("s3://videos/bytes") as file:
        received, requests = wire.received, wire.requests
        storage.will_read(file, [(100_000, 900_000), (2_000_000, 2_300_000)])
        for start, end in ((100_000, 900_000), (2_000_000, 2_300_000)):
            file.seek(start)
            while file.tell() < end:
                file.read(min(32768, end - file.tell()))
        assert wire.requests - requests == 2
        assert 1_100_000 <= wire.received - received < 1_110_000


@pytest.mark.parametrize("form", ["mp4", "mkv"])
def test_a_long_video_costs_only_the_gops_of_its_frames(wire, tmp_path, form):
    """A Matroska file says neither when its video ends, which costs a group more, nor how long a group is."""
    path = tmp_path / f"long.{form}"
    texture = np.random.default_rng(0).integers(0, 255, (240, 1000, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"g": "15", "preset": "ultrafast", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for i in range(600):
            image = np.ascontiguousarray(texture[:, i : i + 320])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    storage.write_bytes(f"s3://videos/long.{form}", path.read_bytes())
    before = wire.received, wire.requests
    data = DataConfig(num_frames=4)
    remote, local = decode_video(f"s3://videos/long.{form}", data, SIDE), decode_video(str(path), data, SIDE)
    assert np.array_equal(remote.images, local.images)
    assert wire.received - before[0] < 0.3 * path.stat().st_size
    assert wire.requests - before[1] <= {"mp4": 4 + 6, "mkv": 3 * 4 + 6}[form]


def test_a_missing_or_bad_object_is_a_video_failure(decoder, clip):
    storage.write_bytes("s3://videos/empty.mp4", b"")
    good, missing, empty = decoder([clip, "s3://videos/missing.mp4", "s3://videos/empty.mp4"])
    assert isinstance(good, SampledFrames)
    assert missing == VideoFailure("no such file", "read")
    assert (empty.reason, empty.stage) == ("the file is empty", "check")
    assert len(empty.version) >= 32


def test_an_object_replaced_while_read_is_an_error(wire):
    storage.write_bytes("s3://videos/changing", bytes(1_000_000))
    with storage.open_read("s3://videos/changing") as file:
        file.read(10)
        storage.write_bytes("s3://videos/changing", b"\1" * 1_000_000)
        file.seek(900_000)
        with pytest.raises(OSError, match=r"[Ee]xpired|preconditions"):
            file.read(10)


def test_a_missing_bucket_is_no_video_failure(decoder):
    with pytest.raises(storage.Unavailable, match="there is no bucket nowhere"):
        decoder(["s3://nowhere/clip.mp4"])


def test_refused_credentials_are_no_video_failure(wire, no_retries, monkeypatch, clip):
    use(monkeypatch, {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "wrong"})
    with (
        Decoder(DataConfig(num_frames=2), SIDE) as decoder,
        pytest.raises(storage.Unavailable, match=r"permission denied, as for all of videos; check the credentials"),
    ):
        decoder([clip])


@pytest.mark.fault
def test_a_store_out_of_reach_is_no_video_failure(monkeypatch, no_retries, store):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    use(monkeypatch, store.environment() | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_MAX_ATTEMPTS": "1"})
    with (
        Decoder(DataConfig(num_frames=2), SIDE) as decoder,
        pytest.raises(storage.Unavailable, match="Could not connect to the endpoint"),
    ):
        decoder(["s3://videos/clip.mp4"])


@pytest.mark.fault
def test_a_store_that_recovers_in_time_costs_no_video(monkeypatch, store, clip):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    use(monkeypatch, store.environment() | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_MAX_ATTEMPTS": "1"})
    wires = []

    def wait(seconds):  # the store recovers
        wires.append(Wire(int(store.endpoint.rsplit(":", 1)[1]), port=port).__enter__())
        time.sleep(0.1)

    policy = storage.RetryPolicy(sleep=wait)
    with storage.retrying(policy), Decoder(DataConfig(num_frames=2), SIDE) as decoder:
        assert isinstance(decoder([clip])[0], SampledFrames)
    assert len(wires) == 1
    wires[0].__exit__(None, None, None)


@pytest.mark.fault
def test_a_store_that_hangs_is_no_video_failure(decoder, wire, clip):
    assert isinstance(decoder([clip])[0], SampledFrames)
    decoder.data = decoder.data.model_copy(update={"decode_timeout_s": 2.0})
    wire.silent = True
    with pytest.raises(storage.Unavailable, match="did not answer in 2 s"):
        decoder([clip])


def test_children_get_the_current_environment(monkeypatch):
    monkeypatch.setenv("CROSSLMM_TEST", "now")
    with Decoder(DataConfig(num_frames=2), SIDE) as decoder:
        assert decoder._schedule(os.getenv, "CROSSLMM_TEST").result() == "now"


def test_an_image_in_the_store_is_a_video_of_one_frame(decoder):
    encoder = av.codec.CodecContext.create("png", "w")
    encoder.height, encoder.width, encoder.pix_fmt, encoder.time_base = 48, 64, "rgb24", Fraction(1)
    grey_image = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 99, np.uint8), format="rgb24")
    png = b"".join(bytes(packet) for packet in [*encoder.encode(grey_image), *encoder.encode(None)])
    storage.write_bytes("s3://videos/still.png", png)
    (frames,) = decoder(["s3://videos/still.png"])
    assert np.array_equal(frames.images, np.full((1, SIDE, SIDE, 3), 99, np.uint8))


def test_reading_features_costs_two_requests(wire):
    video = "s3://videos/encoded.mp4"
    storage.write_bytes(video, b"one")
    version = storage.version(video)
    recipe = FeatureRecipe.from_config(DataConfig(num_frames=2), SIDE, "fp32", 4, 8, "e", "int8")
    folder = create_feature_folder("s3://videos/features", recipe)
    given = [(uri, version, np.full((2, 4, 8), 3.0, np.float32), [0.0, 1.0]) for uri in (f"{video}#t=0,1", video)]
    write_index(folder, write_shard(folder, given, "int8")[0])
    features = FeatureCache(folder)
    before = wire.requests
    assert features.read(video).images.shape == (2, 4, 8)
    assert wire.requests - before == 2
    storage.write_bytes(video, b"two")
    assert storage.version(video) not in (None, version)
    with pytest.raises(BadFeatures, match="has changed or disappeared"):
        features.read(video)
    assert storage.version("s3://videos/no-such-object") is None
    with pytest.raises(storage.Unavailable, match="there is no bucket nowhere"):
        storage.version("s3://nowhere/x.mp4")


def test_remove_folder_removes_what_arrow_wrote(store, monkeypatch):
    use(monkeypatch, store.environment())
    filesystem, path = storage.arrow_filesystem("s3://videos/run")
    filesystem.create_dir(f"{path}/ray/start")
    storage.write_bytes("s3://videos/run/ray/start/state.json", b"{}")
    storage.write_bytes("s3://videos/runner/state.json", b"{}")

    def keys():
        return [one["Key"] for one in store.client().list_objects_v2(Bucket="videos", Prefix="run")["Contents"]]

    assert "run/ray/start/" in keys()  # Arrow's object for the folder
    assert storage.names_in("s3://videos/run") == ["ray/start/state.json"]
    assert (storage.folders_in("s3://videos/run"), storage.files_in("s3://videos/run")) == (["ray"], [])
    assert storage.files_in("s3://videos/run/ray/start") == ["state.json"]
    storage.remove_folder("s3://videos/run")
    assert keys() == ["runner/state.json"]


def test_download_refuses_keys_that_leave_the_folder(store, wire, tmp_path):
    if store.make == "s3rver":
        pytest.skip("s3rver takes a key for a path in its own folder, and resolves .. in it")
    store.client().put_object(Bucket="videos", Key="weights/a/../../out", Body=b"x")
    storage.write_bytes("s3://videos/weights/a/b", b"b")
    assert storage.names_in("s3://videos/weights") == ["a/../../out", "a/b"]
    with pytest.raises(storage.BadLocation, match="is not a name inside"):
        storage.download("s3://videos/weights", str(tmp_path / "copy"))
    assert not list(tmp_path.iterdir())


def test_keys_that_look_like_addresses_lead_nowhere(store, wire, tmp_path):
    if store.make == "s3rver":
        pytest.skip("s3rver takes a key for a path in its own folder, where two slashes are one")
    (tmp_path / "secret.json").write_text(json.dumps({"messages": conversation("?", "secret")}))
    for suffix in ("mp4", "json"):
        storage.write_bytes(f"s3://videos/set/{tmp_path}/secret.{suffix}", b"{}")  # after two slashes
        storage.write_bytes(f"s3://videos/other/secret.{suffix}", (tmp_path / "secret.json").read_bytes())
    assert f"{tmp_path}/secret.json" in storage.names_in("s3://videos/set")
    with pytest.raises(BadManifest, match="is not a name inside s3://videos/set"):
        Manifest("s3://videos/set")
    storage.remove_folder("s3://videos/set")
    assert (tmp_path / "secret.json").exists()
    # Text: keys of these names.
    for name in ("s3://videos/other/secret.json", "file:///etc/passwd", "..\\x", "%2e%2e/x"):
        uri = storage.safe_join("s3://videos/set", name)
        with pytest.raises(FileNotFoundError, match="no such object"):
            storage.read_bytes(uri)
        storage.write_bytes(uri, b"ours")
        assert storage.read_bytes(uri) == b"ours"
    assert len(storage.names_in("s3://videos/set")) == 4
    for name in ("/etc/passwd", "../other/secret.json", ".", ""):
        with pytest.raises(storage.BadLocation, match="is not a name inside"):
            storage.safe_join("s3://videos/set", name)


def test_a_seal_in_the_store_names_nothing_in_another_bucket(wire):
    rows = [{"id": "a", "videos": [], "messages": "[]", "kind": None, "line": 1, "chars": 2, "seconds": []}]
    table = pa.Table.from_pylist(rows, manifest_shards.SCHEMA)
    for folder in ("s3://videos/prepared", "s3://videos/others"):
        manifest_shards.seal(folder, [manifest_shards.write_part(folder, 0, table)], table, {})
    assert len(Manifest("s3://videos/prepared")) == 1
    seal = json.loads(storage.read_bytes("s3://videos/prepared/_prepared.json"))
    for name, says in {
        "s3://videos/others/part-00000.parquet": "FileNotFoundError: s3://videos/prepared/s3://videos/others/part",
        "../others/part-00000.parquet": "_prepared.json cannot be used: '../others/part-00000.parquet' is not a name",
        "/etc/passwd": "_prepared.json cannot be used: '/etc/passwd' is not a name",
    }.items():
        seal["parts"][0]["name"] = name
        storage.write_bytes("s3://videos/prepared/_prepared.json", json.dumps(seal).encode())
        with pytest.raises(BadManifest, match=re.escape(says)):
            Manifest("s3://videos/prepared")


def test_small_objects_only(store, wire):
    # s3rver promises a byte of an empty object and never sends it, where S3 answers 416.
    for data in (b"1", b"12", b"123", *([b""] if store.make != "s3rver" else [])):
        storage.write_bytes("s3://videos/small", data)
        before = wire.requests
        if len(data) > 2:
            with pytest.raises(ValueError, match="has more than 2 bytes"):
                storage.read_at_most("s3://videos/small", 2)
        else:
            assert storage.read_at_most("s3://videos/small", 2) == data
        assert wire.requests == before + 1
    with pytest.raises(FileNotFoundError):
        storage.read_at_most("s3://videos/none", 2)
