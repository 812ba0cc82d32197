"""Hand-made trials of sweeps that never ran, for the tests of the report."""

import math

import numpy as np
from optuna.distributions import CategoricalDistribution, FloatDistribution

from crosslmm.sweep.report import Sweep
from crosslmm.sweep.trials import Trial, Validation

STRIDE, EVERY = "model.pool_stride", "model.cross_attention_every"
PROJECTOR, V2V_RATE = "train.learning_rate.projector", "train.learning_rate.v2v"

JOINT = {
    STRIDE: CategoricalDistribution([27, 9, 7]),
    EVERY: CategoricalDistribution([0, 1, 2, 4]),
    PROJECTOR: FloatDistribution(2e-4, 5e-3, log=True),
    V2V_RATE: FloatDistribution(2e-4, 5e-3, log=True),
}
ABLATION = {
    EVERY: CategoricalDistribution([0, 2, 4]),
    "model.v2v": CategoricalDistribution([True, False]),
    "model.t2v": CategoricalDistribution([True, False]),
    "seed": CategoricalDistribution([0, 1, 2]),
}


def sweep(distributions=None, **changed) -> Sweep:
    facts = {"Configuration": "tiny", "Data": "sample, 3,000 clips", "Steps per trial": "400"}
    fields = {"name": "first-try", "space": "joint", "facts": facts, "distributions": distributions or JOINT}
    fields["command"] = "python jobs/tune.py --space joint --trials 14 --name first-try"
    return Sweep(**fields | changed)


def trial(number=0, accuracy=0.9, macs=10**9, state="finished", point=None, steps=4, tokens=4, **changed) -> Trial:
    curve = [
        Validation(100 * (i + 1), 2.2 * math.exp(-0.9 * (i + 1)) + 1 - accuracy, accuracy * (i + 1) / steps)
        for i in range(steps)
    ]
    result = Trial(number, point or {}, point or {}, tokens, macs, 7 * 10**9, 3 * 2**28, state, curve, 61.5 * steps)
    for name, value in changed.items():
        setattr(result, name, value)
    return result


def joint(count=14, seed=0) -> list[Trial]:
    """Return trials of the joint space; of fourteen, five were stopped early and one failed."""
    rng = np.random.default_rng(seed)
    trials = []
    for number in range(count):
        stride, every = int(rng.choice([27, 9, 7])), int(rng.choice([0, 1, 2, 4]))
        tokens = math.ceil(27 / stride) ** 2
        point = {STRIDE: stride, EVERY: every, PROJECTOR: float(10 ** rng.uniform(-3.6, -2.4))}
        if every:
            point[V2V_RATE] = float(10 ** rng.uniform(-3.6, -2.4))
        macs = int((0.8 + 0.3 * tokens + (0.9 / every if every else 0)) * 1e8)
        accuracy = 0.97 - 0.25 / (1 + tokens / 4) - 0.12 * (every == 0) + rng.normal(0, 0.012)
        state = "stopped early" if number in (2, 5, 8, 10, 11) else "failed" if number == 6 else "finished"
        steps = {"finished": 4, "stopped early": 1 + number % 2, "failed": 1}[state]
        error = "RuntimeError: loss is nan at step 12" if state == "failed" else None
        trials.append(trial(number, float(accuracy), macs, state, point, steps, tokens, error=error))
    return trials


def ablation() -> list[Trial]:
    """Return trials of the ablation space, two seeds per arm."""
    arms = [{EVERY: 0}, {EVERY: 2}, {EVERY: 4, "model.v2v": True, "model.t2v": True}]
    arms += [{EVERY: 4, "model.v2v": True, "model.t2v": False}, {EVERY: 4, "model.v2v": False}]
    accuracies = [0.65, 0.95, 0.97, 0.96, 0.90]
    trials = []
    for arm, accuracy in zip(arms, accuracies, strict=True):
        for seed in (0, 1):
            point = arm | {"seed": seed}
            trials.append(trial(len(trials), accuracy + 0.02 * seed, 10**8 * (2 + arm[EVERY]), point=point))
            trials[-1].settings = {"model.v2v": True, "model.t2v": True} | point
    return trials
