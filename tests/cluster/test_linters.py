"""Linters on what Docker and nodes of AWS are told to run."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
FILES = ["Dockerfile", "Dockerfile.cpu"]
TOOLS = Path(sys.executable).parent


def told(command: list[str], text: str) -> str:
    """What a linter says of it; nothing, if it is content."""
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert bool(done.returncode) == bool(done.stdout), done.stderr
    return done.stdout


def hadolint(text: str) -> str:
    return told([TOOLS / "hadolint", "-"], text)


@pytest.mark.parametrize("name", FILES)
def test_a_linter_is_content_with_the_images(name: str) -> None:
    assert hadolint((CLUSTER / name).read_text()) == ""


@pytest.mark.parametrize(
    ("is_there", "instead", "rule"),
    [
        (" --constraint constraints.txt '.[server]'", " mlflow", "DL3013"),
        ("--no-install-recommends ", "", "DL3015"),
        ("USER 1000", "USER root", "DL3002"),
        ("COPY jobs ./jobs", "ADD jobs ./jobs", "DL3020"),
        ("/var/lib/apt/lists/*", "$lists/*", "SC2086"),
    ],
)
@pytest.mark.parametrize("name", FILES)
def test_a_linter_finds_what_is_wrong(name: str, is_there: str, instead: str, rule: str) -> None:
    text = (CLUSTER / name).read_text()
    assert is_there in text
    assert rule in hadolint(text.replace(is_there, instead))


def test_a_linter_is_content_with_what_nodes_of_aws_run() -> None:
    aws = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    shell = [line for key, lines in aws.items() if key.endswith("_commands") for line in lines]
    assert sum("ray start" in line for line in shell) == 2
    check = [TOOLS / "shellcheck", "--shell=bash", "-"]
    assert told(check, "\n".join(shell) + "\n") == ""
    assert "SC2086" in told(check, "\n".join(shell).replace('"', "") + "\n")
