"""What processes that need no model import: each second of it is waited for, on every start of a run."""

import json
import subprocess
import sys

import pytest

from tests.support.common import ROOT

HEAVY = {"torch", "transformers", "mlflow", "decord", "torchcodec"}


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("crosslmm.config", set()),
        ("crosslmm.cli", set()),
        ("crosslmm.train.checkpoint.seals", set()),
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


SIDE_EFFECTS = """\
import importlib, json, logging, os, pkgutil, warnings
# What third-party packages do to a program when they are imported is theirs.
import {imports}
def state():
    loggers = [logging.getLogger(), *(x for x in logging.root.manager.loggerDict.values() if hasattr(x, "level"))]
    levels = {{x.name: [x.level, len(x.handlers), x.propagate] for x in loggers}}
    return dict(os.environ), [str(f) for f in warnings.filters], levels
before = state()
import crosslmm
changed = {{}}
for module in pkgutil.walk_packages(crosslmm.__path__, "crosslmm."):
    if module.name == "crosslmm.evaluate.lmms_eval_model":  # needs lmms-eval, which has an environment of its own
        continue
    importlib.import_module(module.name)
    environment, filters, levels = state()
    known = {{name: levels[name] for name in before[2]}}
    if (environment, filters, known) != before:
        changed[module.name] = [environment != before[0], filters != before[1], known != before[2]]
        before = environment, filters, before[2] | known
print(json.dumps(changed))
"""


def test_importing_the_package_changes_nothing_in_the_program():
    """No environment variable, no warning filter, no log level: entry points set these."""
    third_party = (
        "av, boto3, decord, fsspec, jsonargparse, mlflow, mlflow.pyfunc, mlflow.system_metrics.system_metrics_monitor, "
        "optuna, optuna.importance, pandas, pebble, plotly.graph_objects, plotly.offline, pydantic, "
        "ray, ray.data, ray.train.torch, ray.tune, "
        "ray.tune.search.optuna, rich, s3fs, sklearn.datasets, torch, torch.distributed.tensor, "
        "transformers, transformers.modeling_utils"
    )
    command = [sys.executable, "-c", SIDE_EFFECTS.format(imports=third_party)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == {}


FOLDERS = sorted({path.parent.relative_to(ROOT) for path in ROOT.glob("crosslmm/**/*.py")})


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_no_folder_has_more_modules_than_one_sees_at_once(folder):
    assert len([path for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"]) <= 13
