"""The feature cache never returns features that are damaged, outdated or made by another recipe."""

import functools
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from crosslmm import storage
from crosslmm.cli import parse_run
from crosslmm.config import BadConfig, DataConfig
from crosslmm.data.dataset import rows_per_block
from crosslmm.data.feature_cache import (
    BadFeatures,
    FeatureCache,
    IndexEntry,
    create_feature_folder,
    write_index,
    write_shard,
)
from crosslmm.data.feature_format import FORMAT, FeatureRecipe, from_bf16, pack, to_bf16, unpack
from crosslmm.data.manifest import Manifest, Rows
from crosslmm.data.video.decode import VideoFailure
from crosslmm.encode.recipe import require_encoder
from crosslmm.model.loading import build_encoder, build_model
from crosslmm.model.vision_encoder import digest
from tests.support.common import conversation, open_gates, random_frames

DATA = DataConfig(num_frames=4)
PATCHES, WIDTH = 6, 8


def recipe(dtype="bf16", data=DATA, **changes):
    defaults = {"image_size": 48, "precision": "fp32", "patches": PATCHES, "width": WIDTH, "encoder": "e" * 64}
    return FeatureRecipe.from_config(data, dtype=dtype, **defaults | changes)


def seconds(frames):
    return [0.5 + 1.25 * i for i in range(frames)]


def values(frames, seed=0):
    return np.random.default_rng(seed).normal(0, 3, (frames, PATCHES, WIDTH)).astype(np.float32)


@pytest.fixture(params=["bf16", "int8"])
def dtype(request):
    return request.param


@pytest.fixture
def videos(tmp_path):
    """Two videos and a part of one of them; their content does not matter."""
    paths = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 100)
    return [str(paths[0]), str(paths[1]), f"{paths[0]}#t=1,2"]


@pytest.fixture
def cached(tmp_path, videos, dtype):
    """The folder of their features; one more video is unreadable."""
    folder = create_feature_folder(str(tmp_path / "features"), recipe(dtype))
    versions = [storage.version(uri.split("#")[0]) for uri in videos]
    features = [
        (uri, version, values(n + 1, n), seconds(n + 1))
        for n, (uri, version) in enumerate(zip(videos, versions, strict=True))
    ]
    entries, _, _ = write_shard(folder, features, dtype)
    unreadable = IndexEntry(str(tmp_path / "gone.mp4"), None, 0, reason="no such file", stage="read")
    write_index(folder, [*entries, unreadable])
    return folder


def test_every_field_of_the_recipe_changes_the_key():
    changed = [
        recipe(dtype="int8"),
        *(recipe(**{name: 1}) for name in ("image_size", "patches", "width")),
        recipe(precision="bf16"),
        recipe(encoder="f" * 64),
        recipe(data=DataConfig(num_frames=5)),
        recipe(data=DataConfig(num_frames=4, sampling="fps")),
        recipe(data=DataConfig(num_frames=4, fps=2)),
        recipe(data=DataConfig(num_frames=4, decoder="decord")),
        recipe().model_copy(update={"format": FORMAT + 1}),
    ]
    assert len({one.key for one in [recipe(), *changed]}) == len(changed) + 1
    assert len(changed) == len(FeatureRecipe.model_fields)
    # The default decoder and its explicit name are the same decoder.
    assert recipe(data=DataConfig(num_frames=4, decoder="pyav")).key == recipe().key


@pytest.mark.parametrize(
    ("setting", "recorded"),
    [("auto", "pyav"), ("pyav", "pyav"), ("decord", "decord"), ("torchcodec", "torchcodec")],
)
def test_recipe_records_the_decoder_that_stored_caches_name(setting, recorded):
    assert recipe(data=DataConfig(decoder=setting)).decoder == recorded


def test_bf16_rounds_exactly_as_torch():
    all_bits = np.arange(2**16, dtype=np.uint16)
    finite = all_bits[np.isfinite(from_bf16(all_bits))]
    x = np.concatenate([values(50).ravel(), from_bf16(finite), from_bf16(finite[:-1]) * np.float32(1.00390625)])
    assert np.array_equal(to_bf16(x), torch.from_numpy(x).bfloat16().view(torch.uint16).numpy())
    assert np.array_equal(to_bf16(from_bf16(finite)), finite)


