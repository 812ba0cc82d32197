"""Writes the videos and images that a manifest holds itself to files beside its shards."""

from crosslmm import storage
from crosslmm.data.rows.media import Embedded

MEDIA_FOLDER = "media"
"""Folder in the output of a conversion."""


class MediaWriter:
    """Writes each video once, under a name that only the same bytes have: a task that starts over writes none again.

    Args:
        target: folder of the conversion.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self._written: set[str] = set()

    def __call__(self, media: Embedded) -> str:
        """Write a video or image, unless that was done before; return its path or URI.

        Raises:
            OSError: it cannot be read or written.
        """
        uri = storage.safe_join(self.target, f"{MEDIA_FOLDER}/{media.file_name}")
        if uri not in self._written and not storage.exists(uri):
            storage.write_bytes(uri, media.read())
        self._written.add(uri)
        return storage.join(self.target, f"{MEDIA_FOLDER}/{media.file_name}")
