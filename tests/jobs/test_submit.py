"""`ray job submit` with the commands of docs/clusters.md: what is uploaded; a second job with one name."""

import os
import random
import re
import shutil
import subprocess
import sys
import time

import pytest
import yaml

from cluster.local.cluster import ray_command
from crosslmm import storage
from crosslmm.data.samples.shapes import write_sample_set
from tests.support.common import ROOT

CODE = ("crosslmm", "jobs", "cluster", "tune_spaces")
BESIDE_BYTES = 120 * 2**20
"""Of what lies beside the code: more than Ray takes, 100 MiB [bytes]."""
LIST = """\
import pathlib, crosslmm
here = pathlib.Path.cwd()
print("uploaded", *sorted(p.name for p in here.iterdir()))
print("runs", pathlib.Path(crosslmm.__file__).is_relative_to(here), (here / "crosslmm/presets/tiny.yaml").exists())
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the code with clips, a run and a space beside it."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in CODE:
        shutil.copytree(ROOT / name, folder / name)
    (folder / "clips").mkdir()
    (folder / "clips" / "big.mp4").write_bytes(os.urandom(BESIDE_BYTES))
    (folder / "my_space.py").write_text("def space(config): return {}\n")
    (folder / "my-run.yaml").write_text("train: {epochs: 1}\n")
    return folder


def submit(cluster, folder, *words, **options):
    """Run `ray job submit`; return its exit status and its output."""
    command = [*ray_command(), "job", "submit", "--address", cluster.address, *words]
    done = subprocess.run(
        command, env=cluster.environment, cwd=folder, capture_output=True, text=True, timeout=300, **options
    )
    return done.returncode, done.stdout + done.stderr


def test_what_lies_beside_the_code_is_not_uploaded(cluster, checkout):
    environment = ["--runtime-env", "cluster/runtime-env.yaml", "--submission-id", "first-try-1"]
    script = checkout / "my_list.py"
    script.write_text(LIST)
    status, output = submit(cluster, checkout, *environment, "--", "python", script.name)
    assert status == 0, output
    names = "cluster crosslmm jobs my-run.yaml my_list.py my_space.py tune_spaces"
    assert f"uploaded {names}\n" in output
    assert "runs True True" in output
    status, output = submit(cluster, checkout, *environment, "--", "python", script.name)
    assert status != 0
    assert "first-try-1 already exists" in output


def test_the_folder_as_it_is_is_too_large(cluster, checkout):
    """So the test above would fail without the file."""
    status, output = submit(cluster, checkout, "--working-dir", ".", "--", "python", "-c", "1")
    assert status != 0
    assert "413" in output


def test_the_upload_takes_in_all_of_the_package(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    excludes = yaml.safe_load((ROOT / "cluster" / "runtime-env.yaml").read_text())["excludes"]
    create_package(str(ROOT), tmp_path / "code.zip", include_gitignore=True, excludes=excludes)
    shutil.unpack_archive(tmp_path / "code.zip", tmp_path / "code")
    for folder in CODE:
        tracked = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True)
        assert not [name for name in tracked.stdout.split() if not (tmp_path / "code" / name).exists()]


def owner_and_refused(results):
    """Return the outputs of the owner and of its twin, which was refused."""
    (first, _), (second, refused) = sorted(results, key=lambda result: result[0])
    assert (first, second) == (0, 2), results
    line = next(line for line in refused.splitlines() if line.startswith("error: "))
    assert re.search(r"belongs to the \w+ of \S+ on \S+ \((Ray job \S+, )?process \d+, for 0:0\d:\d\d\)", line), line
    return line


@pytest.mark.fault
@pytest.mark.parametrize("place", ["s3://videos/twins", "disk"])
def test_of_two_preparations_at_once_exactly_one_converts_ten_times(cluster, tmp_path, place):
    place = str(tmp_path / "twins") if place == "disk" else place
    rows = "".join(f'{{"id": "{i}", "messages": [{{"role": "user", "content": "?"}}, '
                   f'{{"role": "assistant", "content": "{i}"}}]}}\n' for i in range(2000))  # fmt: skip
    storage.write_bytes(f"{place}/rows.jsonl", rows.encode())
    for number, offset in enumerate([0.0, *(random.Random(3).uniform(0, 2) for _ in range(9))]):
        command = [sys.executable, ROOT / "jobs/prepare.py", "convert", f"{place}/rows.jsonl", f"{place}/out-{number}"]
        twins = []
        for delay in (0.0, offset):
            time.sleep(delay)
            twins.append(subprocess.Popen(
                [*command, "--probe=false", "--chunk_bytes=3000"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, env=cluster.environment | {"RAY_ADDRESS": cluster.gcs_address},
            ))  # fmt: skip
        outputs = [twin.communicate(timeout=200)[0] for twin in twins]
        owner_and_refused(list(zip([twin.returncode for twin in twins], outputs, strict=True)))


@pytest.mark.fault
def test_of_two_jobs_with_one_name_exactly_one_trains(cluster, tmp_path):
    write_sample_set("s3://videos/twins/data", train=16, held_out=4)
    arguments = [
        "--name=twin", "--storage=s3://videos/runs", "--data.manifest=s3://videos/twins/data/train.jsonl",
        "--data.validation_manifest=s3://videos/twins/data/held_out.jsonl", f"--tracking.uri=sqlite:///{tmp_path}/m.db",
        "--train.max_steps=4", "--train.global_batch_size=16", "--train.epochs=9",
    ]  # fmt: skip
    jobs = []
    for number in (1, 2):
        command = cluster.submit("python", "jobs/train.py", *arguments)
        command[-len(arguments) - 3 : -len(arguments) - 3] = ["--submission-id", f"twin-{number}"]
        jobs.append(subprocess.Popen(command, env=cluster.environment, cwd="/", stdout=subprocess.PIPE,
                                     stderr=subprocess.STDOUT, text=True))  # fmt: skip
    outputs = [job.communicate(timeout=400)[0] for job in jobs]
    states = ["SUCCEEDED" if "succeeded" in output else "FAILED" for output in outputs]
    assert sorted(states) == ["FAILED", "SUCCEEDED"], outputs
    refused, owner = (outputs[states.index(state)] for state in ("FAILED", "SUCCEEDED"))
    line = next(line for line in refused.splitlines() if line.startswith("error: "))
    assert re.search(r"belongs to the training of \S+ on \S+ \(Ray job twin-[12], process \d+", line), line
    assert "exit code 2" in refused
    assert "training from the start" in owner
    assert "training from the start" not in refused
