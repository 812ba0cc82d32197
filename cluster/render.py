"""Render templates/ with facts.yaml into the files of this folder that Docker, Ray, Kubernetes and MLflow read.

python cluster/render.py
"""

import tomllib
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

CLUSTER = Path(__file__).resolve().parent
ROOT = CLUSTER.parent
TEMPLATES = CLUSTER / "templates"


def facts() -> dict[str, Any]:
    """Return the variables of the templates: facts.yaml, and versions that constraints.txt and pyproject.toml pin."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = {"version": project["version"], "ray": pins["ray"], "flash_attn": pins["flash-attn"]}
    return versions | yaml.safe_load((CLUSTER / "facts.yaml").read_text())


def render() -> dict[Path, str]:
    """Return each file's path and contents. Templates whose names begin with _ are only included in others."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    values = facts()
    names = [name for name in environment.list_templates() if not Path(name).name.startswith("_")]
    return {CLUSTER / name: environment.get_template(name).render(values) for name in names}


if __name__ == "__main__":
    for path, text in render().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
