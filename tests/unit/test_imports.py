"""What processes that need no model import: each second of it is waited for, on every start of a run."""

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "mlflow", "decord", "torchcodec"}


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("crosslmm.config", set()),
        ("crosslmm.cli", set()),
        ("crosslmm.train.checkpoint_store", set()),
        ("crosslmm.train.events", set()),
        ("crosslmm.train.job", set()),
        ("crosslmm.data.dataset", set()),
        ("crosslmm.tracking", {"mlflow"}),
        ("crosslmm.train.worker", {"torch", "transformers"}),
    ],
)
def test_a_module_imports_what_it_needs(module, heavy):
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert HEAVY & set(json.loads(printed)) == heavy
