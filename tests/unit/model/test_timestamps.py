"""The time of each frame as text before its tokens: in training, in prompts of every form, and in the model."""

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, pipeline

from crosslmm.data.samples.clips import encode_clip
from crosslmm.data.video.decode import decode_video
from crosslmm.model.attention_plan import plan_densely, plan_t2v, plan_v2v, plan_videos
from crosslmm.model.loading import build_model, build_processor
from crosslmm.model.processing import VIDEO_TOKEN
from crosslmm.model.processing.media import times_of_videos
from tests.support.common import conversation, open_gates, random_frames

FRAMES, TIMES = random_frames(3, 1), [0.0, 1.25, 61.04]
VIDEO, IMAGE = {"type": "video"}, {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


MIXED = [
    {"role": "user", "content": [text("Look: "), VIDEO, text(" and "), IMAGE, text(" What is red?")]},
    {"role": "assistant", "content": "a circle"},
    {"role": "user", "content": [text("And here? "), VIDEO, text("When?")]},
]
MIXED_VIDEOS = [FRAMES, random_frames(1, 2), random_frames(2, 3)]
MIXED_TIMES = [TIMES, [0.0], [0.5, 2.5]]
PLAIN = [{"role": "user", "content": [VIDEO, text("When is it red?")]}]
WORDS = [{"role": "user", "content": [text("When?")]}]
SAMPLES = [(MIXED, MIXED_VIDEOS, MIXED_TIMES), (PLAIN, [random_frames(2, 4)], [[3.0, 9.0]]), (WORDS, [], [])]


@pytest.fixture(scope="module")
def stamped(config):
    return build_processor(config.model, config.data.model_copy(update={"timestamps": True}))


@pytest.fixture
def variant(config, stamped):
    """A model with the given settings, and open gates."""

    def build(**settings):
        model = build_model(config.model.model_copy(update=settings), stamped, seed=0).eval()
        open_gates(model)
        return model

    return build


def batch_of(processor, *samples, **options):
    talks, videos, times = zip(*samples, strict=True)
    return processor(list(talks), list(videos), times=list(times), for_generation=True, **options)


def spell(processor, ids):
    return processor.tokenizer.decode(ids, skip_special_tokens=False)


def test_the_time_of_each_frame_stands_before_its_tokens(stamped):
    batch = batch_of(stamped, SAMPLES[0])
    frame = VIDEO_TOKEN * stamped.tokens_per_frame
    assert spell(stamped, batch["input_ids"][0]) == (
        f"<|im_start|>user\nLook: <0.0 seconds>{frame}<1.2 seconds>{frame}<61.0 seconds>{frame} and {frame} "
        "What is red?<|im_end|>\n<|im_start|>assistant\na circle<|im_end|>\n"
        f"<|im_start|>user\nAnd here? <0.5 seconds>{frame}<2.5 seconds>{frame}When?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_model_without_times_is_asked_without(processor):
    with_times, without = batch_of(processor, SAMPLES[0]), processor([MIXED], [MIXED_VIDEOS], for_generation=True)
    assert all(torch.equal(with_times[key], without[key]) for key in without if key != "plan")
    assert processor.stamp_length(12.0) == 0


def test_times_are_not_learned_and_count(stamped):
    talk = conversation("When?", "at 2")
    batch = stamped([talk], [[FRAMES]], times=[[TIMES]])
    assert spell(stamped, batch["labels"][batch["labels"] != -100]) == "at 2<|im_end|>"
    length = batch["input_ids"].shape[1]
    assert stamped.length(talk, [3], times=[TIMES]) == length
    assert stamped.length(talk, [2], times=[TIMES[:2]]) == (
        length - stamped.stamp_length(61.0) - stamped.tokens_per_frame
    )
    (prompt,) = stamped([talk[:1]], [[FRAMES]], times=[[TIMES]], for_generation=True)["input_ids"]
    assert torch.equal(prompt, batch["input_ids"][0, : len(prompt)])


def test_the_context_check_counts_times(config, stamped):
    length = stamped.length(PLAIN, [3], True, [TIMES])
    short = type(stamped)(stamped.tokenizer, **sizes(stamped), max_length=length + 6, timestamps=True)
    short.require_room(PLAIN, [3], "at 2", 8, times=[[0.0, 1.25, 6.0]])
    with pytest.raises(ValueError, match=rf"takes {length + 7} positions, and the decoder has {length + 6}"):
        short.require_room(PLAIN, [3], "at 2", 8, times=[TIMES])
    with pytest.raises(ValueError, match=f"the decoder has {length + 6}"):
        short([MIXED], [MIXED_VIDEOS], times=[MIXED_TIMES])


def sizes(processor):
    return {"image_size": processor.image_size, "tokens_per_frame": processor.tokens_per_frame}


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (None, "nothing says those of video 1: give times"),
        ([[None]], "nothing says those of video 1"),
        ([[[0.0, 1.0]]], "times of video 1 are 2 values for 3 frames"),
        ([[[0.0, 1.0, float("nan")]]], "one number of seconds"),
        ([[[0.0, 1.0, -2.0]]], "at least 0"),
        ([[TIMES, TIMES]], "times are given for 2 videos and images, and there are 1"),
    ],
)
def test_a_video_without_times_is_refused(stamped, times, message):
    with pytest.raises(ValueError, match=message):
        stamped([PLAIN], [[FRAMES]], times=times, for_generation=True)


