"""The images without Docker: what their files install, in a clean environment, from what they copy and nothing else.

Not run here, for want of Docker, a GPU and its compiler: the base images, apt's packages, users, and flash-attn's
kernels, of which only the source's own build without them is (`FLASH_ATTENTION_SKIP_CUDA_BUILD`). uv's part is done by
`python -m venv`, with the Python that runs the tests; and torch is the build that the index at hand has.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Two installations of a few minutes each.
pytestmark = [pytest.mark.image, pytest.mark.timeout(1200)]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
ELSEWHERE = ("apt-get ", "rm -rf /var/lib/apt/", "useradd ", "userdel ")
"""What is left out: it is about the system around the environment."""


@dataclass
class Stage:
    """One FROM of a Dockerfile, its folders below one of ours."""

    root: Path
    venv: Path
    folder: str = "/"
    variables: dict[str, str] = field(default_factory=dict)

    def at(self, path: str) -> Path:
        place = Path(self.folder) / path
        return self.root / place.relative_to("/")

    def here(self) -> Path:
        self.at(".").mkdir(parents=True, exist_ok=True)
        return self.at(".")

    def copy(self, sources: list[str], to: str) -> None:
        for source in sources:
            target = self.at(to) / Path(source).name if to.endswith("/") else self.at(to)
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, target)

    def run(self, *command: str) -> str:
        """In the stage's folder, with the environment's programs first -> what it printed."""
        own = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
        own |= self.variables | {"PATH": f"{self.venv}/bin:{os.environ['PATH']}", "HOME": str(self.root)}
        done = subprocess.run(command, cwd=self.here(), env=own, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """(FROM, ...) of a Dockerfile, with its continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        word, rest = line.split(maxsplit=1)
        yield word, rest


def build(name: str, scratch: Path) -> Stage:
    """Do what a Dockerfile says, as far as it can be done here -> its last stage."""
    stage = Stage(scratch / "none", scratch / "venv")
    python = [sys.executable, "-m", "venv", str(stage.venv)]
    if name == "Dockerfile.cpu":  # whose base image has it
        subprocess.run(python, check=True)
    for number, (word, rest) in enumerate(instructions((ROOT / "cluster" / name).read_text())):
        if word == "FROM":
            stage = Stage(scratch / f"stage-{number}", stage.venv)
        elif word == "WORKDIR":
            stage.folder = rest
        elif word == "ENV":
            pairs = dict(part.split("=", 1) for part in shlex.split(rest))
            stage.variables |= {
                key: value for key, value in pairs.items() if key not in ("PATH", "HOME", "VIRTUAL_ENV")
            }
        elif word == "COPY" and not rest.startswith("--from="):
            *sources, to = rest.split()
            stage.copy(sources, to)
        elif word == "RUN":
            for command in rest.split("&&"):
                install(stage, command.strip(), python)
        else:
            assert word in ("COPY", "USER", "ARG"), word
    return stage


def install(stage: Stage, command: str, python: list[str]) -> None:
    """One command of a RUN."""
    if command.startswith("uv venv --seed "):
        subprocess.run(python, check=True)
    elif flash := re.fullmatch(r"pip install .* (flash-attn==\S+)", command):
        # Its metadata and its Python, from the source of that version; no kernels, so nothing that could be imported.
        stage.variables["FLASH_ATTENTION_SKIP_CUDA_BUILD"] = "TRUE"
        made = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir=flash", flash[1]]
        stage.run(*made)
        (wheel,) = stage.at("flash").glob("*.whl")
        assert wheel.name.startswith(flash[1].replace("-", "_").replace("==", "-"))
    elif command.startswith("pip install "):
        stage.run(*shlex.split(command))
    else:
        assert command.startswith(ELSEWHERE), command


@pytest.fixture(scope="module", params=["Dockerfile", "Dockerfile.cpu"])
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return build(request.param, tmp_path_factory.mktemp(request.param))


def test_what_is_installed_is_what_was_tested(image: Stage) -> None:
    installed = {one["name"]: one["version"] for one in json.loads(image.run("pip", "list", "--format=json"))}
    pinned = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in PINS.items()}
    own = {re.sub(r"[-_.]+", "-", name).lower(): version.split("+")[0] for name, version in installed.items()}
    for name in ("pip", "setuptools", "crosslmm"):
        own.pop(name, None)
    assert own == {name: pinned.get(name) for name in own}
    assert len(own) > 80
    assert not {"pytest", "ruff", "mypy"} & own.keys()
    assert "No broken requirements" in image.run("pip", "check")


def test_the_package_needs_nothing_else(image: Stage) -> None:
    every = (
        "import importlib, pkgutil, crosslmm\n"
        "for one in pkgutil.walk_packages(crosslmm.__path__, 'crosslmm.'): importlib.import_module(one.name)\n"
        "print(crosslmm.__file__)"
    )
    assert image.run("python", "-P", "-c", every).startswith(str(image.venv))


# The demo takes no arguments: it would begin.
JOBS = [
    path.name for path in sorted((ROOT / "jobs").glob("*.py")) if path.stem != "demo" and "__main__" in path.read_text()
]


@pytest.mark.parametrize("job", JOBS)
def test_each_job_is_there(image: Stage, job: str) -> None:
    assert "usage" in image.run("python", f"jobs/{job}", "--help").lower()


def test_a_run_of_the_clusters_is_understood(image: Stage) -> None:
    command = ["python", "jobs/train.py", "--config=paper-2b", "--config=stage-1", "--config=cluster/run.yaml"]
    assert "storage: s3://" in image.run(*command, "--print_config")


def test_the_servers_are_there(image: Stage) -> None:
    assert "--app-name" in image.run("mlflow", "server", "--help")
    assert "--older-than" in image.run("mlflow", "gc", "--help")
    assert image.run("ray", "--version").split()[-1] == PINS["ray"]
    # Users and passwords, and PostgreSQL, are of the extra.
    image.run("python", "-c", "import psycopg, mlflow.server.auth")
