"""Retry policy of storage: transient errors of a store are retried; store-wide failures differ from per-object ones.

Credentials and endpoint come from the environment or the machine's role (`AWS_*`), never from configuration. Requests
to an unavailable store are repeated for minutes; errors that a retry cannot fix are raised at once, in one line.
"""

import errno
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import fsspec

from crosslmm.text import in_brief

SCHEMES = ("file", "s3")


@dataclass(frozen=True)
class RetryPolicy:
    """How long an unavailable store is retried."""

    deadline_s: float = 180.0
    """Time from the first failure after which no further attempt starts; 0 makes one attempt [s]."""
    waits_s: tuple[float, ...] = (1, 2, 4, 8, 15)
    """Pauses before the attempts that follow; the last one repeats [s]."""
    connect_timeout_s: float = 5
    """How long a store may take to accept a connection [s]."""
    read_timeout_s: float = 30
    """How long a store may take to send the next byte of a response [s]."""
    write_timeout_s: float = 120
    """How long a store may take to receive one part of an object; a client does not notice if it stops reading [s]."""
    sleep: Callable[[float], None] = time.sleep
    """Waits between two attempts; tests replace it."""


DEFAULT_POLICY = RetryPolicy()
NO_RETRIES = RetryPolicy(deadline_s=0)
"""One attempt, for callers that retry themselves or report a failure at once."""

# Scoped, and not an argument: a caller that wants another policy (the doctor, the processes that decode) is many calls
# away from the request, below functions of other packages that have no business with retries.
_policy: ContextVar[RetryPolicy] = ContextVar("retry_policy", default=DEFAULT_POLICY)

# Codes that mean that a file system or store cannot serve anybody at the moment.
STORE_ERRNOS = {
    errno.EBUSY, errno.EREMOTEIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH,
}  # fmt: skip
NO_SPACE_ERRNOS = {errno.ENOSPC, errno.EDQUOT}
RANGE_NOT_SATISFIABLE, OUT_OF_SPACE = 416, 507
RETRYABLE_STATUSES = {408, 429, 500, 502, 503, 504}
CLIENT_PACKAGES = ("botocore", "aiobotocore", "aiohttp", "http")
"""Packages of the S3 client; their own exceptions mean that the store is unreachable."""

T = TypeVar("T")


class BadLocation(ValueError):
    """A path or URI that this project does not read."""


class Unavailable(OSError):
    """The store itself is unreachable or failing; not a problem with one object."""


class Refused(Unavailable):
    """The store refuses for a reason that waiting does not fix: no such bucket, or no valid credentials."""


def current_policy() -> RetryPolicy:
    """Return the retry policy of this thread."""
    return _policy.get()


@contextmanager
def retrying(policy: RetryPolicy) -> Iterator[None]:
    """Context manager: every request to a store in the block, made in this thread, follows `policy`."""
    token = _policy.set(policy)
    try:
        yield
    finally:
        _policy.reset(token)


def keep_policy(call: Callable[..., T]) -> Callable[..., T]:
    """Return `call` with the current policy, for use in another thread, which would start with the default."""
    policy = current_policy()

    def with_policy(*args: Any, **options: Any) -> T:
        with retrying(policy):
            return call(*args, **options)

    return with_policy


def with_retries(request: Callable[[], T], retry_on: tuple[type[Exception], ...] = (Unavailable,)) -> T:
    """Return what `request` returns. Repeat it while it raises one of `retry_on`, until the policy's deadline.

    Raises:
        Refused: at once.
        Exception: the last error in `retry_on`, or any other error at once.
    """
    policy, deadline = current_policy(), None
    for wait_s in itertools.chain(policy.waits_s, itertools.repeat(policy.waits_s[-1])):
        try:
            return request()
        except retry_on as error:
            now = time.monotonic()
            deadline = now + policy.deadline_s if deadline is None else deadline
            if isinstance(error, Refused) or now + wait_s > deadline:
                raise
        policy.sleep(wait_s)
    raise AssertionError("unreachable: the waits do not end")


