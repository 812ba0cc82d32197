"""Render templates/ with facts.yaml into the files of this folder that Docker, Ray, Kubernetes and MLflow read.

python cluster/render.py
python cluster/render.py --pin    # first asks the registries for the digests of all images, through docker buildx
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

CLUSTER = Path(__file__).resolve().parent
ROOT = CLUSTER.parent
TEMPLATES = CLUSTER / "templates"
DIGESTS = CLUSTER / "digests.yaml"
UNKNOWN_DIGEST = f"sha256:{0:064}"
"""Stands for a digest that no registry was asked for: no machine can pull such an image."""
IMAGE = re.compile(r"([\w./:-]+)@(sha256:[0-9a-f]{64})")
INSPECT = ("docker", "buildx", "imagetools", "inspect", "--format", "{{.Manifest.Digest}}")


def facts() -> dict[str, Any]:
    """Return the variables of the templates: facts.yaml, and versions that constraints.txt and pyproject.toml pin."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = {"version": project["version"], "ray": pins["ray"], "flash_attn": pins["flash-attn"]}
    return versions | yaml.safe_load((CLUSTER / "facts.yaml").read_text())


def digests() -> dict[str, str]:
    """Return the digest of each image that digests.yaml names, by name and tag."""
    return yaml.safe_load(DIGESTS.read_text()) or {}


def render() -> dict[Path, str]:
    """Return each file's path and contents. Templates whose names begin with _ are only included in others."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    known = digests()
    environment.globals["pinned"] = lambda image: f"{image}@{known.get(image, UNKNOWN_DIGEST)}"
    values = facts()
    names = [name for name in environment.list_templates() if not Path(name).name.startswith("_")]
    return {CLUSTER / name: environment.get_template(name).render(values) for name in names}


def images(files: dict[Path, str]) -> dict[str, str]:
    """Return the digest of each image that the files name, by name and tag."""
    return dict(sorted(IMAGE.findall("".join(files.values()))))


def pin() -> None:
    """Ask for each image's digest and write digests.yaml. An image that is not in its registry yet stays unknown."""
    lines = [line for line in DIGESTS.read_text().splitlines() if line.startswith("#")]
    for image in images(render()):
        asked = subprocess.run([*INSPECT, image], capture_output=True, text=True)
        if asked.returncode:
            sys.stderr.write(f"{image}: {' '.join(asked.stderr.split())[:200]}\n")
        else:
            lines.append(f"{image}: {asked.stdout.strip()}")
    DIGESTS.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Write all files; say which images have no digest yet."""
    if "--pin" in sys.argv[1:]:
        pin()
    files = render()
    for path, text in files.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    unknown = [image for image, digest in images(files).items() if digest == UNKNOWN_DIGEST]
    if unknown:
        sys.stderr.write(f"no machine can pull these before `render.py --pin`: {', '.join(unknown)}\n")


if __name__ == "__main__":
    main()
