"""Optimizer groups, frozen components and the learning-rate schedule."""

import pytest
import torch

from crosslmm.cli import parse_run
from crosslmm.config import LearningRates, TrainConfig
from crosslmm.model.loading import build_model, build_processor
from crosslmm.model.param_groups import COMPONENTS, component_of, freeze
from crosslmm.train.optim import build_optimizer, learning_rate_factor, set_learning_rate, warmup_warning

RATES = LearningRates(vision=1e-5, projector=2e-5, v2v=3e-5, t2v=4e-5, decoder=5e-5)


@pytest.fixture
def model():
    config = parse_run([], "a test").model
    processor = build_processor(config)
    with torch.device("meta"):
        return build_model(config, processor, seed=0)


def by_component(model):
    parts = {component: [] for component in COMPONENTS}
    for name, parameter in model.named_parameters():
        parts[component_of(name)].append(parameter)
    return parts


def test_components_hold_the_modules_they_are_named_after(model):
    modules = {
        "vision": [model.vision_tower],
        "projector": [model.projector],
        "v2v": [module for name, module in model.named_modules() if name.endswith(".v2v")],
        "t2v": [module for name, module in model.named_modules() if name.endswith(".t2v")],
    }
    parts = by_component(model)
    for component, expected in modules.items():
        ids = {id(p) for module in expected for p in module.parameters()}
        assert ids == {id(p) for p in parts[component]} != set()
    assert {id(p) for p in model.language_model.parameters()} == {
        id(p) for component in ("v2v", "t2v", "decoder") for p in parts[component]
    }


def test_a_learning_rate_of_zero_freezes_a_component(model):
    freeze(model, LearningRates(projector=1e-3, v2v=1e-3))
    learning = {c: {p.requires_grad for p in parameters} for c, parameters in by_component(model).items()}
    assert learning == {"vision": {False}, "projector": {True}, "v2v": {True}, "t2v": {False}, "decoder": {False}}
    freeze(model, RATES)
    assert all(p.requires_grad for p in model.parameters())


def test_rates_follow_components_and_only_matrices_decay(model):
    config = TrainConfig(learning_rate=RATES, weight_decay=0.1)
    freeze(model, config.learning_rate)
    optimizer = build_optimizer(model, config)
    rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert rate[id(parameter)] == getattr(RATES, component_of(name))
        assert decay[id(parameter)] == (0.1 if parameter.ndim > 1 else 0)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_frozen_parameters_are_not_optimized(model):
    config = TrainConfig(learning_rate=LearningRates(projector=1e-3, v2v=0))
    freeze(model, config.learning_rate)
    assert {g["component"] for g in build_optimizer(model, config).param_groups} == {"projector"}


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 0.1), (4, 0.5), (9, 1), (10, 1), (60, 0.6), (109, 0.2002), (110, 0.2), (500, 0.2)]
)
def test_warm_up_then_cosine_to_the_floor(step, factor):
    config = TrainConfig(warmup_steps=10, final_learning_rate_share=0.2)
    assert learning_rate_factor(step, 110, config) == pytest.approx(factor, abs=1e-4)


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (5, 5), (9, 3)])
def test_short_runs_have_a_positive_rate(warmup, total):
    config = TrainConfig(warmup_steps=warmup)
    assert all(0 < learning_rate_factor(step, total, config) <= 1 for step in range(total))


def test_the_schedule_scales_each_group_from_its_peak(model):
    config = TrainConfig(learning_rate=RATES, warmup_steps=4)
    optimizer = build_optimizer(model, config)
    for step, factor in [(3, 1), (1, 0.5), (1, 0.5)]:
        set_learning_rate(optimizer, step, total_steps=10, config=config)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(getattr(RATES, group["component"]) * factor)


def test_a_run_that_ends_within_its_warm_up_is_told():
    config = TrainConfig(warmup_steps=1000)
    assert warmup_warning(1001, config) is None
    for steps in (19, 1000):
        assert f"train.warmup_steps is 1000, and the run has {steps} steps" in warmup_warning(steps, config)
