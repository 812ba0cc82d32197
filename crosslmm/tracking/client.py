"""Calls to an MLflow server: with retries, and with errors in one line that holds no password."""

import contextlib
import fcntl
import logging
import os
import time
import warnings
from pathlib import Path
from typing import Any

from mlflow.exceptions import InvalidUrlException, MlflowException
from mlflow.tracking import MlflowClient

from crosslmm.config import BadConfig, TrackingConfig, tracking_uri
from crosslmm.progress import SafeFormatter
from crosslmm.text import in_brief, redacted

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
    "Invalid Host header": "use a host name that its MLFLOW_SERVER_ALLOWED_HOSTS lists",
}
"""Text in the error of a server that refuses -> remedy."""

RETRY_S = 2.0
"""Pause between two calls to a server that does not answer [s]."""
RETRY_DEADLINE_S = 600.0
"""How long a call is repeated before it fails [s]."""


def quiet_mlflow() -> None:
    """Set this process up for MLflow; for entry points and the processes of a sweep's trials.

    MLflow's own log lines and warnings would appear between ours: it asks for type hints or examples to infer a
    signature from, although we pass one. Its seven retries of two minutes each would hide for a quarter of an hour that
    a server is down, and this package retries itself; the one retry that stays is for stale connections. Variables that
    the environment already sets keep their values.
    """
    mlflow_log = logging.getLogger("mlflow")
    mlflow_log.setLevel(logging.WARNING)
    for handler in mlflow_log.handlers:
        handler.setFormatter(SafeFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    # While the server is down, MLflow's monitor would report only that machine metrics were lost.
    logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # logs a line for each retry
    warnings.filterwarnings("ignore", "(?s).*(type hint|input example).*", UserWarning, "mlflow")
    for name, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def open_client(uri: str) -> MlflowClient:
    """Return a client of an MLflow server, or of a sqlite file, whose tables are made if it is new.

    One process at a time makes them. MLflow's own lock is a file in TMPDIR, named after the URI as it is spelled: two
    first runs at once that differ in TMPDIR or spelling would not see each other's lock, and one would end with
    "duplicate column name".
    """
    with contextlib.ExitStack() as stack:
        if uri.startswith("sqlite:///"):
            with contextlib.suppress(OSError):  # the file cannot be made either, and MLflow says so
                lock = stack.enter_context(Path(uri.removeprefix("sqlite:///").partition("?")[0] + ".lock").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
        client = MlflowClient(uri)
        if uri.startswith("sqlite:///"):
            client.search_experiments(max_results=1)
    return client


def require_answer(tracking: TrackingConfig) -> None:
    """Raise BadConfig unless the MLflow server answers and accepts the credentials."""
    uri = tracking_uri(tracking)
    try:
        open_client(uri).search_experiments(max_results=1)
    except Exception as error:
        raise BadConfig(f"tracking.uri: {describe_failure(redacted(uri), error)}") from error


def refuses(error: BaseException) -> bool:
    """Return whether a retry cannot help: the server refuses, or the URI cannot be that of a server."""
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
        return isinstance(error, InvalidUrlException) or (400 <= status < 500 and status not in (408, 429))
    return isinstance(error, BadConfig)


def refuses_item(error: MlflowException) -> bool:
    """Return whether the server refuses what a call contains, such as a name with a character that it does not take."""
    return bool(error.error_code == "INVALID_PARAMETER_VALUE")


def describe_failure(uri: str, error: Exception | None) -> str:
    """Return a failed call in one line: "http://... does not answer". `error` is None for a call still waiting."""
    message = in_brief(error)
    if isinstance(error, BadConfig):
        return message
    if error and refuses(error):
        return "; ".join(
            [f"{uri} refuses: {message}", *(remedy for text, remedy in REMEDIES.items() if text in message)]
        )
    silent = error is None or (isinstance(error, MlflowException) and "API request to" in message)
    return f"{uri} does not answer" + ("" if silent else f": {type(error).__name__}: {message}")


class RetryingClient:
    """An MLflow client that retries calls while its server does not answer; all calls in use can be repeated.

    Args:
        uri: the MLflow server.
        retry_s: pause between two attempts [s].
    """

    def __init__(self, uri: str, retry_s: float = RETRY_S) -> None:
        self._uri, self._client, self._retry_s = redacted(uri), open_client(uri), retry_s

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)

        def with_retries(*args: Any, **options: Any) -> Any:
            deadline, reported = time.monotonic() + RETRY_DEADLINE_S, False
            while True:
                try:
                    return call(*args, **options)
                except Exception as error:
                    if refuses(error) or time.monotonic() > deadline:
                        raise
                    if not reported:
                        failure = describe_failure(self._uri, error)
                        log.warning("MLflow: %s; retrying for %.0f minutes", failure, RETRY_DEADLINE_S / 60)
                    reported = True
                time.sleep(self._retry_s)

        return with_retries
