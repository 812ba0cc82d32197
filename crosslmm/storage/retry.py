"""A store is asked, again where it cannot serve just now; its errors are told apart from those of one object.

Credentials and the endpoint come from the environment or the machine's role (`AWS_*`), never from configuration. What
is asked of a store that cannot serve just now is asked again, for some minutes; what asking again cannot mend is said
at once, in one line.
"""

import errno
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import sleep as pause
from typing import TypeVar

import fsspec

SCHEMES = ("file", "s3")

WAITS_S = (1, 2, 4, 8, 15)
"""Pauses before an unavailable store is asked again, the last one again and again [s]."""
PATIENCE_S = 180.0
"""From the first failure until a store is given up [s]; 0 asks once."""
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5, 30
"""A store that has not let us in, or sent no further byte of an answer, for so long is unavailable [s]."""

# What a file system or a store says when it cannot serve anybody just now.
OUT_OF_ORDER = {
    errno.EBUSY, errno.EREMOTEIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH,
}  # fmt: skip
FULL = {errno.ENOSPC, errno.EDQUOT}

Made = TypeVar("Made")


class BadLocation(ValueError):
    """A path or URI that this project does not read."""


class Unavailable(OSError):
    """The store itself cannot be used: out of reach or out of order. No fault of one object."""


class Refused(Unavailable):
    """Nor will it be usable by waiting: there is no such bucket, or it takes none of our credentials."""


def patiently(request: Callable[[], Made], despite: tuple[type[Exception], ...] = (Unavailable,)) -> Made:
    """What `request` returns; while it raises one of `despite`, it is made again, for `PATIENCE_S` after the
    first failure.

    Raises:
        Refused: at once.
        Exception: what `request` raised last, or anything else that it raised.
    """
    give_up = None
    for wait in itertools.chain(WAITS_S, itertools.repeat(WAITS_S[-1])):
        try:
            return request()
        except despite as error:
            now = time.monotonic()
            give_up = now + PATIENCE_S if give_up is None else give_up
            if isinstance(error, Refused) or now + wait > give_up:
                raise
        pause(wait)
    raise AssertionError("pauses have no end")


def scheme_of(uri: str) -> str:
    """`file` or `s3`.

    Raises:
        BadLocation: any other scheme, a chain of them, or credentials in it.
    """
    scheme, rest = uri.split("://", 1) if "://" in uri else ("file", "")
    if scheme not in SCHEMES or "::" in uri:
        raise BadLocation(f"{uri!r}: only local paths, file:// and s3:// are read")
    if "@" in rest.split("/", 1)[0]:
        raise BadLocation("s3://...: holds credentials, which belong in the environment (AWS_*) or the machine's role")
    return scheme


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system that a path or URI belongs to, and its path there."""
    if scheme_of(uri) == "file":
        return fsspec.url_to_fs(uri)
    # The client's own few tries are for a request among thousands that is lost; outages are for `patiently`.
    timeouts = {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": READ_TIMEOUT_S}
    retries = {"mode": "standard", "total_max_attempts": 3}
    fs, path = fsspec.url_to_fs(uri, config_kwargs={**timeouts, "retries": retries})
    fs.retries = 1
    return fs, path


def ask(uri: str, call: Callable[[fsspec.AbstractFileSystem, str], Made]) -> Made:
    """What a call on the file system and path of a URI returns, patiently."""

    def once() -> Made:
        with told_apart(uri):
            fs, path = filesystem(uri)
            # Another process may have written since this one last looked, and s3fs would believe its listing.
            fs.invalidate_cache()
            return call(fs, path)

    return patiently(once)


PRECONDITION_FAILED, OUT_OF_SPACE = 412, 507
ASK_AGAIN = {408, 429, 500, 502, 503, 504}


@contextmanager
def told_apart(uri: str) -> Iterator[None]:
    """Errors of the store become `Unavailable`; those of one object pass, in words that name it."""
    try:
        yield
    except Exception as error:
        remote = scheme_of(uri) == "s3"
        kind, said = type(error).__name__, " ".join(str(error).split())
        if remote and isinstance(error, FileNotFoundError):
            _require_bucket(uri)
            raise FileNotFoundError(f"{uri}: no such object") from error
        if remote and (isinstance(error, PermissionError) or kind == "NoCredentialsError"):
            raise PermissionError(f"{uri}: permission denied; check AWS_* or the machine's role") from error
        if remote and kind == "ParamValidationError":
            raise BadLocation(f"{uri}: {said[:100]}") from error
        if isinstance(error, OSError) and (error.errno in FULL or status_of(error) == OUT_OF_SPACE):
            raise OSError(error.errno, f"no space left for {uri}; free some, or write elsewhere") from error
        if _is_of_the_store(error):
            raise Unavailable(f"{uri}: {kind}: {said}") from error
        raise


def _is_of_the_store(error: Exception) -> bool:
    """Whether it says that nobody can be served; the S3 client has classes of its own for a store out of reach."""
    if status := status_of(error):
        return status in ASK_AGAIN
    client = type(error).__module__.split(".")[0] in ("botocore", "aiobotocore", "aiohttp", "http")
    out_of_order = isinstance(error, OSError) and error.errno in OUT_OF_ORDER
    return client or out_of_order or isinstance(error, ConnectionError | TimeoutError)


def status_of(error: BaseException | None) -> int:
    """The store's HTTP status, 0 of an error that is no answer of a store."""
    while error is not None:
        if response := getattr(error, "response", None):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        error = error.__cause__
    return 0


def _require_bucket(uri: str) -> None:
    """A store says the same of a missing object and of an object in a missing bucket.

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
        raise Unavailable(f"{uri}: {type(error).__name__}: {error}") from error
