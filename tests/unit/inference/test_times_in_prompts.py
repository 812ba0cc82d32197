"""A model that was trained with the times of frames is asked with them, and with the same, wherever it answers."""

import functools
import json

import numpy as np
import pytest

from crosslmm import storage
from crosslmm.data.collate import collate, collate_for_validation, collate_questions
from crosslmm.data.dataset import BlockLayout, ReadSamples, unpack_block
from crosslmm.data.feature_cache import FeatureCache, create_feature_folder, write_index, write_shard
from crosslmm.data.feature_format import FeatureRecipe
from crosslmm.data.manifest import Manifest, Rows
from crosslmm.data.sampler import DeterministicSampler
from crosslmm.data.samples import moments
from crosslmm.data.video.decode_pool import Decoder
from crosslmm.evaluate.asking.batch_answerer import BatchAnswerer, DecodedVideos
from crosslmm.evaluate.questions.question import Question, Subtitles
from crosslmm.inference.answerer import Answerer
from crosslmm.inference.evaluate import evaluate
from crosslmm.model.loading import build_model, build_processor
from tests.support.common import random_frames
from tests.support.exports import save_exported

ASKED = "<|im_start|>user\n{}{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def stamped(config):
    """The configuration of a run with times."""
    return config.model_copy(update={"data": config.data.model_copy(update={"timestamps": True})})


@pytest.fixture(scope="module")
def processor(stamped):
    return build_processor(stamped.model, stamped.data)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moments")
    moments.write_moments(str(folder), train=3, held_out=3)
    return Manifest(str(folder / "held_out.jsonl"))


