"""Files: local paths and `s3://` URIs alike, through fsspec and s3fs."""

from crosslmm.storage.create import create_bytes
from crosslmm.storage.files import (
    MAX_JSON_BYTES,
    arrow_filesystem,
    download_file,
    exists,
    local_path,
    open_read,
    parse_json,
    read_at_most,
    read_bytes,
    read_json,
    remove,
    size_and_version,
    upload_file,
    version,
    version_of,
    will_read,
    write_bytes,
    write_chunks,
)
from crosslmm.storage.folders import (
    download,
    files_in,
    folders_in,
    is_empty,
    is_folder,
    names_in,
    remove_folder,
    upload,
)
from crosslmm.storage.names import LeadsOut, absolute, follow, join, parent, resolve, safe_join, within
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
    "MAX_JSON_BYTES", "NO_RETRIES", "BadLocation", "LeadsOut", "Refused", "RetryPolicy", "Unavailable", "absolute",
    "arrow_filesystem", "create_bytes", "download", "download_file", "exists", "files_in", "folders_in", "follow",
    "is_empty", "is_folder", "join", "keep_policy", "local_path", "names_in", "open_read", "parent", "parse_json",
    "read_at_most", "read_bytes", "read_json", "remove", "remove_folder", "resolve", "retrying", "safe_join",
    "scheme_of", "size_and_version", "upload", "upload_file", "version", "version_of", "will_read", "with_retries",
    "within", "write_bytes", "write_chunks",
]  # fmt: skip
