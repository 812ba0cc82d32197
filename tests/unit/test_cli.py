"""Command lines: what wins, what is refused and how, and that no command line whatever ends in a traceback."""

import contextlib
import io
import os
import subprocess
import sys

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from crosslmm.cli import parse_job, parse_run
from crosslmm.config import BadConfig, settings_of
from crosslmm.sweep.settings import SweepSettings
from tests.support.common import ROOT

JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py") if path.stem != "__init__")


def parse(*argv):
    return parse_run(argv, description="a test")


def refusal(*argv):
    with pytest.raises(BadConfig) as refused:
        parse(*argv)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_arguments_override_files_wherever_they_stand(tmp_path):
    (tmp_path / "mine.yaml").write_text("train: {max_steps: 5}")
    assert parse("--train.max_steps", "3", "--config", "tiny").train.max_steps == 3
    assert parse("--train.max_steps=3", "--config=tiny", f"--config={tmp_path}/mine.yaml").train.max_steps == 3
    assert parse("--config", "tiny", "--seed=4", "--config", f"{tmp_path}/mine.yaml").train.max_steps == 5


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (
            ["--train.learning_rate", "1e-4"],
            "train.learning_rate: is a section; set its keys, such as --train.learning_rate.vision, or all as a YAML "
            "mapping; got: 1e-4",
        ),
        (["--scaling.num_workers", "2-8"], "scaling.num_workers: takes integer or [integer, integer]; got: 2-8"),
        (["--train.max_steps", "1e3"], "train.max_steps: takes integer or null; got: 1e3"),
        (
            ["--train.max_steps", "-1"],
            "train.max_steps: takes integer or null; Input should be greater than or equal to 1; got: -1",
        ),
        (["--data.sampling", "unifrm"], "data.sampling: takes uniform | fps | fps_then_uniform; got: unifrm"),
        (["--model.vision", "3"], "model.vision: takes {text: any value, ...} or null; got: 3"),
        (
            ["--train.max_step", "3"],
            "--train.max_step: no such key; did you mean train.max_steps?; --help all lists the keys",
        ),
        (["--nonesuch=3"], "--nonesuch: no such key; --help all lists the keys"),
        (["--storage", ""], "storage: is empty; give it a value, or leave it out"),
        (["stray"], "stray: arguments are --KEY VALUE or --KEY=VALUE; --help all lists the keys"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_a_key_takes(argv, line):
    assert refusal(*argv) == line


def test_a_long_value_is_not_quoted_whole():
    line = refusal("--name", "a" * 300)
    assert "at most 200 characters" in line
    assert "(300 characters)" in line
    assert len(line) < 300


@pytest.mark.parametrize("number", ["9" * 400, str(2**63)])
def test_numbers_that_no_run_reaches_are_refused(number):
    assert "less than or equal to" in refusal("--train.max_steps", number)


def test_close_names_of_presets_and_keys_are_offered(tmp_path):
    assert "did you mean tiny?" in refusal("--config", "tinny")
    (tmp_path / "mine.yaml").write_text("train: {max_step: 3}")
    assert refusal("--config", f"{tmp_path}/mine.yaml").startswith(
        "train.max_step: no such key; did you mean train.max_steps?"
    )
    (tmp_path / "mine.yaml").write_text("trian: {max_steps: 3}")
    assert refusal("--config", f"{tmp_path}/mine.yaml").startswith(
        "trian.max_steps: no such key; did you mean train.max_steps?"
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (bytes(range(256)), "is not text in UTF-8"),
        (b"- 1\n- 2\n", "is a YAML list, and not a mapping of keys to values"),
        (b"train: {max_steps: 3\n", "cannot be read: "),
        (b"#" * (2**20 + 1), "has more than 1048576 bytes"),
        (b"[" * 3000, "cannot be read: "),
    ],
    ids=["binary", "list", "syntax", "large", "deep"],
)
def test_a_bad_file_is_named(tmp_path, content, says):
    (tmp_path / "mine.yaml").write_bytes(content)
    line = refusal("--config", f"{tmp_path}/mine.yaml")
    assert line.startswith(f"--config {tmp_path}/mine.yaml: ")
    assert says in line


