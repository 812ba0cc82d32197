"""Quarantine: the list of unreadable rows, with reasons, and the limit beyond which a job stops."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter

from crosslmm import storage
from crosslmm.config import BadConfig
from crosslmm.data.video.decode import VideoFailure
from crosslmm.run_folder import QUARANTINE_FILE
from crosslmm.text import first_error

MAX_QUARANTINE_BYTES = 2**30
"""Largest quarantine.jsonl that is read in one piece [bytes]."""


@dataclass(frozen=True)
class QuarantineEntry:
    """A row with an unreadable video, or one that the model cannot take: one line of quarantine.jsonl. All text is
    printable ASCII."""

    manifest: str
    """Path or URI of the row's manifest."""
    line: int
    """Line of that manifest, from 1; for a prepared manifest, the line of the manifest that it was made from."""
    id: str
    """Id of the row."""
    uri: str
    """URI of the unreadable video; empty if no batch can be made of the row."""
    version: str | None
    """ETag of the object when it was tried, if it has one; a later version is tried again."""
    stage: str
    """Where it failed, see `Stage`."""
    reason: str
    """Why it failed."""
    attempts: int
    """How often it was tried."""

    @classmethod
    def from_row(cls, row: dict[str, Any], uri: str, video: VideoFailure) -> "QuarantineEntry":
        """Make the entry of a manifest's row whose video `uri` is unreadable."""
        manifest, name, video_uri = (escape_to_ascii(text) for text in (row["manifest"], row["id"], uri))
        reason = escape_to_ascii(video.reason)
        return cls(manifest, row["line"], name, video_uri, video.version, video.stage, reason, video.attempts)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of the entry."""
        return asdict(self)


_ENTRY = TypeAdapter(QuarantineEntry)


def parse_entry(line: str | bytes) -> dict[str, Any]:
    """Parse a line of quarantine.jsonl; it may have more keys than `QuarantineEntry`.

    Raises:
        ValueError: it is not one.
    """
    _ENTRY.validate_json(line, strict=True)
    return storage.parse_json(line)


def read_quarantine(folder: str) -> list[dict[str, Any]]:
    """Read the quarantine.jsonl of a run or of features, see `parse_entry`; empty if there is none.

    Raises:
        BadConfig: it is too large or a link that leads out of the folder, or a line does not belong there.
    """
    entries: list[dict[str, Any]] = []
    lines: list[bytes] = []
    try:
        uri = storage.safe_join(folder, QUARANTINE_FILE)
        lines = storage.read_at_most(uri, MAX_QUARANTINE_BYTES).splitlines() if storage.exists(uri) else []
        entries.extend(map(parse_entry, lines))
    except storage.Unavailable:
        raise
    except (OSError, ValueError) as error:
        where = f"line {len(entries) + 1} of {QUARANTINE_FILE}" if lines else QUARANTINE_FILE
        raise BadConfig(f"{folder}: {where} cannot be used: {first_error(error)}; remove it") from None
    return entries


class TooManyUnreadable(Exception):
    """More samples of a source are unreadable than the configuration allows; the message counts the reasons."""


class ErrorBudget:
    """Counts the samples of each source and the unreadable ones among them; raises when a source exceeds both limits.

    Args:
        max_share: largest share of unreadable samples of a source (`data.max_bad_share`).
        allowed: number of unreadable samples of a source that is always tolerated (`data.bad_allowed`).
    """

    def __init__(self, max_share: float, allowed: int) -> None:
        self.max_share, self.allowed = max_share, allowed
        self.samples: Counter[str] = Counter()
        """Number of samples of each source."""
        self.reasons: dict[str, Counter[str]] = defaultdict(Counter)
        """Number of unreadable samples of each source, by reason."""

    def record(self, sources: Iterable[str], entries: list[dict[str, Any]]) -> None:
        """Count some samples.

        Args:
            sources: manifest of each sample.
            entries: quarantine entries of those that were unreadable.

        Raises:
            TooManyUnreadable: a source exceeds both limits.
        """
        self.samples.update(escape_to_ascii(manifest) for manifest in sources)
        for entry in entries:
            self.reasons[entry["manifest"]][f"{entry['stage']}: {entry['reason']}"] += 1
        for source, reasons in self.reasons.items():
            unreadable = reasons.total()
            if unreadable > self.allowed and unreadable > self.max_share * self.samples[source]:
                most = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5))
                more = f"; and {len(reasons) - 5} other reasons" if len(reasons) > 5 else ""
                raise TooManyUnreadable(
                    f"{source}: {unreadable} videos could not be read for {self.samples[source]} samples, which is "
                    f"more than data.max_bad_share {self.max_share:g} and data.bad_allowed {self.allowed}: {most}{more}"
                )


def escape_to_ascii(text: str) -> str:
    """Return text as printable ASCII: names from manifests may contain line breaks or escape sequences."""
    return text if text.isascii() and text.isprintable() else ascii(text)[1:-1]
