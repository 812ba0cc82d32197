"""A conversation that is interrupted stays what it was: the next answers are those of an undisturbed one."""

import sys

import numpy as np
import pytest
import torch
from transformers import cache_utils

from crosslmm.data.samples.clips import encode_clip
from crosslmm.inference import answerer as answerer_module
from crosslmm.inference.answerer import Answerer
from crosslmm.model import cache
from crosslmm.model.loading import build_model
from tests.support.common import open_gates, random_frames
from tests.support.exports import save_exported

QUESTIONS = ["Which shape is it?", "What colour?", "Why?"]
TOKENS = 5


@pytest.fixture(scope="module")
def folder(config, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    model = build_model(config.model, processor, seed=0)
    open_gates(model)
    save_exported(folder, model, processor, config)
    (folder / "clip.mp4").write_bytes(encode_clip(np.repeat(random_frames(4, 5), 8, axis=0)))
    return folder


@pytest.fixture(scope="module")
def answerer(folder):
    return Answerer(folder, device="cpu")


@pytest.fixture
def talk(answerer, folder):
    return answerer.start_conversation(str(folder / "clip.mp4"))


def logits_of(talk, question):
    """The logits of every token of an answer, which is asked for here."""
    seen = []
    hook = talk.answerer.model.get_output_embeddings().register_forward_hook(lambda *args: seen.append(args[2].clone()))
    try:
        talk.ask(question, max_new_tokens=TOKENS)
    finally:
        hook.remove()
    return torch.cat(seen, dim=1)


@pytest.fixture(scope="module")
def undisturbed(answerer, folder):
    talk = answerer.start_conversation(str(folder / "clip.mp4"))
    return [logits_of(talk, question) for question in QUESTIONS]


class AtModuleCall:
    """Context manager that interrupts the n-th call of any module; the calls are counted."""

    def __init__(self, model, n=None):
        self.model, self.n, self.calls = model, n, 0

    def count(self, *_):
        self.calls += 1
        if self.calls == self.n:
            raise KeyboardInterrupt

    def __enter__(self):
        self.hooks = [module.register_forward_hook(self.count) for module in self.model.modules()]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


CHANGING = {module.__file__ for module in (answerer_module, cache, cache_utils)}
"""The files with the lines that change a conversation."""


class AtLine:
    """Context manager that interrupts before the n-th of these lines."""

    def __init__(self, model, n=None):
        self.n, self.calls = n, 0

    def trace(self, frame, event, arg):
        if frame.f_code.co_filename not in CHANGING:
            return None
        if event == "line":
            self.calls += 1
            if self.calls == self.n:
                raise KeyboardInterrupt
        return self.trace

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(None)


@pytest.mark.parametrize("interrupt", [AtModuleCall, AtLine])
@pytest.mark.parametrize("turn", [0, 1])
def test_an_interrupted_question_changes_nothing(answerer, folder, undisturbed, interrupt, turn):
    """Interrupted at thirty moments from the first to the last; then asked again, and the questions after it."""

    def new_talk():
        talk = answerer.start_conversation(str(folder / "clip.mp4"))
        for question in QUESTIONS[:turn]:
            talk.ask(question, max_new_tokens=TOKENS)
        return talk

    with interrupt(answerer.model) as counted:
        new_talk().ask(QUESTIONS[turn], max_new_tokens=TOKENS)
    with interrupt(answerer.model) as before:
        new_talk()
    moments = counted.calls - before.calls
    assert moments > 100
    talk = new_talk()
    messages = list(talk.messages)
    for n in np.linspace(1, moments - 1, 30).astype(int):
        with pytest.raises(KeyboardInterrupt), interrupt(answerer.model, n):
            talk.ask(QUESTIONS[turn], max_new_tokens=TOKENS)
        assert talk.messages == messages
    for question, expected in zip(QUESTIONS[turn:], undisturbed[turn:], strict=True):
        torch.testing.assert_close(logits_of(talk, question), expected, atol=2e-5, rtol=1e-4)


def test_a_question_that_is_too_long_changes_nothing(talk, undisturbed):
    for question, expected in zip(QUESTIONS, undisturbed, strict=True):
        messages = list(talk.messages)
        with pytest.raises(ValueError, match="the decoder has 2048"):
            talk.ask("what " * 3000)
        assert talk.messages == messages
        assert torch.equal(logits_of(talk, question), expected)


def test_an_answer_ends_at_the_last_position(config, processor, folder, tmp_path):
    """The model stops there; before, the conversation was lost."""
    language = config.model.language | {"max_position_embeddings": 64}
    short = config.model_copy(update={"model": config.model.model_copy(update={"language": language})})
    model = build_model(short.model, processor, seed=0)
    model.generation_config.eos_token_id = None
    save_exported(tmp_path, model, processor, short)
    answerer = Answerer(tmp_path, device="cpu")
    answerer.model.generation_config.eos_token_id = None
    talk = answerer.start_conversation(str(folder / "clip.mp4"))
    talk.ask("Which shape is it?", max_new_tokens=500)
    assert talk._cached.cache.get_seq_length() == 64
    with pytest.raises(ValueError, match="positions"):
        talk.ask("What colour?")
    assert len(talk.messages) == 2
