"""A model of 2 GB in the registry, over the MLflow server of cluster/mlflow: registered, loaded, answered."""

import mlflow
import numpy as np
import pandas as pd
import pytest

from crosslmm import storage
from crosslmm.cli import parse_run
from crosslmm.config import TrackingConfig
from crosslmm.data.samples.clips import encode_clip
from crosslmm.model.loading import build_processor
from crosslmm.tracking import MlflowRun, quiet_mlflow, register
from crosslmm.tracking.versions import find_version
from tests.support.common import ROOT, random_frames
from tests.support.exports import export_model
from tests.support.mlflow_server import running_mlflow_server
from tests.support.object_store import object_store_in_use

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]
# A decoder of 470 M parameters, more than half of them in its embeddings.
WIDE = [
    "--model.language.num_hidden_layers=8",
    "--model.language.hidden_size=1024",
    "--model.language.intermediate_size=7168",
    "--model.language.vocab_size=262144",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("store") / "swift"
    with (
        object_store_in_use(root, venv=ROOT / ".cache" / "swift-venv", bucket="videos") as store,
        running_mlflow_server(store) as server,
    ):
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return the folder of an exported model, as a run leaves it."""
    config = parse_run(WIDE, "")
    return export_model(tmp_path_factory.mktemp("run") / "model", config, build_processor(config.model))


@pytest.mark.parametrize("parts", [True, False], ids=["in parts to the store", "file by file through the server"])
def test_a_large_model_is_registered_loaded_and_answers(server, model, parts, monkeypatch, tmp_path):
    for name, value in server.login().items():
        monkeypatch.setenv(name, value)
    if not parts:
        monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "false")
    quiet_mlflow()
    weights = [path.stat().st_size for path in model.glob("*.safetensors")]
    assert sum(weights) > 1.8e9
    assert max(weights) < 1.1e9

    tracking = TrackingConfig(uri=server.uri)
    begun = server.log.read_text().count("/mlflow-artifacts/mpu/create/")
    uri = register(MlflowRun.create(tracking, "large", "a test"), str(model), {})
    version = find_version(uri, tracking)
    # Files past 500 MiB go in parts, with addresses that the server signs.
    assert server.log.read_text().count("/mlflow-artifacts/mpu/create/") - begun == parts * sum(
        size >= 500 * 2**20 for size in weights
    )
    stored = storage.join("s3://crosslmm-example/mlflow", f"1/models/{version.model_id}/artifacts/artifacts/model")
    assert sorted(storage.files_in(stored)) == sorted(path.name for path in model.iterdir())

    (tmp_path / "a.mp4").write_bytes(encode_clip(np.repeat(random_frames(1, 5), 8, axis=0)))
    loaded = mlflow.pyfunc.load_model(version.uri, model_config={"roots": [str(tmp_path)]})
    (row,) = loaded.predict(
        pd.DataFrame({"video": ["a.mp4"], "question": ["What?"]}), params={"max_new_tokens": 2}
    ).itertuples()
    assert isinstance(row.answer, str)
    assert row.error is None
