"""Files: local paths and `s3://` URIs alike, through fsspec and s3fs."""

from crosslmm.storage.filesystem import (
    absolute,
    arrow_filesystem,
    download,
    download_file,
    exists,
    folders_in,
    is_empty,
    is_folder,
    join,
    local_path,
    names_in,
    open_read,
    parent,
    read_bytes,
    real,
    remove,
    remove_folder,
    stamp_of,
    upload,
    upload_file,
    version,
    version_of,
    will_read,
    within,
    write_bytes,
    write_chunks,
)
from crosslmm.storage.retry import (
    NO_RETRIES,
    BadLocation,
    Refused,
    RetryPolicy,
    Unavailable,
    keep_policy,
    retrying,
    scheme_of,
    with_retries,
)

__all__ = [
    "NO_RETRIES", "BadLocation", "Refused", "RetryPolicy", "Unavailable", "absolute", "arrow_filesystem", "download",
    "download_file", "exists", "folders_in", "is_empty", "is_folder", "join", "keep_policy", "local_path", "names_in",
    "open_read", "parent", "read_bytes", "real", "remove", "remove_folder", "retrying", "scheme_of", "stamp_of",
    "upload", "upload_file", "version", "version_of", "will_read", "with_retries", "within", "write_bytes",
    "write_chunks",
]  # fmt: skip
