"""The model is asked: batches, subtitles, likelihoods, and questions that it cannot be asked."""

import numpy as np
import pytest
import torch

from crosslmm.data.frame_sampling import SampledFrames
from crosslmm.evaluate.asking import batch_answerer as asking
from crosslmm.evaluate.asking.batch_answerer import BatchAnswerer, DecodedVideos
from crosslmm.evaluate.questions.question import Question, Subtitles, about
from crosslmm.inference.answerer import Answerer
from crosslmm.model.loading import build_model
from tests.support.common import open_gates, random_frames
from tests.support.exports import save_exported

SIDE = 48


@pytest.fixture(scope="module")
def answerer(config, processor, tmp_path_factory):
    """The tiny model with random weights and open gates, exported."""
    folder = tmp_path_factory.mktemp("exported")
    model = build_model(config.model, processor, seed=0)
    open_gates(model)
    save_exported(folder, model, processor, config)
    return Answerer(folder, "cpu")


def watched(seed: int, frames: int = 4) -> DecodedVideos:
    return DecodedVideos([random_frames(frames, seed, SIDE)], [np.arange(frames) / 2])


def question(text: str, name: str = "1", **fields) -> Question:
    return Question(name, **about("v.mp4", text), answer="", **fields)


def expected(answerer, seed: int, text: str, frames: int = 4) -> str:
    """Return the answer to one question alone, from its frames."""
    messages = about("v.mp4", text)["messages"]
    return answerer._generate([messages], [SampledFrames(random_frames(frames, seed, SIDE), np.arange(frames) / 2)], 6)[
        0
    ]


def test_answers_equal_those_to_each_question_alone(answerer):
    asked = [
        (watched(seed, frames), [question(f"{'What is it? ' * i}{seed}") for i in range(1, 4)])
        for seed, frames in enumerate([4, 1, 3])
    ]
    replies = BatchAnswerer(answerer, 6)(asked)
    for seed, (frames, of_video) in enumerate(zip([4, 1, 3], replies, strict=True)):
        for i, reply in enumerate(of_video, start=1):
            assert reply.text == expected(answerer, seed, f"{'What is it? ' * i}{seed}", frames)
            assert reply.times == [[round(t / 2, 3) for t in range(frames)]]
            assert 1 <= reply.new_tokens <= 6
    assert len({reply.text for of_video in replies for reply in of_video}) > 2


def test_each_video_is_encoded_once(answerer, monkeypatch):
    encoded = []
    encode = answerer.model.encode
    monkeypatch.setattr(answerer.model, "encode", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
    BatchAnswerer(answerer, 2)([(watched(0), [question(f"{i}?") for i in range(8)]), (watched(1, 3), [question("?")])])
    assert encoded == [4, 3]


@pytest.mark.parametrize("frames_of_batch", [1024, 16])
@pytest.mark.parametrize("likelihood", [False, True])
def test_the_decoder_reads_a_video_once_for_all_questions(answerer, monkeypatch, likelihood, frames_of_batch):
    """Questions of different lengths, so that padding stands between the video and some of them; in one batch, and in
    batches of two."""
    monkeypatch.setattr(asking, "BATCH_FRAMES", frames_of_batch)
    texts = [f"{'What is it? ' * (i % 4 + 1)}{i}" for i in range(8)]
    choices = {"choices": ("A", "B")} if likelihood else {}
    asked = [(watched(0, 8), [question(text, **choices) for text in texts]), (watched(1), [question("?", **choices)])]
    monkeypatch.setattr(asking, "SHARED_TOKENS", 10**9)
    apart = BatchAnswerer(answerer, 6, likelihood)(asked)
    monkeypatch.setattr(asking, "SHARED_TOKENS", 1)
    read = []

    def count(_, arguments, inputs):
        read.append(int((inputs["input_ids"] == answerer.processor.video_token_id).sum()))

    hook = answerer.model.register_forward_pre_hook(count, with_kwargs=True)
    shared = BatchAnswerer(answerer, 6, likelihood)(asked)
    hook.remove()
    assert sum(read) == (8 + 4) * answerer.model.config.tokens_per_frame
    texts, expected = ([reply.text for of_video in replies for reply in of_video] for replies in (shared, apart))
    assert texts == expected
    assert likelihood or len(set(texts)) > 1
    for reply, other in zip(shared[0], apart[0], strict=True):
        assert reply.likelihoods == pytest.approx(other.likelihoods, abs=2e-4)


def test_what_stands_before_a_video_is_not_shared(answerer, monkeypatch):
    """Where the texts differ before the video, each prompt is read as a whole."""
    monkeypatch.setattr(asking, "SHARED_TOKENS", 1)
    two = watched(0)

    def before(text):
        content = [{"type": "text", "text": text}, {"type": "video"}]
        return Question("1", ("v.mp4",), [{"role": "user", "content": content}], "")

    (replies,) = BatchAnswerer(answerer, 6)([(two, [before("One?"), before("Two, three?")])])
    (one,), (other,) = (BatchAnswerer(answerer, 6)([(two, [before(text)])])[0] for text in ("One?", "Two, three?"))
    assert [reply.text for reply in replies] == [one.text, other.text]


def test_batches_hold_as_much_as_they_may(answerer, monkeypatch):
    sizes = []
    generate = answerer.model.generate

    def counted(**inputs):
        sizes.append(len(inputs["input_ids"]))
        return generate(**inputs)

    monkeypatch.setattr(answerer.model, "generate", counted)
    asked = [(watched(0), [question(f"{'word ' * i}?") for i in range(20)])]
    whole = BatchAnswerer(answerer, 2)(asked)
    assert sizes == [20]
    sizes.clear()
    monkeypatch.setattr(asking, "BATCH_TOKENS", 300)
    assert [reply.text for reply in BatchAnswerer(answerer, 2)(asked)[0]] == [reply.text for reply in whole[0]]
    assert len(sizes) > 3
    assert sizes[:-1] == sorted(sizes[:-1])  # the longest questions first, so ever more fit
    sizes.clear()
    monkeypatch.setattr(asking, "BATCH_FRAMES", 8)
    BatchAnswerer(answerer, 2)(asked)
    assert max(sizes) == 2


def test_batch_that_exceeds_the_memory_is_halved(answerer, monkeypatch):
    generate = answerer.model.generate

    def limited(**inputs):
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**inputs)

    asked = [(watched(0), [question(f"{i}?") for i in range(7)])]
    before = BatchAnswerer(answerer, 3)(asked)
    monkeypatch.setattr(answerer.model, "generate", limited)
    assert [reply.text for reply in BatchAnswerer(answerer, 3)(asked)[0]] == [reply.text for reply in before[0]]


