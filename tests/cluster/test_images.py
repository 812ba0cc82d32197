"""The Dockerfiles without Docker: their install steps run in a clean environment, with only the files that they copy.

Not covered, since they need Docker, a GPU and its compiler: base images, apt packages, users, and flash-attn's kernels
(its source is built without them: `FLASH_ATTENTION_SKIP_CUDA_BUILD`). `python -m venv` with the tests' Python stands in
for uv, and torch is the build of the configured package index.
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
SYSTEM_COMMANDS = ("apt-get ", "rm -rf /var/lib/apt/", "useradd ", "userdel ")
"""Starts of commands that are skipped: they change the system, not the Python environment."""


@dataclass
class Stage:
    """One stage of a Dockerfile, with its file system below `root`."""

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
        """Run a command in the stage's working directory and virtual environment -> its output."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
        environment |= self.variables | {"PATH": f"{self.venv}/bin:{os.environ['PATH']}", "HOME": str(self.root)}
        done = subprocess.run(command, cwd=self.here(), env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Yield (instruction, arguments) of a Dockerfile, continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        word, rest = line.split(maxsplit=1)
        yield word, rest


def build(name: str, scratch: Path) -> Stage:
    """Execute a Dockerfile as far as possible without Docker -> its last stage."""
    stage = Stage(scratch / "none", scratch / "venv")
    python = [sys.executable, "-m", "venv", str(stage.venv)]
    if name == "Dockerfile.cpu":  # its base image contains Python
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
        elif word == "ARG" and "=" in rest:
            stage.variables |= dict([rest.split("=", 1)])
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
    """Execute one command of a RUN instruction."""
    if command.startswith("uv venv --seed "):
        subprocess.run(python, check=True)
    elif flash := re.fullmatch(r"pip install .* (flash-attn==\S+)", command):
        # Metadata and Python files from the source of that version, without kernels, so it cannot be imported.
        stage.variables["FLASH_ATTENTION_SKIP_CUDA_BUILD"] = "TRUE"
        made = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir=flash", flash[1]]
        stage.run(*made)
        (wheel,) = stage.at("flash").glob("*.whl")
        assert wheel.name.startswith(flash[1].replace("-", "_").replace("==", "-"))
    elif command.startswith("{ test "):
        stage.run("sh", "-c", command)
    elif command.startswith("pip install "):
        stage.run(*shlex.split(command))
    else:
        assert command.startswith(SYSTEM_COMMANDS), command


@pytest.fixture(scope="module", params=["Dockerfile", "Dockerfile.cpu"])
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return build(request.param, tmp_path_factory.mktemp(request.param))


def test_installed_versions_are_the_pinned_ones(image: Stage) -> None:
    installed = {one["name"]: one["version"] for one in json.loads(image.run("pip", "list", "--format=json"))}
    pinned = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in PINS.items()}
    versions = {re.sub(r"[-_.]+", "-", name).lower(): version.split("+")[0] for name, version in installed.items()}
    for name in ("pip", "setuptools", "crosslmm"):
        versions.pop(name, None)
    assert versions == {name: pinned.get(name) for name in versions}
    assert len(versions) > 80
    assert not {"pytest", "ruff", "mypy", "decord"} & versions.keys()
    assert "No broken requirements" in image.run("pip", "check")


def test_the_audit_passes_and_av_is_the_only_package_with_ffmpeg(image: Stage) -> None:
    folder = next(image.venv.glob("lib/python*/site-packages"))
    report = subprocess.run([sys.executable, ROOT / "cluster/audit.py", folder], capture_output=True, text=True)
    assert report.returncode == 0, report.stdout + report.stderr
    assert [line.split()[1] for line in report.stdout.splitlines() if line.startswith("ffmpeg ")] == ["av"]


def test_a_run_that_asks_for_decord_is_refused_in_one_line(image: Stage) -> None:
    ask = "from crosslmm.data.video.decode import require_backend; require_backend('auto'); require_backend('decord')"
    code = f"try: exec({ask!r})\nexcept Exception as error: print(error)"
    assert image.run("python", "-P", "-c", code).startswith("data.decoder: decord is not installed; pip install decord")


def test_every_module_imports(image: Stage) -> None:
    every = (
        "import importlib, pkgutil, crosslmm\n"
        "for one in pkgutil.walk_packages(crosslmm.__path__, 'crosslmm.'): importlib.import_module(one.name)\n"
        "print(crosslmm.__file__)"
    )
    assert image.run("python", "-P", "-c", every).startswith(str(image.venv))


JOBS = [path.name for path in sorted((ROOT / "jobs").glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("job", JOBS)
def test_each_job_prints_help(image: Stage, job: str) -> None:
    assert "usage" in image.run("python", f"jobs/{job}", "--help").lower()


def test_the_clusters_run_configuration_is_valid(image: Stage) -> None:
    command = ["python", "jobs/train.py", "--config=paper-2b", "--config=stage-1", "--config=cluster/run.yaml"]
    assert "storage: s3://" in image.run(*command, "--print_config")


def test_mlflow_and_ray_are_installed(image: Stage) -> None:
    assert "--app-name" in image.run("mlflow", "server", "--help")
    assert "--older-than" in image.run("mlflow", "gc", "--help")
    assert image.run("ray", "--version").split()[-1] == PINS["ray"]
    # The extra `server` adds users and PostgreSQL.
    image.run("python", "-c", "import psycopg, mlflow.server.auth")
