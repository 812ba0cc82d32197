"""cluster/audit.py: what it finds in installed packages, and that this project's own pass."""

import subprocess
import sys
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cluster import audit
from tests.support.common import ROOT

RULES = yaml.safe_load(audit.RULES.read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(line.partition("==")[0]): line.partition("==")[2]
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if "==" in line
}
FFMPEG_41 = (
    b"\x7fELF\0libavcodec license: GPL version 2 or later\0FFmpeg version n4.1.6\0--enable-gpl --enable-shared\0"
)
NONFREE = FFMPEG_41.replace(b"GPL version 2 or later", b"nonfree and unredistributable").replace(b"4.1.6", b"99.0")


def install(folder: Path, name: str, version: str, licence: str = "License: MIT", binary: bytes = b"") -> Path:
    """Write an installed package with one large file into a folder -> the folder."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n{licence}\n")
    (folder / name).mkdir()
    (folder / name / "native.so").write_bytes(binary.ljust(audit.LIBRARY_BYTES.start, b"\0"))
    (metadata / "RECORD").write_text(f"{name}/native.so,,\n{metadata.name}/METADATA,,\n")
    return folder


def run(*folders: Path) -> tuple[int, list[str]]:
    """Run the audit as `make audit` does -> exit status, lines."""
    command = [sys.executable, "cluster/audit.py", *map(str, folders)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not done.stderr
    return done.returncode, done.stdout.splitlines()


def installed(name: str) -> Distribution:
    try:
        return distribution(name)
    except PackageNotFoundError:
        pytest.skip(f"{name} is not installed")


def test_what_this_project_installs_passes() -> None:
    status, lines = run()
    assert [line for line in lines if line.startswith("FAIL")] == []
    assert status == 0
    assert any(line.startswith("ffmpeg    av ") for line in lines)


@pytest.mark.parametrize(
    ("package", "fails"),
    [
        ({"name": "torch", "version": "2.5.1"}, "torch 2.5.1  CVE-2025-32434: "),
        ({"name": "PyYAML", "version": "5.3"}, "pyyaml 5.3  CVE-2020-14343: "),  # another spelling
        ({"name": "protobuf", "version": "5.29.4"}, "protobuf 5.29.4  CVE-2025-4565: "),  # the second of three ranges
        ({"name": "h11", "version": "0.15rc1"}, "h11 0.15rc1  CVE-2025-43859: "),
        ({"name": "a", "version": "1", "licence": "License-Expression: AGPL-3.0-only"}, "a 1  licence: AGPL-3.0-only"),
        ({"name": "a", "version": "1", "licence": "License: GPL-3.0"}, "a 1  licence: GPL-3.0"),
        ({"name": "a", "version": "1", "licence": "Keywords: none"}, "a 1  licence: none is named"),
        (
            {"name": "a", "version": "1", "licence": "Classifier: License :: Other/Proprietary License\nLicense: MIT"},
            "a 1  licence: Other/Proprietary License",
        ),
        ({"name": "cv", "version": "1", "binary": NONFREE}, 'cv 1  nonfree: its FFmpeg says "nonfree and unredist'),
        ({"name": "cv", "version": "1", "binary": FFMPEG_41}, "cv 1  gpl: "),
        ({"name": "cv", "version": "1", "binary": FFMPEG_41}, "cv 1  CVE-2026-8461: FFmpeg 4.1.6: "),
        ({"name": "cv", "version": "1", "binary": FFMPEG_41.replace(b"n4.1.6", b"git")}, "cv 1  CVE-2026-8461: "),
    ],
)
def test_a_violation_fails(package: dict[str, Any], fails: str, tmp_path: Path) -> None:
    status, lines = run(install(tmp_path, **package))
    assert status == 1
    assert [line for line in lines if line.startswith(f"FAIL      {fails}")]


def test_a_folder_without_violations_passes_and_an_empty_one_does_not(tmp_path: Path) -> None:
    assert run(install(tmp_path / "good", "torch", "2.13.0"))[0] == 0
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty")[0] == 1


def test_decord_is_what_the_docs_say() -> None:
    (build,), findings = audit.audit(RULES, [installed("decord")])
    assert (
        build
        == "decord 0.6.0: FFmpeg 4.1.6, nonfree and unredistributable, --enable-gpl, --enable-nonfree, postproc, x264"
    )
    assert {"nonfree", "gpl"} <= {finding.rule for finding in findings}


def test_av_has_an_ffmpeg_without_the_holes_that_its_releases_close() -> None:
    (build,), findings = audit.audit(RULES, [installed("av")])
    assert "nonfree" not in build
    assert not {"CVE-2026-8461", "CVE-2026-40962"} & {finding.rule for finding in findings}
    # Wheels before 18 have FFmpeg 8.1.1 or older.
    assert "av>=18" in PROJECT["dependencies"]


@pytest.mark.parametrize(
    ("expression", "accepted"),
    [
        ("MIT", True),
        ("MIT OR GPL-3.0-only", True),
        ("MIT AND GPL-3.0-only", False),
        ("MIT AND BSD-3-Clause OR GPL-3.0-only", True),
        ("GPL-3.0-only OR MIT AND AGPL-3.0-only", False),
        ("(MIT OR GPL-3.0-only) AND BSD-3-Clause", False),
        ("(MIT OR BSD-3-Clause) AND BSD-3-Clause", True),
        ("MITigated", False),
        ("", False),
    ],
)
def test_licence_expressions(expression: str, accepted: bool) -> None:
    assert audit.satisfied(expression, {"MIT", "BSD-3-Clause"}) is accepted


def test_no_pinned_version_is_affected_and_every_advisory_is_about_one() -> None:
    assert RULES["advisories"].keys() <= PINS.keys()
    affected = [
        (name, one["id"])
        for name, some in RULES["advisories"].items()
        for one in some
        if audit.affects(one, PINS[name])
    ]
    assert affected == []


def test_no_lower_bound_admits_an_affected_version() -> None:
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    requirements = [Requirement(one) for some in lists for one in some]
    bounds = [(one, part.version) for one in requirements for part in one.specifier if part.operator == ">="]
    assert len(bounds) > 20
    affected = [
        (one.name, advisory["id"])
        for one, version in bounds
        for advisory in RULES["advisories"].get(canonicalize_name(one.name), [])
        if audit.affects(advisory, version)
    ]
    assert affected == []


def test_what_is_accepted_has_a_reason_and_is_still_found() -> None:
    named = {one["package"] for one in RULES["accepted"]} & PINS.keys()
    _, findings = audit.audit(RULES, map(installed, named))
    found = {(finding.package, finding.rule) for finding in findings}
    for one in RULES["accepted"]:
        assert len(one["because"]) > 10
        assert one["package"] not in named or {(one["package"], rule) for rule in one["rules"]} <= found
