"""Write an object that does not exist yet: of several writers at once, one succeeds."""

import os
import random
import secrets
import time
from contextlib import suppress
from pathlib import Path

import fsspec

from crosslmm.storage.files import write_file
from crosslmm.storage.retry import call_with_retries, http_status, scheme_of

CONFLICT, PRECONDITION_FAILED, NOT_IMPLEMENTED = 409, 412, 501
CONFLICTS = 5
"""Conflicts after each of which the write is tried again: of two writes at the same moment, S3 may refuse both."""


def create_bytes(uri: str, data: bytes) -> bool:
    """Write an object that does not exist yet; return whether it was written.

    True also where a store ignores If-None-Match and has written over another object. False also where an earlier
    attempt of this call wrote it, and its response was lost.
    """
    if scheme_of(uri) == "file":
        return call_with_retries(uri, lambda _, path: _create_file(path, data))
    for attempt in range(CONFLICTS + 1):
        try:
            _put(uri, data, IfNoneMatch="*")
            return True
        except OSError as error:
            if http_status(error) == PRECONDITION_FAILED:
                return False
            if http_status(error) == NOT_IMPLEMENTED:
                break
            if http_status(error) != CONFLICT or attempt == CONFLICTS:
                raise
            time.sleep(random.uniform(0.1, 0.5))
    _put(uri, data)
    return True


def _put(uri: str, data: bytes, **conditions: str) -> None:
    def attempt(fs: fsspec.AbstractFileSystem, path: str) -> None:
        bucket, key, _ = fs.split_path(path)
        fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **conditions)

    call_with_retries(uri, attempt)


def _create_file(path: str, data: bytes) -> bool:
    """Write a local file unless there is one; it is never seen half written, except where there are no hard links."""
    temporary = f"{path}.{secrets.token_hex(4)}.part"
    write_file(temporary, [data])
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:
        with suppress(FileExistsError), Path(path).open("xb") as file:
            file.write(data)
            return True
        return False
    finally:
        Path(temporary).unlink(missing_ok=True)
    return True