def test_the_option_is_saved_with_the_processor(stamped, tmp_path):
    stamped.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.timestamps is True
    assert torch.equal(batch_of(loaded, SAMPLES[0])["input_ids"], batch_of(stamped, SAMPLES[0])["input_ids"])
    with pytest.raises(ValueError, match="nothing says those of video 1"):
        loaded([PLAIN], [[FRAMES]], for_generation=True)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    path.write_bytes(encode_clip(random_frames(8, 5), fps=2))
    return path


def prompt_of(processor, part, **options):
    talk = [{"role": "user", "content": [part, text("When is it red?")]}]
    return processor.apply_chat_template(talk, tokenize=True, return_dict=True, add_generation_prompt=True, **options)


def test_files_are_asked_about_as_in_training(config, stamped, clip):
    video = decode_video(str(clip), config.data, stamped.image_size)
    assert video.times.tolist() == [0.5, 1.5, 2.5, 3.5]
    expected = batch_of(stamped, (PLAIN, [video.images], [video.times.tolist()]))
    formatted = stamped.apply_chat_template(PLAIN, add_generation_prompt=True)
    options = config.data.model_dump(include={"num_frames"})
    for batch in (
        prompt_of(stamped, {"type": "video", "path": str(clip)}, **options),
        stamped(text=formatted, videos=str(clip), **options),
        prompt_of(stamped, {"type": "video", "video": video.images, "times": video.times}),
        stamped(text=formatted, videos=video.images, times=video.times),
        stamped(text=[formatted], videos=[video.images], times=[video.times.tolist()]),
    ):
        assert all(torch.equal(batch[key], expected[key]) for key in batch)


def test_a_rate_of_frames_gives_their_times(stamped):
    for key in ("fps", "sample_fps"):
        batch = prompt_of(stamped, {"type": "video", "video": list(FRAMES), key: 2})
        assert torch.equal(batch["input_ids"], batch_of(stamped, (PLAIN, [FRAMES], [[0.0, 0.5, 1.0]]))["input_ids"])


def test_images_need_no_times(stamped):
    talk = [{"role": "user", "content": [IMAGE, text("Which?")]}]
    expected = batch_of(stamped, (talk, [FRAMES[:1]], [[0.0]]))
    assert "seconds" not in spell(stamped, expected["input_ids"][0])
    formatted = stamped.apply_chat_template(talk, add_generation_prompt=True)
    assert torch.equal(stamped(text=formatted, images=FRAMES[0])["input_ids"], expected["input_ids"])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "video", "video": FRAMES}, "nothing says those of video 1"),
        ({"type": "video", "video": FRAMES, "times": [1.0]}, "1 values for 3 frames"),
        ({"type": "video", "video": FRAMES, "fps": 0}, "fps a number of frames per second"),
        ({"type": "video", "video": FRAMES, "times": "soon"}, "times is a list of seconds"),
    ],
)
def test_frames_in_memory_without_times_are_refused(stamped, part, message):
    with pytest.raises(ValueError, match=message):
        prompt_of(stamped, part)


def test_times_of_a_file_are_its_own(stamped, clip):
    with pytest.raises(ValueError, match="a file says that itself"):
        prompt_of(stamped, {"type": "video", "path": str(clip), "fps": 2})
    formatted = stamped.apply_chat_template(PLAIN)
    with pytest.raises(ValueError, match="times are given for 2 videos, and there are 1"):
        stamped(text=formatted, videos=str(clip), times=[[1.0], [2.0]])


