"""jobs/track.py logs: why a run ended, and what its processes wrote."""

import json
import runpy
import sys

import pytest

from tests.support.common import ROOT


@pytest.fixture
def job(monkeypatch, capsys):
    """Return a function that runs the command and returns exit status, stdout and stderr."""
    main = runpy.run_path(str(ROOT / "jobs" / "track.py"))["main"]

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["track.py", "logs", *map(str, arguments)])
        try:
            status = main()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def runs(tmp_path):
    """Two starts of a run: the second has a driver and two files of a rank."""
    folder = tmp_path / "first"
    (folder / "logs").mkdir(parents=True)
    tags = {"ended": "failed: worker 1: its process ended; the same --name first resumes the run after step 7"}
    (folder / "run.json").write_text(json.dumps({"name": "first", "tags": tags}))
    for name in ("1000000000-driver", "2000000000-driver", "2000000005-rank-00001-0", "2000000005-rank-00001-1"):
        (folder / "logs" / f"{name}.log").write_text(f"text of {name}\x1b[31m\n")
    (folder / "logs" / "other").write_text("not one of ours")
    return tmp_path


def test_logs_of_a_run_whose_cluster_is_gone(job, runs):
    status, out, err = job("first", "--storage", runs)
    assert (status, err) == (0, "")
    assert "first: failed: worker 1: its process ended; the same --name first resumes the run after step 7" in out
    assert "text of 2000000000-driver" in out
    assert "text of 1000000000" not in out
    assert "other" not in out
    assert "\x1b" not in out


def test_logs_of_one_process(job, runs):
    _, out, _ = job("first", "--storage", runs, "--of", "rank-00001")
    assert "text of 2000000005-rank-00001-0" in out
    assert "text of 2000000005-rank-00001-1" in out
    assert "text of 2000000000-driver" not in out
    _, out, _ = job("first", "--storage", runs, "--of", "1000000000-driver.log")
    assert "text of 1000000000-driver" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["second"], "--name second: there is no run.json in "),
        (["first", "--of", "rank-00007"], "--of rank-00007: first has no such log; there are driver, rank-00001"),
        (["../first"], "error: "),
    ],
)
def test_what_is_not_there_is_one_line(job, runs, arguments, message):
    status, out, err = job(*arguments, "--storage", runs)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
