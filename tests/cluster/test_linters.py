"""Linters pass on the Dockerfiles and on the shell commands of AWS nodes."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
FILES = ["Dockerfile", "Dockerfile.cpu"]
TOOLS = Path(sys.executable).parent


def lint(command: list[str], text: str) -> str:
    """Return the linter's complaints; "" for none."""
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert bool(done.returncode) == bool(done.stdout), done.stderr
    return done.stdout


def hadolint(text: str) -> str:
    return lint([TOOLS / "hadolint", "-"], text)


@pytest.mark.parametrize("name", FILES)
def test_hadolint_passes_on_the_images(name: str) -> None:
    assert hadolint((CLUSTER / name).read_text()) == ""


@pytest.mark.parametrize(
    ("text", "replacement", "rule"),
    [
        (" --constraint constraints.txt '.[server]'", " mlflow", "DL3013"),
        ("--no-install-recommends ", "", "DL3015"),
        ("USER 1000", "USER root", "DL3002"),
        ("COPY jobs ./jobs", "ADD jobs ./jobs", "DL3020"),
        ("/var/lib/apt/lists/*", "$lists/*", "SC2086"),
    ],
)
@pytest.mark.parametrize("name", FILES)
def test_hadolint_reports_known_faults(name: str, text: str, replacement: str, rule: str) -> None:
    dockerfile = (CLUSTER / name).read_text()
    assert text in dockerfile
    assert rule in hadolint(dockerfile.replace(text, replacement))


def test_shellcheck_passes_on_the_commands_of_aws_nodes() -> None:
    aws = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    shell = [line for key, lines in aws.items() if key.endswith("_commands") for line in lines]
    assert sum("ray start" in line for line in shell) == 2
    check = [TOOLS / "shellcheck", "--shell=bash", "-"]
    assert lint(check, "\n".join(shell) + "\n") == ""
    assert "SC2086" in lint(check, "\n".join(shell).replace('"', "") + "\n")