def test_rounding_error_is_bounded_and_reported(tmp_path):
    x = values(5)
    x[0, 0] = 0
    rounded = from_bf16(unpack(pack(x, "int8"), x.shape, "int8"))
    largest = np.abs(x).max(axis=-1, keepdims=True)
    # Half a step of the scale, which is itself rounded to float16, and then bfloat16's rounding.
    assert (np.abs(rounded - x) <= largest / 127 * 0.5 * 1.001 + largest * (2**-11 + 2**-8)).all()
    assert not rounded[0, 0].any()
    for dtype, limit in {"bf16": 0.002, "int8": 0.01}.items():
        _, squared_error, squared_values = write_shard(str(tmp_path), [("a", None, x, seconds(5))], dtype)
        again = from_bf16(unpack(pack(x, dtype), x.shape, dtype))
        relative_error = (squared_error / squared_values) ** 0.5
        assert relative_error == pytest.approx(np.linalg.norm(again - x) / np.linalg.norm(x), rel=1e-4)
        assert 0 < relative_error < limit


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_features_are_refused(value, dtype):
    x = values(2)
    x[1, 2, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        pack(x, dtype)


def test_features_are_read_in_any_order_as_they_were_stored(cached, videos, dtype):
    features = pickle.loads(pickle.dumps(FeatureCache(cached)))  # as Ray ships it to workers
    for order in ([2, 0, 1], [1, 1, 0]):
        read = features([videos[n] for n in order])
        for n, video in zip(order, read, strict=True):
            assert video.times.tolist() == seconds(n + 1)
            assert np.array_equal(video.images, unpack(pack(values(n + 1, n), dtype), (n + 1, PATCHES, WIDTH), dtype))
    (gone,) = features([str(Path(videos[0]).parent / "gone.mp4")])
    assert gone == VideoFailure("no such file", "read")


def test_damaged_or_missing_shard_is_refused(cached, videos):
    (shard,) = Path(cached).glob("shard-*")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1  # of the last video
    shard.write_bytes(data)
    features = FeatureCache(cached)
    features([videos[0]])
    with pytest.raises(BadFeatures, match=r"#t=1,2: its features are damaged: delete .*shard-.*jobs/encode\.py"):
        features([videos[2]])
    shard.write_bytes(data[:-1])
    with pytest.raises(BadFeatures, match="damaged"):
        features([videos[2]])
    shard.unlink()
    with pytest.raises(BadFeatures, match=r"lost: .*jobs/encode\.py"):
        features([videos[0]])
    # Then the video is encoded again.
    features = FeatureCache(cached)
    assert not features.is_current(videos[0], features.find(videos[0]).version)
    with pytest.raises(BadConfig, match=r"lacks 3 videos of the manifests, .*a\.mp4 first"):
        features.require(recipe(), videos)


def test_changed_video_is_refused_until_encoded_again(cached, videos, dtype):
    features = FeatureCache(cached)
    os.utime(videos[1], ns=(0, 0))
    features([videos[0]])
    with pytest.raises(BadFeatures, match=r"b\.mp4: has changed or disappeared .*jobs/encode\.py"):
        features([videos[1]])
    version = storage.version(videos[1])
    assert not features.is_current(videos[1], version)
    # The latest index entry counts, whatever the order of URIs.
    entries, _, _ = write_shard(cached, [(videos[1], version, values(3, 9), seconds(3))], dtype)
    write_index(cached, entries)
    again = FeatureCache(cached)
    assert again.is_current(videos[1], version)
    assert np.array_equal(again.read(videos[1]).images, unpack(pack(values(3, 9), dtype), (3, PATCHES, WIDTH), dtype))
    Path(videos[1]).unlink()
    with pytest.raises(BadFeatures, match="has changed or disappeared"):
        again([videos[1]])


def test_unreadable_video_that_becomes_readable_is_refused(cached, videos):
    gone = Path(videos[0]).parent / "gone.mp4"
    gone.write_bytes(b"here")
    with pytest.raises(BadFeatures, match="has changed"):
        FeatureCache(cached)([str(gone)])
    assert not FeatureCache(cached).is_current(str(gone), None)


def test_differences_of_the_recipe_are_refused_and_named(cached, videos):
    features = FeatureCache(cached)
    features.require(recipe(encoder="not known yet"), videos)
    other = recipe(data=DataConfig(num_frames=8, sampling="fps"), precision="bf16")
    with pytest.raises(BadConfig) as refused:
        features.require(other, videos)
    for difference in ("num_frames 4 and 8", "sampling uniform and fps", "precision fp32 and bf16"):
        assert difference in str(refused.value)
    assert "fps 1" not in str(refused.value)
    with pytest.raises(BadConfig, match=r"lacks 1 videos of the manifests, /nowhere\.mp4 first"):
        features.require(recipe(), [*videos, "/nowhere.mp4"])


def test_folder_with_invalid_files_is_refused(cached, tmp_path):
    recipe_file = Path(cached) / "features.json"
    good = recipe_file.read_text()
    for bad in (
        good.replace('"fps": 1.0', '"fps": 2.0'),
        good.replace(f'"format": {FORMAT}', f'"format": {FORMAT - 1}'),
        "[]",
        "{",
        "",
    ):
        recipe_file.write_text(bad)
        with pytest.raises(BadConfig, match=r"data\.features: .*no features can be read there"):
            FeatureCache(cached)
    recipe_file.write_text(good)
    next(Path(cached).glob("index-*")).write_bytes(b"PAR1")
    with pytest.raises(BadConfig, match="no features can be read there"):
        FeatureCache(cached)
    with pytest.raises(BadConfig, match="FileNotFoundError"):
        FeatureCache(str(tmp_path / "nowhere"))


def test_trained_encoder_is_refused():
    with pytest.raises(
        BadConfig, match=r"data\.features: .*frozen.*train\.learning_rate\.vision is 0\.001; (make it|set it to) 0"
    ):
        parse_run(["--data.features=/somewhere"], "")
    frozen = parse_run(["--data.features=/somewhere", "--train.learning_rate.vision=0"], "")
    assert frozen.data.features == "/somewhere"


def test_digest_depends_on_the_encoder_only(config, processor, tmp_path):
    ours = digest(build_encoder(config.model, processor, seed=0))
    model = build_model(config.model, processor, seed=0)
    assert digest(model.vision_tower) == ours != digest(build_encoder(config.model, processor, seed=1))
    model.vision_tower.save_pretrained(tmp_path)
    published = config.model.model_copy(update={"vision_weights": str(tmp_path)})
    assert digest(build_encoder(published, processor, seed=1)) == ours
    # Trials of a sweep differ in what follows the encoder.
    for changes in ({"pool_stride": 1}, {"cross_attention_every": 1}, {"v2v": False}):
        other = build_model(config.model.model_copy(update=changes), processor, seed=0)
        assert digest(other.vision_tower) == ours
    # With another number of heads the same weights compute something else.
    heads = config.model.model_copy(update={"vision": config.model.vision | {"num_attention_heads": 2}})
    assert digest(build_encoder(heads, processor, seed=0)) != ours


def test_features_of_another_encoder_are_refused(config, processor):
    model = build_model(config.model, processor, seed=0)
    require_encoder(model, recipe(encoder=digest(build_encoder(config.model, processor, seed=0))), "x")
    for seed, change in ((1, {}), (0, {"vision": config.model.vision | {"layer_norm_eps": 1e-3}})):
        other = build_model(config.model.model_copy(update=change), processor, seed=seed)
        with pytest.raises(BadConfig, match=r"data\.features: x was made by another encoder .*jobs/encode\.py"):
            require_encoder(other, recipe(encoder=digest(model.vision_tower)), "x")


def test_rows_list_each_video_once(tmp_path):
    lines = [f'{{"id": "{i}", "video": "{v}.mp4", "messages": {MESSAGES}}}' for i, v in enumerate("abab")]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "more.jsonl").write_text("\n".join(lines).replace("b.mp4", "c.mp4"))
    rows = Rows([Manifest(str(tmp_path / name)) for name in ("rows.jsonl", "more.jsonl")])
    assert {Path(uri).name: video.row for uri, video in rows.videos().items()} == {"a.mp4": 0, "b.mp4": 1, "c.mp4": 5}


