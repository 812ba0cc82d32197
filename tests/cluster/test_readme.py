"""README's ways to a cluster: short, and of files and commands that are there."""

import re
import shlex
from pathlib import Path

import pytest

from crosslmm.cli import parse_run

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text().split("## Laptop, AWS, Kubernetes\n")[1].split("\n## ")[0]
BLOCKS = dict(zip(["laptop", "aws", "kubernetes"], re.findall(r"```\n(.*?)```", TEXT, re.DOTALL), strict=True))


@pytest.mark.parametrize("way", BLOCKS)
def test_a_way_takes_less_than_ten_lines_of_what_is_there(way: str) -> None:
    assert len(BLOCKS[way].splitlines()) < 10
    named = re.findall(r"(?:cluster|jobs)/[\w./-]*\w", BLOCKS[way])
    assert len(named) > 1
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("way", ["laptop", "aws"])
def test_its_training_is_one_that_is_understood(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (line,) = [one for one in BLOCKS[way].replace("\\\n", " ").splitlines() if "jobs/train.py" in one]
    arguments = shlex.split(line.split("jobs/train.py ")[1])
    assert parse_run(arguments, "").name == "first-try"
