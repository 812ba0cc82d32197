"""The command line of jobs/evaluate.py: one line for each mistake."""

import subprocess
import sys

import pytest

from crosslmm.config import BadConfig
from crosslmm.data.manifest import Manifest
from crosslmm.evaluate.after_training import evaluation_of
from crosslmm.evaluate.questions.as_manifest import write_manifest
from crosslmm.evaluate.questions.manifest import read_manifest
from crosslmm.evaluate.questions.question import BadBenchmark
from crosslmm.evaluate.questions.source import read_source
from crosslmm.evaluate.settings import parse
from tests.support.benchmark_folders import FOLDERS
from tests.support.common import ROOT

BENCHMARK = ["--benchmark=videomme", "--data=/data/videomme"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of them"),
        ([*BENCHMARK, "--manifest=a.jsonl"], "give one of them"),
        (["--benchmark=videomme"], "--data: give the folder"),
        (["--manifest=a.jsonl", "--data=/data"], "--data: give the folder"),
        ([*BENCHMARK, "--limit=0"], "limit"),
        ([*BENCHMARK, "--margin=2"], "margin"),
        ([*BENCHMARK, "--model=/m", "--promote=champion"], "only a registered model"),
        ([*BENCHMARK, "--promote=champion", "--limit=10"], "takes all questions"),
        ([*BENCHMARK, "--scorer=nothing"], "scorer"),
        ([*BENCHMARK, "--against=http://user:secret@host/x"], "holds credentials"),
        ([*BENCHMARK, "--scaling.num_workers=none"], "num_workers"),
        ([*BENCHMARK, "--train.max_steps=3"], "train.max_steps"),
        ([*BENCHMARK, "--config=nowhere.yaml"], "nowhere.yaml: cannot be read"),
        ([*BENCHMARK, "--tracking.alias=latest"], "a name that MLflow reserves"),
    ],
)
def test_mistake_is_one_line(arguments, message):
    with pytest.raises(BadConfig) as error:
        parse(arguments, "")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


def test_cluster_file_and_arguments_lie_over_the_training_run(config, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "storage: s3://bucket/runs\ndata: {decode_memory_gib: 3}\nscaling: {num_workers: 4, decode_workers: 9}\n"
    )
    settings, overrides = parse([*BENCHMARK, f"--config={file}", "--scaling.num_workers=2", "--num_frames=9"], "")
    applied = overrides.apply(config, settings.num_frames, ["/data"])
    assert applied.storage == "s3://bucket/runs"
    assert (applied.scaling.num_workers, applied.scaling.decode_workers) == (2, 9)
    assert applied.scaling.use_gpu == config.scaling.use_gpu
    assert (applied.data.decode_memory_gib, applied.data.num_frames, applied.data.roots) == (3, 9, ["/data"])
    assert applied.model == config.model


@pytest.mark.parametrize(
    ("line", "message"),
    [
        *((line, "belongs to the model") for line in (
            "model: {pool_stride: 2}", "train: {epochs: 2}", "data: {fps: 3}", "data: {timestamps: true}",
        )),
        ("nothing: 1", "^nothing: there is no such setting$"),
    ],
)  # fmt: skip
def test_file_cannot_change_what_the_model_is(tmp_path, line, message):
    file = tmp_path / "run.yaml"
    file.write_text(line)
    with pytest.raises(BadConfig, match=message):
        parse([*BENCHMARK, f"--config={file}"], "")


def test_number_of_workers_need_not_divide_the_batch(config):
    _, overrides = parse([*BENCHMARK, "--scaling.num_workers=3"], "")
    assert overrides.apply(config, None, []).scaling.num_workers == 3


def source(tmp_path, *arguments):
    FOLDERS["videomme"](tmp_path)
    return read_source(parse(["--benchmark=videomme", f"--data={tmp_path}", *arguments], "")[0])


def test_part_of_the_questions_is_selected(tmp_path):
    assert {dict(q.groups)["duration"] for q in source(tmp_path, "--only=duration=long").questions} == {"long"}
    assert len(source(tmp_path, "--limit=5").questions) == 5


def test_unknown_group_lists_the_groups(tmp_path):
    with pytest.raises(BadConfig, match="there are domain=Knowledge, domain=Life Record, duration=long"):
        source(tmp_path, "--only=duration=huge")


def test_unknown_benchmark_lists_the_benchmarks():
    with pytest.raises(BadConfig, match="there are videomme, videomme_w_subtitle, mvbench"):
        read_source(parse(["--benchmark=imagenet", "--data=/data"], "")[0])


def test_help_needs_no_model():
    done = subprocess.run(
        [sys.executable, "jobs/evaluate.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    assert "--promote text or null" in done.stdout
    assert "Annotated" not in done.stdout


def test_benchmark_becomes_a_manifest_for_validation(tmp_path):
    FOLDERS["egoschema_subset"](tmp_path)
    opened = read_source(parse(["--benchmark=egoschema_subset", f"--data={tmp_path}"], "")[0])
    assert write_manifest(opened, str(tmp_path / "validation.jsonl")) == 24
    manifest = Manifest(str(tmp_path / "validation.jsonl"))
    assert [row["id"] for row in manifest.rows] == [question.id for question in opened.questions]
    again = read_manifest(manifest)
    assert [question.messages for question in again] == [question.messages for question in opened.questions]
    assert [question.answer for question in again] == [question.answer for question in opened.questions]
    assert [question.videos for question in again] == [question.videos for question in opened.questions]


def test_prompt_that_depends_on_the_frames_is_in_no_manifest(tmp_path):
    FOLDERS["videomme"](tmp_path)
    opened = read_source(parse(["--benchmark=videomme_w_subtitle", f"--data={tmp_path}"], "")[0])
    with pytest.raises(BadConfig, match="depends on the frames"):
        write_manifest(opened, str(tmp_path / "validation.jsonl"))


@pytest.mark.parametrize(("benchmark", "data"), [("videomme", None), (None, "/data"), ("nope", "/data")])
def test_evaluation_after_a_training_is_checked_before_it(config, benchmark, data):
    with pytest.raises(BadConfig):
        evaluation_of(benchmark, data, config)


def test_folder_of_an_evaluation_after_a_training_is_read_before_it(config, tmp_path):
    with pytest.raises(BadBenchmark, match=r"no videomme/test-\*.parquet"):
        evaluation_of("videomme", str(tmp_path), config)
    assert evaluation_of(None, None, config) is None
