import sys
import time

import numpy as np
import psutil
import pytest

from benchmarks import rounding, sweep
from crosslmm.cli import parse_run
from crosslmm.data.samples import shapes
from crosslmm.sweep import space
from crosslmm.sweep.search import prefill_macs


def configuration():
    return parse_run(sweep.arguments(sweep.MODEL | sweep.TRAINING), "")


def grid(folder):
    (folder / "space.py").write_text(sweep.SPACE)
    config = configuration()
    return [
        space.apply(config, point) for point in space.grid(space.load(f"{folder}/space.py", folder, config), config)
    ]


def test_trials_have_the_encoder_proportion_of_the_2b(tmp_path):
    configs = grid(tmp_path)
    assert len(configs) == 8
    ratios = sweep.proportions(
        [dict(zip(("macs", "encoder_macs"), prefill_macs(config), strict=True)) for config in configs]
    )
    assert ratios["here"] == pytest.approx(ratios["the 2B"], rel=0.05)
    assert ratios["mean of the trials"] == pytest.approx(ratios["the 2B"], rel=0.05)


def test_trial_sees_each_clip_once():
    train = configuration().train
    assert train.max_steps * train.global_batch_size == sweep.CLIPS
    assert not train.learning_rate.vision


def test_encoding_as_fast_as_in_training_is_ideal():
    costs = sweep.costs(20.0, features=[5.0, 7.0] * 4, videos=[25.0, 27.0] * 4)
    assert costs["ideal"] == pytest.approx((20 + 8 * 6) / (8 * 26))
    assert costs["measured_over_ideal"] == pytest.approx(1)
    assert sweep.costs(54.0, [6.0] * 8, [26.0] * 8)["measured_over_ideal"] == pytest.approx(1.5)


def test_pipeline_start_does_not_count_as_trial_time():
    assert sweep.steps_seconds([9.0, 1.0, 2.0, 3.0]) == 8


def sweep_of(losses):
    trials = [{"point": {"a": n}, "train_s": 30.0, "macs": 1, "encoder_macs": 9} for n in range(len(losses))]
    return {"trials": trials, "losses": losses, "step_s": [[9.0, 1.0]] * len(losses), "encoding_s": 1.0, "wall_s": 99.0}


def test_losses_are_compared_step_by_step():
    ours, theirs = [[4.0, 2.0], [5.0, 1.1]], [[4.0, 2.0], [5.0, 1.0]]
    figures, detail = sweep.compare({"features": sweep_of(ours), "videos": sweep_of(theirs)})
    assert figures["loss_difference_max"] == pytest.approx(0.1)
    assert detail["loss_differences"][0] == 0
    other = sweep_of(theirs)
    other["trials"][1]["point"] = {"a": 7}
    with pytest.raises(AssertionError, match="different points"):
        sweep.compare({"features": sweep_of(ours), "videos": other})


def test_interrupt_kills_every_process_of_the_command(tmp_path):
    """Even one that leaves its process group, as Ray's workers do, and ignores SIGTERM."""
    pid_file = tmp_path / "pid"
    stubborn = f"""
import os, pathlib, signal, time
os.setpgid(0, 0)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path({str(pid_file)!r}).write_text(f"{{os.getpid()}} ")
time.sleep(60)
"""
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {stubborn!r}]); time.sleep(60)"

    def interrupted():
        with sweep.running([sys.executable, "-c", parent], tmp_path):
            until = time.monotonic() + 30
            while not (pid_file.exists() and pid_file.read_text().endswith(" ")):
                assert time.monotonic() < until
                time.sleep(0.05)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    pid, until = int(pid_file.read_text()), time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("form", rounding.FORMATS)
def test_formats_stay_within_their_rounding_error(form):
    x = np.random.default_rng(0).normal(0, 3, (2, 5, 8)).astype(np.float32)
    off = np.abs(rounding.rounded(x, form) - x) / np.abs(x).max(axis=-1, keepdims=True)
    most = {"float32": 0, "bf16": 2**-8, "int8": 1 / 127}[form]
    assert most / 8 <= off.max() <= most


def test_lost_accuracy_is_the_mean_over_seeds():
    lost = rounding.lost({"float32": [0.8, 0.9], "bf16": [0.8, 0.9], "int8": [0.7, 0.9]})
    assert lost == pytest.approx({"accuracy_lost_bf16": 0, "accuracy_lost_int8": 0.05})


def test_training_uses_features_of_its_format(tmp_path, monkeypatch):
    data = str(tmp_path / "data")
    shapes.write_sample_set(data, train=32, held_out=4)
    tiny = rounding.configure(seed=1)
    short = tiny.model_copy(update={"train": tiny.train.model_copy(update={"max_steps": 1})})
    monkeypatch.setattr(rounding, "configure", lambda seed: short)
    for split in rounding.SPLITS:
        rounding.encode_split(data, split, str(tmp_path))
    assert np.load(tmp_path / "train.npy").shape == (32, 4, 64, 64)
    given, real = [], rounding._inputs

    def inputs(processor, messages, features, **options):
        batch = real(processor, messages, features, **options)
        given.append(batch["features"].numpy())
        return batch

    monkeypatch.setattr(rounding, "_inputs", inputs)
    for form in rounding.FORMATS:
        assert 0 <= rounding.train(data, str(tmp_path), form, seed=1) <= 1
    float32, bf16, int8 = given[0], given[2], given[4]  # the step's, then the held-out clips'
    assert float32.dtype == np.float32
    assert 0 < np.abs(bf16 - float32).max() < np.abs(int8 - float32).max()