def scheme_of(uri: str) -> str:
    """Return `file` or `s3`.

    Raises:
        BadLocation: another scheme, chained schemes, or credentials in the URI.
    """
    scheme, rest = uri.split("://", 1) if "://" in uri else ("file", "")
    if scheme not in SCHEMES or "::" in uri:
        raise BadLocation(f"{uri!r}: only local paths, file:// and s3:// are read")
    if "@" in rest.split("/", 1)[0]:
        raise BadLocation("s3://...: holds credentials, which belong in the environment (AWS_*) or the machine's role")
    return scheme


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a path or URI, and the path in it."""
    if scheme_of(uri) == "file":
        return fsspec.url_to_fs(uri)
    # The client's own few attempts are for one lost request among thousands; `with_retries` is for outages.
    policy = current_policy()
    timeouts = {"connect_timeout": policy.connect_timeout_s, "read_timeout": policy.read_timeout_s}
    retries = {"mode": "standard", "total_max_attempts": 3}
    fs, path = fsspec.url_to_fs(uri, config_kwargs={**timeouts, "retries": retries})
    fs.retries = 1
    # Some stores ignore If-Match, and would hand out pieces of two objects as one. So compare each response's ETag.
    fs.local_expiry_check = True
    return fs, path


def call_with_retries(uri: str, call: Callable[[fsspec.AbstractFileSystem, str], T]) -> T:
    """Return what `call` returns for the file system and path of a URI; retry while the store is unavailable."""

    def attempt() -> T:
        with classified_errors(uri):
            fs, path = filesystem(uri)
            # s3fs would answer from its cache of listings, which misses what other processes wrote since.
            fs.invalidate_cache()
            return call(fs, path)

    return with_retries(attempt)


@contextmanager
def classified_errors(uri: str) -> Iterator[None]:
    """Context manager: turns failures of the store into `Unavailable`; errors about one object stay, and name it."""
    try:
        yield
    except Exception as error:
        remote = scheme_of(uri) == "s3"
        kind, message = type(error).__name__, in_brief(error, 1000)
        if remote and isinstance(error, FileNotFoundError):
            _require_bucket(uri)
            raise FileNotFoundError(f"{uri}: no such object") from error
        if remote and (isinstance(error, PermissionError) or kind == "NoCredentialsError"):
            raise PermissionError(f"{uri}: permission denied; check AWS_* or the machine's role") from error
        if remote and (kind == "ParamValidationError" or message.startswith("Invalid endpoint")):
            raise BadLocation(f"{uri}: {message[:100]}") from error
        if isinstance(error, OSError) and (error.errno in NO_SPACE_ERRNOS or http_status(error) == OUT_OF_SPACE):
            raise OSError(error.errno, f"no space left for {uri}; free some, or write elsewhere") from error
        if _is_store_wide(error):
            raise Unavailable(f"{uri}: {kind}: {message}") from error
        raise


def _is_store_wide(error: Exception) -> bool:
    """Return whether an error means that the store can serve nobody."""
    if status := http_status(error):
        return status in RETRYABLE_STATUSES
    from_client = type(error).__module__.split(".")[0] in CLIENT_PACKAGES
    store_is_down = isinstance(error, OSError) and error.errno in STORE_ERRNOS
    return from_client or store_is_down or isinstance(error, ConnectionError | TimeoutError)


def http_status(error: BaseException | None) -> int:
    """Return the HTTP status of a store's response, 0 for an error without one."""
    while error is not None:
        if response := getattr(error, "response", None):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        error = error.__cause__
    return 0


def _require_bucket(uri: str) -> None:
    """Raise an error if the bucket is missing: a store reports a missing object and a missing bucket alike.

    Raises:
        Refused: the bucket is missing.
        Unavailable: the store does not answer.
    """
    fs, path = filesystem(uri)
    bucket = path.split("/", 1)[0]
    try:
        fs.call_s3("head_bucket", Bucket=bucket)
    except FileNotFoundError:
        raise Refused(f"{uri}: there is no bucket {bucket}") from None
    except PermissionError:
        pass  # it may exist and not be listed
    except Exception as error:
        raise Unavailable(f"{uri}: {type(error).__name__}: {in_brief(error)}") from error