@pytest.mark.filterwarnings("ignore")
def test_the_pipeline_asks_with_times(config, stamped, clip, tmp_path, monkeypatch):
    build_model(config.model, stamped, seed=0).save_pretrained(tmp_path)
    stamped.save_pretrained(tmp_path)
    answer = pipeline("image-text-to-text", model=str(tmp_path))
    asked = []
    generate = answer.model.generate
    monkeypatch.setattr(answer.model, "generate", lambda **inputs: asked.append(inputs) or generate(**inputs))
    answer([{"role": "user", "content": [{"type": "video", "video": str(clip)}, text("When?")]}], max_new_tokens=2)
    part = {"type": "video", "video": FRAMES, "times": TIMES}
    answer([{"role": "user", "content": [part, text("When?")]}], max_new_tokens=2)
    prompts = [spell(stamped, inputs["input_ids"][0]) for inputs in asked]
    assert [prompt.count(" seconds>") for prompt in prompts] == [config.data.num_frames, 3]


SETTINGS = [{}, {"v2v_scope": "frame"}, {"cross_attention_rotary": True}, {"attention": "eager"}]


@torch.no_grad()
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_batch_of_stamped_conversations_equals_each_alone(variant, stamped, settings):
    model = variant(**settings)
    together = model(**batch_of(stamped, *SAMPLES)).logits
    for i, sample in enumerate(SAMPLES):
        alone = model(**batch_of(stamped, sample)).logits[0]
        torch.testing.assert_close(together[i, -len(alone) :], alone, atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_cached_equals_uncached_with_times(variant, stamped, settings):
    model = variant(**settings)
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    prompts = batch_of(stamped, *SAMPLES)
    cached = model.generate(**prompts, **options)
    uncached = model.generate(**prompts, **options, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    for with_cache, without in zip(cached.logits, uncached.logits, strict=True):
        torch.testing.assert_close(with_cache, without, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_the_answer_depends_on_the_times(variant, stamped):
    model = variant()
    logits = [
        model(**batch_of(stamped, (PLAIN, [FRAMES], [times]))).logits[0, -1] for times in (TIMES, [0.0, 1.25, 62.04])
    ]
    assert not torch.allclose(*logits, atol=1e-4)


def layout(stamped):
    """The placeholders and the videos of the mixed conversation, and the tokens of a frame."""
    batch = batch_of(stamped, SAMPLES[0])
    is_video = batch["input_ids"] == stamped.video_token_id
    return is_video, batch["num_frames"], stamped.tokens_per_frame


def frames_seen(plan, positions, patches):
    """How many frames each position attends to, counted from the first of its sequence of keys."""
    seen = np.zeros(positions, int)
    rows_of_groups = plan.rows_N.split([group.queries for group in plan.groups])
    for rows, group in zip(rows_of_groups, plan.groups, strict=True):
        seen[rows.numpy()] = group.keys // patches
    return seen


def test_times_attend_to_the_videos_before_their_own(stamped):
    is_video, num_frames, tokens = layout(stamped)
    plan = plan_t2v(plan_videos(is_video, num_frames, tokens), patches=5)
    seen = frames_seen(plan, is_video.shape[1], 5)
    frame_of = is_video[0].cumsum(0).numpy() // tokens  # complete frames before each position
    whole = np.select([frame_of < 3, frame_of < 4, frame_of < 6], [0, 3, 4], 6)
    assert np.array_equal(seen, np.where(is_video[0], 0, whole))
    # Text up to the end of the image, and up to the end of the second video: no group for each time.
    assert [group.keys for group in plan.groups] == [15, 20, 30]


@pytest.mark.parametrize("scope", ["video", "frame"])
def test_pooled_tokens_attend_as_without_times(stamped, processor, scope):
    is_video, num_frames, tokens = layout(stamped)
    plan = plan_v2v(plan_videos(is_video, num_frames, tokens), tokens, 5, scope)
    plain = batch_of(processor, SAMPLES[0])["input_ids"] == processor.video_token_id
    without = plan_v2v(plan_videos(plain, num_frames, tokens), tokens, 5, scope)
    assert plan.groups == without.groups
    assert torch.equal(plan.frame_N, without.frame_N)
    assert torch.equal(plan.rows_N, is_video[0].nonzero()[:, 0])


def test_the_exported_plan_is_the_same(stamped):
    is_video, num_frames, tokens = layout(stamped)
    grouped = plan_t2v(plan_videos(is_video, num_frames, tokens), patches=1)
    _, dense = plan_densely(is_video, num_frames, 6, tokens, "video")
    assert np.array_equal(frames_seen(grouped, is_video.shape[1], 1), dense.visible_BLF[0].sum(-1).numpy())
    assert torch.equal(dense.query_frame_BL[0, grouped.rows_N], grouped.frame_N)


def test_times_of_some_videos_may_be_those_of_their_files():
    assert times_of_videos([None, [0.0, 1.0]], [4, 2]) == [None, [0.0, 1.0]]
    assert times_of_videos([[0.0, 1.0], None], [2, 4]) == [[0.0, 1.0], None]
    assert times_of_videos([0.0, 1.0], [2]) == [[0.0, 1.0]]
