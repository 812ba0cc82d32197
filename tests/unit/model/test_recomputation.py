"""Activation checkpointing by part, and cross-attentions that add nothing and are left out."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from crosslmm.config import Checkpointing
from crosslmm.model import recomputation
from crosslmm.model.cross_attention import leave_out_closed_branches
from crosslmm.model.param_groups import component_of
from crosslmm.model.recomputation import checkpoint_activations
from tests.support.common import conversation, open_gates, random_frames


@pytest.fixture
def samples():
    """Conversations with 4, 2 and no frames."""
    videos = [[random_frames(4, 1)], [random_frames(2, 2)], []]
    return [conversation("What is it?", "red circle", video=bool(v)) for v in videos], videos


@pytest.fixture
def batch(processor, samples):
    return processor(*samples)


def gradients(model, batch):
    model.train().zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def flops(model, batch):
    """Return the FLOPs of matrix products in a training step."""
    with FlopCounterMode(display=False) as counter:
        gradients(model, batch)
    return counter.get_total_flops()


def test_gradients_are_the_same_however_much_is_recomputed(model, batch):
    open_gates(model)
    expected = gradients(model, batch)
    for encoder, decoder in itertools.product(("none", "selective", "full"), repeat=2):
        checkpoint_activations(model, Checkpointing(encoder, decoder))
        result = gradients(model, batch)
        assert result.keys() == expected.keys()
        assert all(torch.equal(grad, expected[name]) for name, grad in result.items())


def test_selective_repeats_no_matrix_product(model, batch):
    open_gates(model)
    plain, counted = flops(model, batch), {}
    for how in ("selective", "full"):
        checkpoint_activations(model, Checkpointing(how, how))
        counted[how] = flops(model, batch)
    assert counted["selective"] == plain < counted["full"]


def freeze_all_but_v2v(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(component_of(name) == "v2v")


def calls(branch):
    counted = []
    branch.register_forward_hook(lambda *_: counted.append(1))
    return counted


def test_a_closed_branch_that_does_not_learn_is_left_out(model, batch):
    layer = model.language_model.model.layers[0]
    freeze_all_but_v2v(model)
    expected, of_t2v, of_v2v = gradients(model, batch), calls(layer.t2v), calls(layer.v2v)
    leave_out_closed_branches(model)
    result = gradients(model, batch)
    assert result.keys() == expected.keys()
    assert all(torch.equal(grad, expected[name]) for name, grad in result.items())
    assert (len(of_t2v), len(of_v2v)) == (0, 1)


def test_branches_that_add_or_learn_something_stay(model, batch):
    layer = model.language_model.model.layers[0]
    leave_out_closed_branches(model)  # all gates are zero, and all of them learn
    assert not layer.v2v.left_out
    open_gates(model)
    freeze_all_but_v2v(model)
    leave_out_closed_branches(model)
    assert not layer.t2v.left_out
    with torch.no_grad():
        layer.t2v.gate.zero_()
    leave_out_closed_branches(model)
    assert layer.t2v.left_out


@torch.no_grad()
def test_answers_without_the_branch_are_the_same(model, processor, samples):
    freeze_all_but_v2v(model)
    model.eval()
    prompts = processor([talk[:1] for talk in samples[0]], samples[1], for_generation=True)
    expected = model.generate(**prompts, max_new_tokens=5, do_sample=False)
    leave_out_closed_branches(model)
    assert torch.equal(model.generate(**prompts, max_new_tokens=5, do_sample=False), expected)


@torch.no_grad()
def test_nothing_is_checkpointed_outside_of_training(model, batch, monkeypatch):
    monkeypatch.setattr(recomputation, "checkpoint", None)
    checkpoint_activations(model, Checkpointing("selective", "selective"))
    model.eval()(**batch)
