"""pyproject.toml declares every package that is imported, and constraints.txt pins every declared one."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.support.common import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OWN_PACKAGES = {path.name for path in ROOT.iterdir() if path.is_dir()}
UNPINNED = {"crosslmm", "torchcodec"}
"""The package itself, and an optional decoder that no test environment installs."""


def distribution_names(requirements: list[str]) -> set[str]:
    """Return the normalised names of distributions in a list of requirements."""
    return {normalised(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported_packages(folder: str) -> dict[str, Path]:
    """Return the third-party top-level packages that a folder's files import, each with one of the files."""
    packages = {}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            packages |= {name.split(".")[0]: path for name in names}
    return {name: path for name, path in packages.items() if name not in sys.stdlib_module_names | OWN_PACKAGES}


@pytest.mark.parametrize("folder", ["crosslmm", "jobs", "cluster", "tune_spaces", "benchmarks", "tests"])
def test_every_import_is_declared(folder: str) -> None:
    declared = distribution_names(PROJECT["dependencies"]).union(*map(distribution_names, EXTRAS.values()))
    distributions = packages_distributions()
    undeclared = {
        package: str(path)
        for package, path in imported_packages(folder).items()
        # A package that is not installed here belongs to an extra of its own name.
        if not {normalised(name) for name in distributions.get(package, [package])} & declared
    }
    assert not undeclared


def test_every_declared_package_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {normalised(line.split("==")[0]) for line in lines if "==" in line}
    declared = distribution_names(PROJECT["dependencies"]).union(*map(distribution_names, EXTRAS.values()))
    assert declared - pinned <= UNPINNED
