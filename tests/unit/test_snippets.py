"""README and docs: every Python snippet runs as the file that a person makes of it; those that start processes also
run piped to `python -`.

A snippet that cannot run here is parsed, and stands in PARSED_ONLY with the reason.
"""

import ast
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest

from crosslmm.config import TrackingConfig
from crosslmm.data.samples.clips import encode_clip
from crosslmm.model.loading import build_model
from crosslmm.tracking import MlflowRun, register
from tests.support.common import ROOT, random_frames
from tests.support.exports import save_exported

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(?:python|py)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(mlflow\.pyfunc\.[^`]+\))`")
ASK = """\
import mlflow
import pandas as pd

model = {}
print(model.predict(pd.DataFrame({{"video": ["clip.mp4"], "question": ["What happens?"]}})))
"""
SNIPPETS = {
    f"{page.name}-{i}": snippet
    for page in PAGES
    for i, snippet in enumerate(
        [*FENCED.findall(page.read_text()), *map(ASK.format, INLINE.findall(page.read_text().replace("\n", " ")))]
    )
}
PLACEHOLDERS = {"/data/clips": "", "/data/model": "/exported"}
"""Folders of the reader, in the snippets -> in the test's own."""
PARSED_ONLY = {"lora.md-0": "it needs an adapter: tests/unit/model/adapters/test_lora.py runs it with one"}
"""Name of a snippet -> why it cannot run without more than a CPU and two minutes."""
DECODING = ["README.md-0", "mlflow.md-0"]
"""Snippets that start decoders, whose processes could run their caller again; piped, it has no file."""
PRINTED = {"mlflow.md-0": ["answer", "error", "None  video cannot be read or lies outside the roots"]}
"""What the page says that a snippet prints."""
ONCE = 'with open("runs.txt", "a") as file:\n    file.write("once\\n")\n'
"""A script's own side effect: library code that ran its caller again would repeat it."""


@pytest.fixture(scope="module")
def reader(config, processor, tmp_path_factory):
    """A folder with a clip and a registered model, as README's commands leave them."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "clip.mp4").write_bytes(encode_clip(np.repeat(random_frames(1), 8, axis=0)))
    model = folder / "exported"
    save_exported(model, build_model(config.model, processor, seed=0), processor, config)
    tracking = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", artifacts=str(folder / "artifacts"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow misses an example of the input
        assert register(MlflowRun.create(tracking, "run", "tests"), str(model), {}) == "models:/crosslmm@candidate"
    return folder


def test_snippets_are_found_and_are_python():
    assert {"mlflow.md-0", "README.md-0"} <= SNIPPETS.keys()
    assert PARSED_ONLY.keys() | PRINTED.keys() <= SNIPPETS.keys()
    for code in SNIPPETS.values():
        ast.parse(code)


@pytest.mark.parametrize(
    ("name", "how"),
    [*((name, "a file") for name in SNIPPETS if name not in PARSED_ONLY), *((name, "piped") for name in DECODING)],
)
def test_a_snippet_runs(reader, tmp_path, name, how):
    code = SNIPPETS[name]
    for placeholder, folder in PLACEHOLDERS.items():
        code = code.replace(placeholder, f"{reader}{folder}")
    (tmp_path / "script.py").write_text(ONCE + code)
    done = subprocess.run(
        [sys.executable, "script.py" if how == "a file" else "-"],
        input=ONCE + code, cwd=tmp_path, capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{reader}/mlflow.db"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "runs.txt").read_text() == "once\n"
    assert [line for line in PRINTED.get(name, []) if line not in done.stdout] == []