@pytest.fixture(scope="module")
def answerer(stamped, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    save_exported(folder, build_model(stamped.model, processor, seed=0), processor, stamped)
    return Answerer(folder, device="cpu")


@pytest.fixture
def prompts(answerer, monkeypatch):
    """The prompts that the model is asked, without padding."""
    asked = []
    generate = answerer.model.generate

    def spelt(**inputs):
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            asked.append(answerer.processor.tokenizer.decode(ids[mask.bool()]))
        return generate(**inputs)

    monkeypatch.setattr(answerer.model, "generate", spelt)
    return asked


def prompt(times, question=moments.QUESTION, tokens_per_frame=4):
    frame = "<|video_pad|>" * tokens_per_frame
    return ASKED.format("".join(f"<{time:.1f} seconds>{frame}" for time in times), question)


# Four frames that are shown for 1, 2 and 3 s.
TIMES = [[step * i for i in range(4)] for step in (1, 2, 3)]
EXPECTED = [prompt(times) for times in TIMES]


def read_samples(manifest, stamped, decoder):
    """The rows as a worker of a run gets them."""
    read = ReadSamples.__new__(ReadSamples)
    read.layout = BlockLayout(DeterministicSampler((3,), 3, None), 1, 0, 1, 3)
    read.rows, read.decoder, read.unreadable = Rows([manifest]), decoder, {}
    return list(unpack_block(read({"block": np.array([0])})))


@pytest.fixture(scope="module")
def from_videos(manifest, stamped, processor):
    data = stamped.data.model_copy(update={"roots": manifest.roots})
    with Decoder(data, processor.image_size) as decoder:
        return read_samples(manifest, stamped, decoder)


@pytest.fixture(scope="module")
def from_features(manifest, stamped, from_videos, tmp_path_factory):
    recipe = FeatureRecipe.from_config(stamped.data, 48, "fp32", 36, 64, "e" * 64, "bf16")
    folder = create_feature_folder(str(tmp_path_factory.mktemp("features")), recipe)
    uris = [row["videos"][0] for row in manifest.rows]
    videos = [
        (uri, storage.version(uri), np.zeros((4, 36, 64), np.float32), sample.times[0])
        for uri, sample in zip(uris, from_videos, strict=True)
    ]
    write_index(folder, write_shard(folder, videos, "bf16")[0])
    return read_samples(manifest, stamped, FeatureCache(folder))


def spelt(processor, batch):
    return [
        processor.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def test_training_and_validation_read_the_times(processor, from_videos, from_features):
    require_room = functools.partial(processor.require_room, new_tokens=8)
    for samples, size in ((from_videos, None), (from_features, (36, 64))):
        assert [sample.times for sample in samples] == [[times] for times in TIMES]
        process = functools.partial(processor, features=size)
        learnt = spelt(processor, collate(samples, process))
        answers = [sample.messages[1]["content"] for sample in samples]
        whole = [f"{asked}{answer}<|im_end|>\n" for asked, answer in zip(EXPECTED, answers, strict=True)]
        assert learnt == whole
        validation = collate_for_validation(samples, process, require_room)
        assert spelt(processor, validation.inputs) == whole
        (questions,) = validation.questions
        assert spelt(processor, questions.prompts()) == EXPECTED


def test_room_for_an_answer_counts_times(processor, from_videos):
    longest = max(processor.length(s.messages[:1], [4], True, s.times) for s in from_videos)
    short = type(processor)(
        processor.tokenizer, image_size=48, tokens_per_frame=4, max_length=longest + 6, timestamps=True
    )
    collate_questions(from_videos, short, functools.partial(short.require_room, new_tokens=7))
    with pytest.raises(ValueError, match=f"takes {longest + 7} positions"):
        collate_questions(from_videos, short, functools.partial(short.require_room, new_tokens=8))


def test_answers_are_asked_with_times(answerer, manifest, prompts):
    videos = [row["videos"][0] for row in manifest.rows]
    answerer(videos, [moments.QUESTION] * 3, max_new_tokens=2)
    assert prompts == EXPECTED
    prompts.clear()
    answers = answerer.answer_rows(videos, [moments.QUESTION] * 3, manifest.roots, 2)
    assert [error for _, error in answers] == [None] * 3
    assert prompts == EXPECTED
    prompts.clear()
    evaluate(answerer, manifest)
    assert prompts == EXPECTED


def test_a_conversation_keeps_its_times(answerer, manifest, prompts):
    talk = answerer.start_conversation(manifest.rows[2]["videos"][0])
    first = talk.ask(moments.QUESTION, max_new_tokens=2)
    talk.ask("Sure?", max_new_tokens=2)
    assert prompts[0] == EXPECTED[2]
    assert prompts[1] == f"{EXPECTED[2]}{first}<|im_end|>\n{ASKED.format('', 'Sure?')}"
    assert talk._cached is not None


def test_an_image_has_no_time(answerer, manifest, prompts, tmp_path):
    from PIL import Image

    Image.fromarray(random_frames(1)[0]).save(tmp_path / "still.png")
    answerer([str(tmp_path / "still.png")], ["Which?"], max_new_tokens=2)
    talk = answerer.start_conversation(str(tmp_path / "still.png"))
    talk.ask("Which?", max_new_tokens=2)
    assert prompts == [ASKED.format("<|video_pad|>" * 4, "Which?")] * 2


def test_evaluation_asks_with_times(answerer, from_videos, prompts):
    watched = [DecodedVideos.of(sample) for sample in from_videos]
    questions = [Question(sample.id, ("v",), sample.messages[:1], "1") for sample in from_videos]
    replies = BatchAnswerer(answerer, 2)([(one, [question]) for one, question in zip(watched, questions, strict=True)])
    assert sorted(prompts) == sorted(EXPECTED)
    lengths = [reply.prompt_tokens for (reply,) in replies]
    assert lengths == [
        answerer.processor.length(q.messages, [4], True, [t]) for q, t in zip(questions, TIMES, strict=True)
    ]


def test_a_video_that_subtitles_split_keeps_its_times(answerer, from_videos, prompts):
    subtitles = Subtitles(((1.5, 4.5, "now"),), interleaved=True)
    asked = Question("1", ("v",), from_videos[1].messages[:1], "1", subtitles=subtitles)
    BatchAnswerer(answerer, 2)([(DecodedVideos.of(from_videos[1]), [asked])])
    frame = "<|video_pad|>" * 4
    parts = [f"<0.0 seconds>{frame}<2.0 seconds>{frame}", "now", f"<4.0 seconds>{frame}<6.0 seconds>{frame}"]
    assert prompts == [ASKED.format("\n".join(parts) + "\n", moments.QUESTION)]


def test_the_sample_set_needs_times(manifest, tmp_path):
    """Which frame has the shape does not tell the answer: the same frame is at three times."""
    moments.write_moments(str(tmp_path), train=210, held_out=3)
    answers: dict[int, set[int]] = {}
    for i, line in enumerate((tmp_path / "train.jsonl").read_text().splitlines()):
        answer = int(json.loads(line)["messages"][1]["content"])
        answers.setdefault(answer // moments.FRAME_S[i % 3], set()).add(answer)
    assert answers == {frame: {frame, 2 * frame, 3 * frame} for frame in range(1, 4)}
