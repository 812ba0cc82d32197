import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from crosslmm.cli import parse_run, preset_names
from crosslmm.config import BadConfig, roles_of, settings_of, to_yaml
from crosslmm.config.schema import FIXED, FREE
from crosslmm.model.loading import build_config
from crosslmm.model.modeling import CrossLMMForConditionalGeneration
from crosslmm.model.param_groups import component_of
from tests.support.common import ROOT

JOB = Path(__file__).parents[2] / "jobs" / "train.py"
STAGES = ["stage-1", "stage-2", "stage-1 stage-1-t2v", "stage-1 without-t2v", "stage-2 without-t2v"]
WHOLE_RUNS = [
    "tiny", "tiny tiny-sweep", "small", "paper-2b stage-2 lora",
    *(f"{size} {stage}" for size in ("paper-2b", "paper-7b") for stage in STAGES),
]  # fmt: skip


def parse(*argv):
    return parse_run(argv, description="a test")


def layered(names):
    return parse(*(f"--config={name}" for name in names.split()))


def run_job(*argv):
    return subprocess.run([sys.executable, JOB, *argv], capture_output=True, text=True, timeout=60)


def test_whole_runs_cover_every_preset():
    assert set(" ".join(WHOLE_RUNS).split()) == set(preset_names())


@pytest.mark.parametrize("names", WHOLE_RUNS)
def test_presets_build_and_accumulate_whole_batches(names):
    config = layered(names)
    at_once = config.train.micro_batch_size * config.scaling.num_workers
    assert config.accumulation * at_once == config.train.global_batch_size
    with torch.device("meta"):
        model = CrossLMMForConditionalGeneration(build_config(config.model))
    present = {component_of(name) for name, _ in model.named_parameters()}
    learning = {name for name, rate in config.train.learning_rate.model_dump().items() if rate}
    assert learning <= present


def test_paper_2b_has_the_papers_parameter_counts():
    with torch.device("meta"):
        model = CrossLMMForConditionalGeneration(build_config(layered("paper-2b stage-1").model))
    sizes = dict.fromkeys(("vision", "projector", "v2v", "t2v", "decoder"), 0)
    for name, parameter in model.named_parameters():
        sizes[component_of(name)] += parameter.numel()
    assert sum(sizes.values()) == pytest.approx(2.04e9, rel=0.01)
    assert sizes["projector"] + sizes["v2v"] == pytest.approx(42.7e6, rel=0.005)


def test_stages_train_the_components_of_table_3():
    first, second = (layered(f"paper-2b stage-{stage}").train for stage in (1, 2))
    assert (first.global_batch_size, second.global_batch_size) == (512, 128)
    assert first.learning_rate.model_dump() == {"vision": 0, "projector": 1e-3, "v2v": 1e-3, "t2v": 0, "decoder": 0}
    assert second.learning_rate.model_dump() == {
        "vision": 2e-6, "projector": 1e-5, "v2v": 1e-5, "t2v": 1e-5, "decoder": 1e-5
    }  # fmt: skip


def test_t2v_presets_match_table_2c():
    rates = {names: layered(f"paper-2b {names}").train.learning_rate.t2v for names in STAGES}
    assert rates == {
        "stage-1": 0, "stage-2": 1e-5, "stage-1 stage-1-t2v": 1e-3, "stage-1 without-t2v": 0, "stage-2 without-t2v": 0
    }  # fmt: skip
    without = build_config(layered("paper-2b stage-2 without-t2v").model)
    assert not without.t2v
    assert without.dual_layers


@pytest.mark.parametrize("size", ["paper-2b", "paper-7b"])
def test_published_weights_are_pinned_to_a_commit(size):
    model = layered(f"{size} stage-1").model
    for revision in (model.vision_revision, model.language_revision):
        assert re.fullmatch("[0-9a-f]{40}", revision)


def test_overrides_change_one_key_at_any_depth():
    config = parse(
        "--model.pool_stride=5", "--train.learning_rate.decoder=0", "--model.vision.hidden_size=32", "--name", "a"
    )
    tiny = layered("tiny")
    assert (config.model.pool_stride, config.train.learning_rate.decoder, config.name) == (5, 0, "a")
    assert config.model.vision == {**tiny.model.vision, "hidden_size": 32}
    assert config.model.language == tiny.model.language
    assert config.train.learning_rate == tiny.train.learning_rate.model_copy(update={"decoder": 0})


