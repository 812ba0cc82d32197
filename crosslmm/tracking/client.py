"""Which MLflow server, and how it is asked: patiently, and without anybody's password in what is said of it."""

import logging
import os
import time
import warnings
from typing import Any

from mlflow.exceptions import InvalidUrlException, MlflowException
from mlflow.tracking import MlflowClient

from crosslmm.config import BadConfig, TrackingConfig, tracking_uri
from crosslmm.text import without_password

log = logging.getLogger(__name__)

MLFLOW_ENVIRONMENT = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
"""MLflow settings that have no argument."""

REMEDIES = {
    "error code 401": "give MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or ~/.mlflow/credentials",
    "Invalid Host header": "call it by a name that its MLFLOW_SERVER_ALLOWED_HOSTS has",
}
"""By what a server says that refuses."""

RETRY_S = 2.0
"""Between two calls to a server that is away [s]."""
PATIENCE_S = 600.0
"""How long a sweep waits for it in the middle [s]."""


def quiet_mlflow() -> None:
    """Set this process up for MLflow; for entry points and the processes of a sweep's trials.

    MLflow's own log lines and warnings would appear between ours: it asks for type hints or examples to infer a
    signature from, and ours is given. Its seven retries of two minutes each would hide for a quarter of an hour that a
    server is down, and this package retries itself; the one retry that stays is for stale connections. Variables that
    the environment already sets keep their values.
    """
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    # Lost machine metrics are all that MLflow's monitor could report while the server is down.
    logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # logs a line for each retry
    warnings.filterwarnings("ignore", "(?s).*(type hint|input example).*", UserWarning, "mlflow")
    for name, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def require_answer(tracking: TrackingConfig) -> None:
    """Whether there is a server that takes our word.

    Raises:
        BadConfig: it does not answer, or refuses.
    """
    uri = tracking_uri(tracking)
    try:
        MlflowClient(uri).search_experiments(max_results=1)
    except Exception as error:
        raise BadConfig(f"tracking.uri: {why(without_password(uri), error)}") from error


def refuses(error: Exception) -> bool:
    """Whether asking again would not help: there is an answer and it is no, or nobody to ask at such a URI."""
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
        return isinstance(error, InvalidUrlException) or (400 <= status < 500 and status not in (408, 429))
    return isinstance(error, BadConfig)


def why(uri: str, error: Exception | None) -> str:
    """One line: "http://... does not answer". None where a call has not come back yet."""
    said = " ".join(str(error).split())[:300]
    if isinstance(error, BadConfig):
        return said
    if error and refuses(error):
        return "; ".join([f"{uri} refuses: {said}", *(do for sign, do in REMEDIES.items() if sign in said)])
    silent = error is None or (isinstance(error, MlflowException) and "API request to" in said)
    return f"{uri} does not answer" + ("" if silent else f": {type(error).__name__}: {said}")


class Patient:
    """An MLflow client that asks again while its server is away. All that we call can be done twice."""

    def __init__(self, uri: str) -> None:
        self._uri, self._client = without_password(uri), MlflowClient(uri)

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)

        def patiently(*args: Any, **options: Any) -> Any:
            deadline, told = time.monotonic() + PATIENCE_S, False
            while True:
                try:
                    return call(*args, **options)
                except Exception as error:
                    if refuses(error) or time.monotonic() > deadline:
                        raise
                    if not told:
                        log.warning("record: %s; asking again for %.0f minutes", why(self._uri, error), PATIENCE_S / 60)
                    told = True
                time.sleep(RETRY_S)

        return patiently
