"""Validation in training, a model's evaluation on a manifest and the registered model: one rule, one result."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from crosslmm.config import to_yaml
from crosslmm.data.collate import Sample, collate_for_validation, make_batch
from crosslmm.data.manifest import Manifest
from crosslmm.data.samples.clips import encode_clip
from crosslmm.data.video.decode_pool import Decoder
from crosslmm.inference.answerer import Answerer
from crosslmm.inference.evaluate import evaluate
from crosslmm.model.loading import build_model, build_processor
from crosslmm.preflight.answer_length import answer_limit
from crosslmm.run_folder import MODEL_CONFIG_FILE
from crosslmm.train import loop
from tests.support.common import random_frames
from tests.support.exports import save_exported

CLIP = {"type": "video", "video": "a.mp4"}
OTHER = {"type": "video", "video": "b.mp4"}


def text(words):
    return {"type": "text", "text": words}


def row(id, *turns, kind=None, **fields):
    """Return a row whose turns are (question or parts, answer)."""
    messages = [] if "system" not in fields else [{"role": "system", "content": fields.pop("system")}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": id, "messages": messages, **({"kind": kind} if kind else {}), **fields}


# Whatever the answer depends on stands where only the whole conversation shows it.
ROWS = [
    row("sentence", ([CLIP, text("What happens?")], "A brown dog jumps over the red fence."), kind="words"),
    row("other", ([OTHER, text("What happens?")], "Nothing at all, for a very long time."), kind="words"),
    row("turns", ([CLIP, text("Which?")], "this"), ("And then?", "that one"), ("Sure?", "yes it is"), kind="turns"),
    row("system", ([CLIP, text("What happens?")], "Ein Hund springt."), system="Antworte deutsch.", kind="system"),
    row("after", ([text("Before the video."), CLIP, text("What was said?")], "before")),
    row("two", ([CLIP, text("and"), OTHER, text("Which is first?")], "the first of the two"), kind="several"),
    row("blind", ("Which way is up?", " up  and\naway "), kind="blind"),
    row("gone", ([{"type": "video", "video": "gone.mp4"}, text("What?")], "nothing"), kind="words"),
    row("endless", ("up " * 2500, "up"), kind="blind"),
]
QUESTIONS = 9


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    for name, seed in (("a", 5), ("b", 6)):
        (folder / f"{name}.mp4").write_bytes(encode_clip(np.repeat(random_frames(1, seed), 8, axis=0)))
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return Manifest(str(folder / "rows.jsonl"))


@pytest.fixture(scope="module")
def samples(manifest, config):
    """The rows as the workers of a run get them."""
    data = config.data.model_copy(update={"roots": manifest.roots})
    with Decoder(data, config.model.vision["image_size"]) as decoder:
        videos = [
            [] if row["id"] == "gone" else [video.images for video in decoder(row["videos"])] for row in manifest.rows
        ]
    return [
        Sample(
            position, row["manifest"], row["line"], row["id"], row["messages"],
            frames, row["kind"], 1.0, "no such file" if row["id"] == "gone" else None,
        )
        for position, (row, frames) in enumerate(zip(manifest.rows, videos, strict=True))
    ]  # fmt: skip


@pytest.fixture(scope="module")
def answerer(config, samples, tmp_path_factory):
    """A model that has learnt all rows but the last turn of one, which it answers with the turn before."""
    torch.manual_seed(0)
    processor = build_processor(config.model)
    model = build_model(config.model, processor, seed=0)
    rows = [sample for sample in samples if not sample.error and sample.id != "endless"]
    learnt = [json.loads(json.dumps(sample.messages).replace("yes it is", "that one")) for sample in rows]
    batch = processor(learnt, [sample.videos for sample in rows])
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(200):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.01:
            break
    folder = tmp_path_factory.mktemp("model")
    save_exported(folder, model, processor, config)
    return Answerer(folder, device="cpu")


@pytest.fixture(scope="module")
def evaluation(answerer, manifest):
    return evaluate(answerer, manifest, batch_size=4)


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def validate(answerer, samples, limit, rows_at_once=2):
    """Validate as a worker does, and pad the last batch as an epoch is padded."""
    processor = answerer.processor
    padding = [Sample(99, "m", 1, "padding", samples[0].messages, samples[0].videos, "words", 0.0, None)]
    samples = [*samples, *padding * (-len(samples) % rows_at_once)]
    make = functools.partial(
        collate_for_validation,
        processor=processor,
        require_room=functools.partial(processor.require_room, new_tokens=limit),
    )
    batches = [make_batch(samples[i : i + rows_at_once], make)[1] for i in range(0, len(samples), rows_at_once)]
    return loop.validate(answerer.model, processor, batches, limit)


def test_answers_of_several_words_are_right(evaluation):
    answers = {(answer.id, answer.question): answer for answer in evaluation.answers}
    assert answers["sentence", "What happens?"].answer == "A brown dog jumps over the red fence."
    assert answers["system", "What happens?"].answer == "Ein Hund springt."
    assert (answers["turns", "Sure?"].answer, answers["turns", "Sure?"].expected) == ("that one", "yes it is")
    two = answers["two", "and Which is first?"]
    assert ([Path(video).name for video in two.videos], two.answer) == (["a.mp4", "b.mp4"], "the first of the two")
    score = evaluation.score
    assert (score.overall.right, score.overall.asked, score.unreadable) == (QUESTIONS - 1, QUESTIONS, 2)
    assert {kind: (of_kind.right, of_kind.asked) for kind, of_kind in score.by_kind.items()} == {
        "blind": (1, 1), "several": (1, 1), "system": (1, 1), "turns": (2, 3), "words": (2, 2),
    }  # fmt: skip


@pytest.mark.parametrize("rows_at_once", [1, 2, 5])
def test_validation_equals_evaluation(answerer, samples, manifest, evaluation, process_group, rows_at_once):
    limit = answer_limit(manifest, answerer.processor)
    metrics = validate(answerer, samples, limit, rows_at_once)
    del metrics["validation/loss"]
    assert metrics == evaluation.score.metrics()


def test_the_registered_model_gives_the_same_answers(answerer, manifest, evaluation):
    """Its rows are single questions about one video, whose words come after it."""
    asked = [answer for answer in evaluation.answers if answer.id in ("sentence", "other")]
    rows = answerer.answer_rows([a.videos[0] for a in asked], [a.question for a in asked], manifest.roots)
    assert rows == [(answer.answer, None) for answer in asked]


def test_rows_that_cannot_be_asked_are_named(answerer, manifest, caplog):
    answers = [answer for answer in evaluate(answerer, manifest).answers if answer.error]
    assert [(answer.id, answer.answer) for answer in answers] == [("gone", None), ("endless", None)]
    assert "gone.mp4: no such file" in answers[0].error
    assert "the decoder has 2048" in answers[1].error
    assert "2 of 9 rows could not be asked and do not count; 'gone': " in caplog.text


def test_a_manifest_of_which_nothing_can_be_asked_is_refused(answerer, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[-2]))
    with pytest.raises(ValueError, match=r"rows\.jsonl: no row could be asked; 'gone': .*no such file"):
        evaluate(answerer, Manifest(str(tmp_path / "rows.jsonl")))


def test_only_the_first_rows_are_asked(answerer, manifest):
    assert [answer.id for answer in evaluate(answerer, manifest, rows=2).answers] == ["sentence", "other"]


def test_answers_may_be_as_long_as_those_of_the_validation(config, answerer, tmp_path):
    answerer.model.save_pretrained(tmp_path)
    answerer.processor.save_pretrained(tmp_path)
    for limit, expected in ((None, 64), (16, 64), (200, 200)):
        train = config.train.model_copy(update={"max_new_tokens": limit})
        (tmp_path / MODEL_CONFIG_FILE).write_text(to_yaml(config.model_copy(update={"train": train})))
        assert Answerer(tmp_path, device="cpu").max_new_tokens == expected