def test_later_files_and_overrides_win(tmp_path):
    (tmp_path / "mine.yaml").write_text("{seed: 7, train: {epochs: 3}}")
    config = parse("--config=tiny", f"--config={tmp_path}/mine.yaml", "--train.epochs=4")
    assert (config.seed, config.train) == (7, layered("tiny").train.model_copy(update={"epochs": 4}))


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--model.pool_stridee=9", r"--model.pool_stridee"),
        ("--model.pool_strid=9", r"--model.pool_strid\b"),
        ("--conf tiny", r"--conf\b"),
        ("stray", r"stray"),
        ("--config nonesuch", r"nonesuch.*paper-2b, .*tiny"),
        ("--config ./nonesuch.yaml", r"nonesuch\.yaml"),
        ("--config stage-1", r"model\.vision: give its fields, or model\.vision_weights"),
        ("--model.pool_stride=nine", r"model\.pool_stride.*integer.*nine"),
        ("--model.pool_stride=0", r"model\.pool_stride.*greater than or equal to 1"),
        ("--train.final_learning_rate_share=2", r"train\.final_learning_rate_share.*less than or equal to 1"),
        ("--train.precision=fp16", r"train\.precision.*fp32 \| bf16.*fp16"),
        ("--train.weight_decay=inf", r"train\.weight_decay.*finite"),
        ("--train.learning_rate.vision=-1", r"train\.learning_rate\.vision.*greater than or equal to 0"),
        ("--train.global_batch_size=33 --train.micro_batch_size=8", r"train\.global_batch_size is 33.*multiple of 16"),
        ("--scaling.num_workers=[1,64] --train.global_batch_size=8", r"global_batch_size is 8; with up to 64 workers"),
        ("--model.attention=flash_attention_2", r"model\.attention.*scaling\.use_gpu true.*train\.precision bf16"),
        ("--scaling.workers_per_replica=0", r"scaling\.workers_per_replica.*greater than or equal to 1"),
        ("--train.float8=true", r"train: float8.*train\.precision bf16"),
        ("--model.v2v=false", r"train\.learning_rate\.v2v"),
        ("--model.cross_attention_every=0 --train.learning_rate.v2v=0", r"train\.learning_rate\.t2v"),
        (
            "--train.learning_rate={vision:\xa00,projector:\xa00,v2v:\xa00,t2v:\xa00,decoder:\xa00}",
            r"train\.learning_rate.*frozen",
        ),
    ],
)
def test_errors_are_one_line_that_names_the_key(argv, says):
    with pytest.raises(BadConfig, match=says) as refusal:
        parse(*(word.replace("\xa0", " ") for word in argv.split(" ")))
    assert "\n" not in str(refusal.value)


def test_unknown_key_in_a_file_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_text("train: {lr: 1}")
    with pytest.raises(BadConfig, match=r"train.*lr"):
        parse("--config=tiny", f"--config={tmp_path}/mine.yaml")


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("--model.pool_stride=9", "pool_stride is 9.*1 to 8"),
        ("--model.cross_attention_every=5", "cross_attention_every is 5.*1 to 4"),
        ("--model.language.model_type=nonesuch", "model.*nonesuch"),
    ],
)
def test_values_beyond_the_backbones_are_refused(model, says):
    with pytest.raises(BadConfig, match=says):
        build_config(parse(model).model)


@pytest.mark.parametrize("names", WHOLE_RUNS)
def test_yaml_round_trip(names, tmp_path):
    config = parse(*(f"--config={name}" for name in names.split()), "--seed=5", "--train.max_steps=7")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert parse(f"--config={tmp_path}/config.yaml") == config


def test_every_key_is_either_fixed_or_free_on_a_resume():
    assert [key for key, _ in settings_of() if len(roles_of(key) & {FIXED, FREE}) != 1] == []


