"""Runs in the environment of `make harness`, which has lmms-eval beside this package."""

import os
import tempfile

# lmms-eval's tasks read it when they are imported; the folders of the benchmarks lie below.
os.environ["HF_HOME"] = tempfile.mkdtemp()
os.environ["HF_HUB_OFFLINE"] = "1"