MESSAGES = '[{"role": "user", "content": [{"type": "video"}]}, {"role": "assistant", "content": "x"}]'


def test_rows_per_block_follows_from_bytes_read():
    data = DataConfig(num_frames=64)
    assert rows_per_block(data, 384, recipe(patches=729, width=1152)) == 1
    assert rows_per_block(data, 384, recipe(patches=16, width=64)) == 128
    assert rows_per_block(DataConfig(num_frames=2), 384, recipe(patches=729, width=1152)) == 4


@pytest.fixture
def samples():
    media = [[random_frames(4, 1)], [random_frames(2, 2), random_frames(1, 3)], []]
    video, text = {"type": "video"}, {"type": "text", "text": "What?"}
    conversations = [
        conversation("Which shape is it?", "red circle"),
        [{"role": "user", "content": [video, text, video]}, {"role": "assistant", "content": "left"}],
        conversation("Why?", "so", video=False),
    ]
    return conversations, media


def with_features(processor, model, conversations, media, **options):
    """Return the batch that the cache would give, in bfloat16."""
    size = (model.config.patches_per_frame, model.config.vision_config.hidden_size)

    def encoded(video):
        with torch.no_grad():
            return to_bf16(model.encode(torch.from_numpy(video).permute(0, 3, 1, 2)).numpy())

    encoded_media = [[encoded(video) for video in videos] for videos in media]
    return processor(conversations, encoded_media, features=size, **options)