def test_files_that_cannot_be_opened_are_named(tmp_path):
    assert refusal("--config", str(tmp_path)).startswith(f"--config {tmp_path}: cannot be read: ")
    assert refusal("--config", f"{tmp_path}/none.yaml").startswith(f"--config {tmp_path}/none.yaml: cannot be read: ")


def test_a_file_in_a_bucket_needs_credentials(tmp_path):
    # A process of its own: clients of the store live as long as their process.
    plain = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    plain |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    command = [sys.executable, ROOT / "jobs" / "train.py", "--config", "s3://bucket/mine.yaml"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=plain)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: --config s3://bucket/mine.yaml: cannot be read: ")
    assert "AWS_*" in line


def test_a_config_needs_a_value():
    for argv in (["--config"], ["--config="], ["--config", "--seed=4"]):
        assert refusal(*argv).startswith("--config: needs a value: a YAML file, or one of ")


KEYS = [key for key, _ in settings_of()]
YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
VALUES = YAML_VALUES.map(lambda value: yaml.safe_dump(value).strip()) | st.text(max_size=40)
NAMES = st.sampled_from(KEYS) | st.text(max_size=12)
ARGUMENTS = st.lists(
    st.tuples(NAMES, VALUES).map(lambda pair: [f"--{pair[0]}={pair[1]}"])
    | st.tuples(NAMES, VALUES).map(lambda pair: [f"--{pair[0]}", pair[1]])
    | st.text(max_size=20).map(lambda text: [text]),
    max_size=4,
).map(lambda groups: [argument for group in groups for argument in group])


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(ARGUMENTS)
@example(["--config=tiny", "--config=tiny"])
def test_no_command_line_ends_in_a_traceback(argv):
    refused, status = "", 0
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            parse_job(argv, "a test", lambda parser: parser.add_class_arguments(SweepSettings, fail_untyped=False))
        except BadConfig as error:
            refused = str(error)
        except SystemExit as left:
            status = left.code
    assert "\n" not in refused
    assert len(refused) < 2000
    assert status == 0


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=60) | YAML_VALUES.map(lambda value: yaml.safe_dump({"train": value}).encode()))
def test_no_file_ends_in_a_traceback(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("config") / "mine.yaml"
    file.write_bytes(content)
    with contextlib.suppress(BadConfig):
        parse("--config=tiny", f"--config={file}")


@pytest.mark.parametrize("job", JOBS)
def test_every_job_refuses_and_helps_at_once(job):
    for argv, status in ((["--nonesuch", "3"], 2), (["\udce4"], 2), (["--hel"], 2), (["--help"], 0)):
        before = os.times()
        ended = subprocess.run(
            [sys.executable, ROOT / "jobs" / f"{job}.py", *argv], capture_output=True, text=True, timeout=120
        )
        after = os.times()
        assert ended.returncode == status, ended.stderr
        assert "Traceback" not in ended.stderr
        if status:
            assert ended.stderr.startswith("error: ")
            assert ended.stderr.count("\n") == 1
        used = after.children_user + after.children_system - before.children_user - before.children_system
        assert used < 4, f"{argv} took {used} s of a processor"


def test_a_verb_refuses_and_helps_as_its_job_does():
    def run(*argv):
        command = [sys.executable, ROOT / "jobs" / "checkpoint.py", *argv]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, env=os.environ | {"COLUMNS": "80"}, check=False
        )

    refused = run("export", "runs/a")
    assert refused.returncode == 2
    required = "error: the following arguments are required: FOLDER; checkpoint.py export --help lists the arguments\n"
    assert refused.stderr == required
    assert run("list", "runs/a", "--js").returncode == 2
    helped = run("repair", "--help")
    assert helped.returncode == 0
    assert max(map(len, helped.stdout.splitlines())) <= 80
