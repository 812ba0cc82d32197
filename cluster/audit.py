"""Check installed packages: known advisories, licences, and the builds of FFmpeg inside of wheels. Needs no network.

python cluster/audit.py                                       # of this interpreter
python cluster/audit.py .venv/lib/python3.11/site-packages    # of another environment

audit.yaml holds advisories, licences, and accepted violations with their reasons. Exit status 1: it does not accept
some violation, or no package was found.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

import yaml
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

RULES = Path(__file__).resolve().parent / "audit.yaml"
LIBRARY_BYTES = range(2**16, 2**28)
"""Sizes that a library with FFmpeg may have. Those of torch and CUDA may be larger."""
COPYLEFT_LIBRARIES = re.compile(r"lib(x264|x265|xvidcore|postproc)\b")
"""Libraries under the GPL that builds of FFmpeg may be linked with."""
FLAGS = ("--enable-gpl", "--enable-nonfree")


@dataclass(frozen=True)
class Finding:
    """One violation, by one package."""

    package: str
    version: str
    rule: str
    """An advisory's identifier, or "licence", "nonfree", "gpl"."""
    message: str

    def __str__(self) -> str:
        return f"{self.package} {self.version}  {self.rule}: {self.message}"


@dataclass(frozen=True)
class FFmpeg:
    """A build of FFmpeg inside of a package."""

    version: str
    licence: str
    """As the build itself says."""
    flags: list[str]
    """Those of `FLAGS` that it was configured with."""
    copyleft: list[str]
    """Those of `COPYLEFT_LIBRARIES` beside it."""

    def __str__(self) -> str:
        return ", ".join([f"FFmpeg {self.version}", self.licence, *self.flags, *self.copyleft])


def audit(rules: dict[str, Any], installed: Iterable[Distribution]) -> tuple[list[str], list[Finding]]:
    """Return a description of each build of FFmpeg, and all findings.

    Args:
        rules: contents of audit.yaml.
        installed: the packages.
    """
    licences = {name for licence, others in rules["licences"].items() for name in (licence, *others)}
    builds: list[str] = []
    findings: list[Finding] = []
    for package in installed:
        name, version = canonicalize_name(package.metadata["Name"]), package.version
        found = [(one["id"], one["about"]) for one in rules["advisories"].get(name, []) if affects(one, version)]
        if licence := refused_licence(package, licences):
            found.append(("licence", licence))
        if ffmpeg := ffmpeg_of(package):
            builds.append(f"{name} {version}: {ffmpeg}")
            found += violations(ffmpeg, rules["ffmpeg"])
        findings += [Finding(name, version, rule, message) for rule, message in found]
    return builds, findings


def affects(advisory: dict[str, str], version: str) -> bool:
    """Return whether a version lies in one of the advisory's ranges, which `or` separates."""
    ranges = map(SpecifierSet, advisory["affected"].split(" or "))
    return any(one.contains(version, prereleases=True) for one in ranges)


def refused_licence(package: Distribution, accepted: set[str]) -> str:
    """Return what the package's metadata names as its licence, if that is not accepted; else ""."""
    metadata = package.metadata.json
    licence = str(metadata.get("license_expression", ""))
    classifiers = [one.split(" :: ")[-1] for one in metadata.get("classifier", ()) if one.startswith("License :: ")]
    names = [name for name in classifiers if name not in ("OSI Approved", "DFSG approved")]
    if not licence and names:  # nobody says whether all of several apply, so all must be accepted
        return " and ".join(name for name in names if name not in accepted)
    licence = licence or str(metadata.get("license", "")).strip().partition("\n")[0] or "none is named"
    return "" if satisfied(licence, accepted) else licence


def satisfied(expression: str, accepted: set[str]) -> bool:
    """Return whether an SPDX expression can be met with accepted licences. Brackets are not parsed: all licences
    in an expression with brackets must be accepted."""
    choices = [re.sub(r"[()]|\bOR\b", " AND ", expression)] if "(" in expression else expression.split(" OR ")
    parts = [{part.strip() for part in choice.split(" AND ")} - {""} for choice in choices]
    return any(choice and choice <= accepted for choice in parts)


def ffmpeg_of(package: Distribution) -> FFmpeg | None:
    """Return the build of FFmpeg in a package's files, statically linked or not; None without one."""
    files = package.files or []
    for file in files:
        binary = _library(Path(str(file.locate()))) if file.size is None or file.size in LIBRARY_BYTES else b""
        if found := _ffmpeg_in(binary):
            matches = [COPYLEFT_LIBRARIES.match(file.name) for file in files]
            return FFmpeg(*found, sorted({match[1] for match in matches if match}))
    return None


def _library(path: Path) -> bytes:
    """Return the contents of a native library or program; nothing of another file."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        magic = file.read(4)
        return magic + file.read() if magic == b"\x7fELF" else b""


def _ffmpeg_in(binary: bytes) -> tuple[str, str, list[str]] | None:
    """Return version, licence and flags of the libavcodec in a binary."""
    licence = re.search(rb"libavcodec license: ([^\0]+)", binary)
    if licence is None:
        return None
    version = re.search(rb"FFmpeg version n?([^\0]+)", binary)
    flags = [flag for flag in FLAGS if flag.encode() in binary]
    return version[1].decode() if version else "unknown", licence[1].decode(), flags


def violations(ffmpeg: FFmpeg, advisories: list[dict[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield rule and message of each violation by a build of FFmpeg."""
    number = re.match(r"[\d.]*\d", ffmpeg.version)
    for one in advisories:
        if number is None or affects(one, number[0]):
            yield one["id"], f"FFmpeg {ffmpeg.version}: {one['about']}"
    if "nonfree" in ffmpeg.licence or "--enable-nonfree" in ffmpeg.flags:
        yield "nonfree", f'its FFmpeg says "{ffmpeg.licence}"'
    if ffmpeg.copyleft or ffmpeg.licence.startswith("GPL") or "--enable-gpl" in ffmpeg.flags:
        yield "gpl", f"its FFmpeg is linked with {', '.join(ffmpeg.copyleft) or 'parts under the GPL'}"


def reason(finding: Finding, accepted: Iterable[dict[str, Any]]) -> str:
    """Return why audit.yaml accepts a finding; "" if it does not."""
    fitting = (one for one in accepted if fnmatch(finding.package, one["package"]) and finding.rule in one["rules"])
    return next((one["because"] for one in fitting), "")


def main() -> int:
    """Print the report and return the exit status."""
    rules = yaml.safe_load(RULES.read_text())
    installed = list(distributions(path=sys.argv[1:] or sys.path))
    builds, findings = audit(rules, installed)
    reasons = {finding: reason(finding, rules["accepted"]) for finding in findings}
    lines = [f"checked   {len(installed)} packages"] + [f"ffmpeg    {build}" for build in builds]
    lines += [f"accepted  {finding}; {why}" for finding, why in reasons.items() if why]
    lines += [f"FAIL      {finding}" for finding, why in reasons.items() if not why]
    sys.stdout.write("\n".join(lines) + "\n")
    return int(not installed or not all(reasons.values()))


if __name__ == "__main__":
    raise SystemExit(main())
