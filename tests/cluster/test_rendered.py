"""Files that clouds and clusters read are what their templates and facts give."""

import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
sys.path.insert(0, str(CLUSTER))

import render  # noqa: E402

RENDERED = render.render()


@pytest.mark.parametrize("path", RENDERED, ids=lambda path: str(path.relative_to(CLUSTER)))
def test_a_committed_file_is_what_its_template_gives(path: Path) -> None:
    assert path.read_text() == RENDERED[path], "python cluster/render.py"


def test_the_tracking_server_has_one_command_line() -> None:
    compose = yaml.safe_load((CLUSTER / "mlflow" / "compose.yaml").read_text())["services"]["mlflow"]
    (deployment,) = (
        one
        for one in yaml.safe_load_all((CLUSTER / "mlflow" / "kubernetes.yaml").read_text())
        if one["kind"] == "Deployment"
    )
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["command"] == compose["command"]
    there = {one["name"]: one.get("value") for one in container["env"]}
    assert there.keys() == compose["environment"].keys()
    for name, value in there.items():
        # A secret comes by reference: from a Secret there, from the environment without a default here.
        assert compose["environment"][name] == value or (
            value is None and compose["environment"][name].startswith(f"${{{name}:?")
        )
