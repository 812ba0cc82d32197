"""Runs in the environment of `make harness`, which has lmms-eval beside this package and sets HF_HUB_OFFLINE."""

import importlib.util
import os
import tempfile

# lmms-eval's tasks read it when they are imported; the folders of the benchmarks lie below.
if importlib.util.find_spec("lmms_eval"):
    os.environ["HF_HOME"] = tempfile.mkdtemp()