def test_a_key_inside_a_setting_has_its_role():
    assert roles_of("model.vision.hidden_size") == roles_of("model.vision")
    assert roles_of("model.visionary") == roles_of("nonesuch") == frozenset()


def help_text(capsys, *argv):
    with pytest.raises(SystemExit) as left:
        parse(*argv)
    assert left.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_all_explains_every_key(capsys):
    text = help_text(capsys, "--help", "all")
    unexplained = [key for key, _ in settings_of() if not re.search(rf"--{re.escape(key)} .*?\] \w", text)]
    assert unexplained == []
    for word in ("Annotated", "FieldInfo", "Optional[", "Literal[", "<class"):
        assert word not in text


def test_short_help_has_common_keys_with_the_defaults_in_use(capsys):
    text = help_text(capsys, "--help")
    assert "--data.num_frames integer [4, preset tiny]" in text
    assert "--storage text [runs]" in text
    assert "--watchdog.step_s" not in text
    assert "--help all" in text


def test_help_names_the_file_that_sets_a_default(capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text("{data: {num_frames: 7}}")
    text = help_text(capsys, "--config", "tiny", "--config", f"{tmp_path}/mine.yaml", "--help")
    assert f"--data.num_frames integer [7, {tmp_path}/mine.yaml]" in text


@pytest.mark.parametrize("argv", ["--config=tiny --config stage-1", "--config tiny --config=stage-1"])
def test_help_shows_the_last_config_however_it_is_spelt(capsys, argv):
    text = help_text(capsys, *argv.split(), "--help")
    assert "--train.global_batch_size integer [512, preset stage-1]" in text


def test_the_job_prints_help():
    done = run_job("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--model.pool_stride" in done.stdout


def test_printed_configuration_is_accepted_again(tmp_path):
    done = run_job("--config", "tiny", "--model.pool_stride", "5", "--print_config")
    assert (done.returncode, done.stderr) == (0, "")
    assert yaml.safe_load(done.stdout)["model"]["pool_stride"] == 5
    (tmp_path / "printed.yaml").write_text(done.stdout)
    assert parse(f"--config={tmp_path}/printed.yaml") == parse("--model.pool_stride=5")
    assert "evaluate" not in done.stdout  # an argument of this job alone


def test_the_job_refuses_an_unknown_key_in_one_line():
    done = run_job("--model.pool_strid", "9")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .*--model\.pool_strid.*\n", done.stderr)


def test_several_manifests_have_shares():
    assert parse_run(["--data.manifest=a.jsonl"], "").data.manifests == {"a.jsonl": 1}
    several = {"s3://bucket/a.jsonl": 3, "b": 1}
    assert parse_run(["--data.manifest", json.dumps(several)], "").data.manifests == several
    for wrong in ('{"a": 0}', '{"a": 1.5}', "{}", '{"a": "b"}'):
        with pytest.raises(BadConfig, match=r"data: manifest: .* is neither a path nor a URI nor {manifest: share"):
            parse_run(["--data.manifest", wrong], "")


@pytest.mark.parametrize(
    ("wanted", "workers", "shards"),
    [
        ("null", 6, 6), (4, 8, 4), (4, 4, 4), (1, 3, 1),
        (4, 12, 4), (4, 6, 6), (4, 10, 5), (4, 7, 7),  # the next larger number that divides the workers
        (4, 3, 3), (4, 1, 1),  # what is left after the loss of a node
    ],
)  # fmt: skip
def test_any_number_of_workers_has_shards_that_divide_it(wanted, workers, shards):
    scaling = parse(f"--scaling.workers_per_replica={wanted}").scaling
    assert scaling.shards(workers) == shards


@pytest.mark.parametrize("job", ["train", "encode"])
def test_help_of_a_job_exits_with_0(job):
    done = subprocess.run([sys.executable, ROOT / "jobs" / f"{job}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--data.num_frames" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("job", ["train", "encode", "tune"])
def test_a_bad_log_level_is_one_error_line(job, monkeypatch):
    monkeypatch.setenv("CROSSLMM_LOG_LEVEL", "loud")
    done = subprocess.run([sys.executable, ROOT / "jobs" / f"{job}.py"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: CROSSLMM_LOG_LEVEL: .*\n", done.stderr)