def test_questions_that_cannot_be_asked_cost_themselves(answerer):
    replies = BatchAnswerer(answerer, 4)(
        [(watched(0), [question("What?"), question("word " * 3000), question("And?")])]
    )
    assert [reply.error is None for reply in replies[0]] == [True, False, True]
    assert "and the decoder has 2048" in replies[0][1].error


def test_conversation_without_a_video_is_asked(answerer):
    text = Question("1", (), [{"role": "user", "content": "What?"}], "")
    (replies,) = BatchAnswerer(answerer, 4)([(DecodedVideos([], []), [text])])
    assert replies[0].error is None
    assert replies[0].times == []


def test_several_videos_in_one_question(answerer):
    two = DecodedVideos([random_frames(4, 0, SIDE), random_frames(1, 1, SIDE)], [np.arange(4.0), np.zeros(1)])
    content = [{"type": "video"}, {"type": "text", "text": "and"}, {"type": "image"}, {"type": "text", "text": "?"}]
    (replies,) = BatchAnswerer(answerer, 4)(
        [(two, [Question("1", ("a", "b"), [{"role": "user", "content": content}], "")])]
    )
    assert [len(times) for times in replies[0].times] == [4, 1]


def test_interleaved_subtitles_split_the_video(answerer):
    lines = ((0.1, 0.7, "between"),)
    asked = question("What?", subtitles=Subtitles(lines, interleaved=True))
    plain = question("What?")
    replies = BatchAnswerer(answerer, 4)([(watched(0), [asked, plain])])[0]
    assert replies[0].error is None
    assert replies[0].prompt_tokens > replies[1].prompt_tokens


def test_likelihoods_order_the_choices(answerer):
    asked = [question(f"{i}?", choices=("A", "B", "C")) for i in range(3)]
    (replies,) = BatchAnswerer(answerer, 1, likelihood=True)([(watched(0), asked)])
    for reply, one in zip(replies, asked, strict=True):
        assert reply.text == max(reply.likelihoods, key=reply.likelihoods.__getitem__)
        assert set(reply.likelihoods) == {"A", "B", "C"}
        # Of one question alone, straight from the model.
        prompt = answerer.processor([one.messages], [[random_frames(4, 0, SIDE)]], for_generation=True)
        with torch.no_grad():
            logits = answerer.model(**prompt, logits_to_keep=1).logits[0, -1].log_softmax(-1)
        letter = answerer.processor.tokenizer.encode("B")[0]
        assert reply.likelihoods["B"] == pytest.approx(float(logits[letter]), abs=2e-4)


def test_choices_that_begin_alike_cannot_be_compared(answerer):
    asked = [question("?", choices=("Caption A", "Caption B")), question("?"), question("?", choices=("yes", "no"))]
    (replies,) = BatchAnswerer(answerer, 1, likelihood=True)([(watched(0), asked)])
    assert [reply.error is None for reply in replies] == [False, False, True]