def test_loss_from_features_matches_loss_from_pixels(model, processor, samples):
    open_gates(model)
    pixels, from_features = processor(*samples), with_features(processor, model, *samples)
    assert "pixel_values" not in from_features
    assert from_features["features"].dtype == torch.bfloat16
    for key in from_features.keys() - {"features", "plan"}:
        assert torch.equal(from_features[key], pixels[key])
    ours, theirs = from_features["plan"], pixels["plan"]
    assert torch.equal(ours.indices_N, theirs.indices_N)
    assert replace(ours, indices_N=None) == replace(theirs, indices_N=None)
    unrounded = model.encode(pixels["pixel_values"])
    exact = {**from_features, "features": unrounded}
    assert torch.equal(model(**exact).loss, model(**pixels).loss)
    # bfloat16 keeps 8 bits of each feature: errors of at most 2^-9, which the model does not amplify.
    torch.testing.assert_close(model(**from_features).loss, model(**pixels).loss, rtol=2e-3, atol=0)
    assert not torch.equal(model(**from_features).loss, model(**pixels).loss)


@torch.no_grad()
def test_answers_from_features_match_and_do_not_run_the_encoder(model, processor, samples):
    open_gates(model)
    conversations, media = [messages[:1] for messages in samples[0]], samples[1]
    pixels = processor(conversations, media, for_generation=True)
    unrounded = model.encode(pixels["pixel_values"])
    from_features = with_features(processor, model, conversations, media, for_generation=True)
    model.encode = None
    exact = {**from_features, "features": unrounded}
    for options in ({}, {"use_cache": False}):
        answers = model.generate(**exact, max_new_tokens=6, do_sample=False, **options)
        del model.encode
        assert torch.equal(answers, model.generate(**pixels, max_new_tokens=6, do_sample=False, **options))
        model.encode = None
        assert model.generate(**from_features, max_new_tokens=6, do_sample=False).shape == answers.shape
    del model.encode


def test_text_only_batch_gives_all_trained_parameters_a_gradient(model, processor):
    open_gates(model, 0.5)
    for parameter in model.vision_tower.parameters():
        parameter.requires_grad_(False)
    batch = with_features(processor, model, [conversation("What is red?", "a colour", video=False)], [[]])
    assert batch["features"].shape[0] == 0
    model.train()(**batch).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    pixels = processor([conversation("What is red?", "a colour", video=False)], [[]])
    assert torch.equal(model(**batch).loss, model(**pixels).loss)


def test_features_of_wrong_shape_or_dtype_are_refused(model, processor):
    conversations = [conversation("What?", "it")]
    size = (model.config.patches_per_frame, model.config.vision_config.hidden_size)
    for wrong in (np.zeros((2, *size), np.float32), np.zeros((2, size[0] - 1, size[1]), np.uint16), random_frames(2)):
        with pytest.raises(ValueError, match=r"features are .*uint16 \(frames, 36, 64\)"):
            processor(conversations, [[wrong]], features=size)
    batch = functools.partial(processor, features=size)(conversations, [[np.zeros((2, *size), np.uint16)]])
    with pytest.raises(ValueError, match=r"features are .*; the encoder gives floats \(frames, 36, 64\)"):
        model(**{**batch, "features": batch["features"][:, :5]})


@pytest.mark.parametrize(("dtype", "damage"), [("bf16", np.nan), ("bf16", np.inf), ("int8", np.nan), ("int8", 1e30)])
def test_a_video_whose_features_cannot_be_stored_costs_no_other(tmp_path, dtype, damage):
    """1e30 does not fit the scale of int8."""
    bad = values(2)
    bad[1, 2, 3] = damage
    folder = create_feature_folder(str(tmp_path), recipe(dtype))
    videos = [("a", None, values(3), seconds(3)), ("b", "etag", bad, seconds(2)), ("c", None, values(1), seconds(1))]
    entries, squared_error, _ = write_shard(folder, videos, dtype)
    assert [entry.frames for entry in entries] == [3, 0, 1]
    assert np.isfinite(squared_error)
    assert entries[1] == IndexEntry("b", "etag", 0, reason=entries[1].reason, stage="process")
    assert "not finite, or too large" in entries[1].reason
    write_index(folder, entries)
    cache = FeatureCache(folder)
    assert cache.find("b") == entries[1]
    assert cache.find("c").offset == entries[0].size
