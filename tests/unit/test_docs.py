"""README and docs: every command is accepted by its program, every link and named file exists."""

import argparse
import importlib
import re
import shlex
import tomllib

import jsonargparse
import pytest

from tests.support.common import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text() for page in PAGES}
FENCES = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:python|make|pytest) [^`\n]+)`")


def commands(start):
    """(page, command) of every command in a code block or in backquotes that begins with `start`."""
    for page, text in TEXTS.items():
        lines = [line for block in FENCES.findall(text) for line in block.replace("\\\n", " ").splitlines()]
        lines += INLINE.findall(text.replace("\n", " "))
        for line in lines:
            line = line.partition("  #")[0].partition(" -- ")[2] or line.partition("  #")[0]
            if line.strip().startswith(start) and "..." not in line:
                yield page, line.strip()


JOBS = sorted(set(commands("python jobs/")))


class Parsed(BaseException):
    """The arguments were accepted."""


def test_readme_is_two_screens():
    assert len(TEXTS["README.md"].splitlines()) <= 200


@pytest.mark.parametrize(("page", "command"), JOBS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(JOBS)])
def test_a_job_accepts_the_arguments_in_the_docs(page, command, tmp_path, monkeypatch):
    script, *arguments = shlex.split(command)[1:]
    for name in ("cluster", "tune_spaces"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my-run.yaml").symlink_to(ROOT / "crosslmm" / "presets" / "tiny.yaml")
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    (tmp_path / "runs" / "digits" / "sweep.yaml").write_text("data: {num_frames: 4}")  # of benchmarks.ablation
    (tmp_path / "my_space.py").symlink_to(ROOT / "tune_spaces" / "pooling.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [script, *arguments])
    for parser in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
        parse = parser.parse_args

        def accept(self, *given, parse=parse, **options):
            parse(self, *given, **options)
            raise Parsed

        monkeypatch.setattr(parser, "parse_args", accept)
    main = importlib.import_module(f"jobs.{script.removeprefix('jobs/').removesuffix('.py')}").main
    with pytest.raises((Parsed, SystemExit)) as left:
        main()
    assert left.type is Parsed or left.value.code == 0, f"{page}: {command}"


def test_make_targets_in_the_docs_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {word for _, command in commands("make ") for word in command.split()[1:] if "=" not in word}
    assert named
    assert named <= targets


def test_benchmarks_in_the_docs_exist_and_know_their_flags():
    for page, command in commands("python -m benchmarks."):
        module, *arguments = shlex.split(command)[2:]
        path = ROOT / module.replace(".", "/")
        source = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        assert source.exists(), f"{page}: {command}"
        flags = [argument for argument in arguments if argument.startswith("--")]
        assert all(f'"{flag}"' in source.read_text() for flag in flags), f"{page}: {command}"


def test_markers_in_the_docs_exist():
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    named = {match for text in TEXTS.values() for match in re.findall(r"pytest -m (\w+)", text)}
    assert named <= {marker.partition(":")[0] for marker in markers}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []
    named = re.findall(r"`((?:crosslmm|jobs|cluster|tests|benchmarks|tune_spaces|docs)/[\w./-]+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_messages_in_troubleshooting_are_messages_of_the_code():
    files = [*(ROOT / "crosslmm").rglob("*.py"), *(ROOT / "jobs").glob("*.py")]
    source = re.sub(r'"\s*\n\s*f?"', "", "\n".join(file.read_text() for file in files))
    source = re.sub(r"\{[^{}]*\}|%s", "...", source)
    rows = re.findall(r"^\| `([^`]+)` \|", TEXTS["troubleshooting.md"], re.MULTILINE)
    assert len(rows) >= 10
    fragments = [part.strip() for row in rows for part in row.split("...") if len(part.strip()) > 8]
    assert [fragment for fragment in fragments if fragment not in source] == []
