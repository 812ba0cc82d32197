import io
import logging

import pytest
import rich
from rich.console import Console
from rich.table import Table

from crosslmm.cli import start_job
from crosslmm.config import BadConfig
from crosslmm.progress import Progress, cell, set_up_logging

log = logging.getLogger("crosslmm.test")


@pytest.fixture
def output(monkeypatch, capsys):
    """Reads what was printed; afterwards, rich's console and the package's logger are as before."""
    package = logging.getLogger("crosslmm")
    before = package.handlers, package.propagate, package.level
    monkeypatch.setattr(rich, "_console", Console())
    yield lambda: capsys.readouterr().out
    package.handlers, package.propagate = before[:2]
    package.setLevel(before[2])


def test_plain_log_lines_carry_level_and_run(output):
    set_up_logging("first-try")
    log.info("a [bold]message[/bold] of %s", "a module")
    assert "INFO run=first-try a [bold]message[/bold] of a module" in output()


def test_a_cell_of_a_table_shows_any_text_as_it_is():
    table = Table(title=cell("[/title]"))
    table.add_row(cell("[/x] [red]a\x1b[2J\nb"), cell("http://user:s3cr3t/x@host:5000/a"))
    console = Console(width=100, file=io.StringIO())
    console.print(table)
    printed = console.file.getvalue()
    assert "[/title]" in printed
    assert r"[/x] [red]a\x1b[2J\nb" in printed
    assert "http://***@host:5000/a" in printed


def test_a_log_format_can_use_rank_and_step(output, monkeypatch):
    monkeypatch.setenv("CROSSLMM_LOG_FORMAT", "%(rank)s %(step)s %(message)s")
    set_up_logging()
    log.warning("slow", extra={"rank": 3, "step": 7})
    log.warning("general")
    assert output() == "3 7 slow\n- - general\n"


def test_the_log_level_comes_from_the_environment(output, monkeypatch):
    monkeypatch.setenv("CROSSLMM_LOG_LEVEL", "warning")
    set_up_logging()
    log.info("unseen")
    assert output() == ""


def test_an_unknown_log_level_is_refused_in_one_line(output, monkeypatch):
    monkeypatch.setenv("CROSSLMM_LOG_LEVEL", "loud")
    with pytest.raises(BadConfig, match=r"CROSSLMM_LOG_LEVEL: .*LOUD.*; it takes DEBUG, INFO, WARNING or ERROR"):
        start_job()


def test_plain_progress_is_a_log_line_per_interval(output, monkeypatch):
    monkeypatch.setenv("CROSSLMM_LOG_FORMAT", "%(message)s")
    set_up_logging()
    now = [0.0]
    monkeypatch.setattr("crosslmm.progress.time.monotonic", lambda: now[0])
    with Progress(log, "training", 500, "step") as progress:
        for step in range(1, 31):
            now[0] = float(step)
            progress.update(step, f"loss {step}")
    assert output().splitlines() == [f"step {n}/500  loss {n}" for n in (10, 20, 30)]


def test_a_process_without_logging_shows_no_progress(output):
    with Progress(log, "training", 1, "step") as progress:
        progress.update(1, "done")
    assert output() == ""
