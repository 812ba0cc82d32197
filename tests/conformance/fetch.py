"""Fetch Transformers' own tests of a model into .cache/conformance, as the package `transformers_tests`.

    python tests/conformance/fetch.py               from the source distribution of the installed version, with pip
    python tests/conformance/fetch.py CHECKOUT      from a checkout of its repository at that version

The source distribution lacks the tests of generation and of exporters; a checkout has them.
"""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import transformers

TARGET = Path(".cache/conformance")
PACKAGE = TARGET / "transformers_tests"
IN_A_CHECKOUT_ONLY = {
    "generation/test_utils.py": "class GenerationTesterMixin: ...\n",
    "exporters/test_export.py": "class ExportTesterMixin: ...\nclass ExportGenerateTesterMixin: ...\n",
}


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)


def from_source_distribution() -> None:
    version = transformers.__version__
    archives = TARGET / "sdist"
    if not (archives / f"transformers-{version}.tar.gz").exists():
        pip("download", "--no-deps", "--no-binary=transformers", f"--dest={archives}", f"transformers=={version}")
    with tarfile.open(archives / f"transformers-{version}.tar.gz") as archive:
        prefix = f"transformers-{version}/tests/"
        members = [member for member in archive if member.name.startswith(prefix)]
        archive.extractall(TARGET, members, filter="data")
    (TARGET / f"transformers-{version}" / "tests").rename(PACKAGE)


def rename_package() -> None:
    """Let files that import their package as `tests` find it under its new name: our own tests have the old one."""
    for file in PACKAGE.rglob("*.py"):
        file.write_text(file.read_text().replace("from tests.", f"from {PACKAGE.name}."))


def main() -> None:
    shutil.rmtree(PACKAGE, ignore_errors=True)
    TARGET.mkdir(parents=True, exist_ok=True)
    if len(sys.argv) > 1:
        shutil.copytree(Path(sys.argv[1]) / "tests", PACKAGE)
    else:
        from_source_distribution()
    rename_package()
    for name, stub in IN_A_CHECKOUT_ONLY.items():
        file = PACKAGE / name
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            file.write_text(stub)
            print(f"{name} is not in the source distribution; give a checkout of the repository to run it")
    if not (TARGET / "parameterized").exists():
        pip("install", "--no-deps", f"--target={TARGET}", "parameterized")


if __name__ == "__main__":
    main()
