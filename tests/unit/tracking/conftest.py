import pytest

from crosslmm.tracking.client import MLFLOW_ENVIRONMENT


@pytest.fixture(autouse=True)
def few_retries(monkeypatch):
    """Set what `quiet_mlflow` sets in a job, or MLflow's client retries for minutes."""
    for name, value in MLFLOW_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
