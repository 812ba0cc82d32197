"""Data files that an attacker changed: no traceback, nothing opened outside of their folder, no hang, bounded memory.

Forty seconds; CROSSLMM_FUZZ_SECONDS=600, as in `make attack`, takes ten minutes, with another seed each time.
"""

import json
import os
import subprocess
import sys
import time

import pytest

from tests.support.common import ROOT
from tests.support.fuzz_videos import VIDEOS

SECONDS = float(os.environ.get("CROSSLMM_FUZZ_SECONDS", 40))
SEED = time.time_ns() % 2**32 if "CROSSLMM_FUZZ_SECONDS" in os.environ else 0


@pytest.mark.attack
@pytest.mark.timeout(SECONDS + 400)
def test_changed_files_do_no_harm(tmp_path):
    command = [sys.executable, "-m", "tests.support.fuzz_files", str(SECONDS), str(SEED), str(tmp_path / "fuzz")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS + 300)
    errors = "\n".join(line[:300] for line in done.stderr.splitlines())  # a changed file stands there whole
    assert done.returncode == 0, f"seed {SEED}, status {done.returncode}: {errors[-6000:]}"
    cases = json.loads(done.stdout)["cases"]
    assert len(cases) == 18 + len(VIDEOS)
    assert min(cases.values()) >= 5
