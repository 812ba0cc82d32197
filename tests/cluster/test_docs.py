"""docs/clusters.md: the commands for laptop, AWS and Kubernetes are short, and name files that exist."""

import re
import shlex

import pytest

from crosslmm.cli import parse_run
from tests.support.common import ROOT

TEXT = (ROOT / "docs" / "clusters.md").read_text()
BLOCKS = {
    platform: re.search(rf"^## {platform}\n.*?```\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE)[1]
    for platform in ("Laptop", "AWS", "Kubernetes")
}


@pytest.mark.parametrize("platform", BLOCKS)
def test_commands_are_few_and_name_existing_files(platform: str) -> None:
    assert len(BLOCKS[platform].splitlines()) < 10
    files = re.findall(r"(?:cluster|jobs)/[\w./-]*\w", BLOCKS[platform])
    assert len(files) > 1
    assert not [name for name in files if not (ROOT / name).exists()]


@pytest.mark.parametrize("platform", ["Laptop", "AWS"])
def test_the_training_command_is_valid(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (line,) = [line for line in BLOCKS[platform].replace("\\\n", " ").splitlines() if "jobs/train.py" in line]
    arguments = shlex.split(line.split("jobs/train.py ")[1])
    assert parse_run(arguments, "").name == "first-try"
