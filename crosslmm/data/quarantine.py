"""What could not be read, and why; who takes its place; and when there is too much of it."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from crosslmm.data.decode import Unreadable


@dataclass(frozen=True)
class Entry:
    """One row whose video could not be read: a line of the ledger. All text is printable ASCII."""

    line: int
    """Line of the manifest, from 1."""
    id: str
    uri: str
    version: str | None
    """The object's ETag when it was tried, where it has one: another one is worth another try."""
    stage: str
    """read, check, decode, deadline or crash."""
    reason: str
    attempts: int
    """How often it was tried."""

    @classmethod
    def of(cls, row: dict[str, Any], uri: str, video: Unreadable) -> "Entry":
        """The entry of a manifest's row, one of whose videos cannot be read."""
        names = _plain(row["id"]), _plain(uri)
        return cls(row["line"], *names, video.version, video.stage, _plain(video.reason), video.attempts)

    def to_dict(self) -> dict[str, Any]:
        """As it is written to the ledger."""
        return asdict(self)


class TooManyBad(Exception):
    """More of a source cannot be read than the configuration allows; the message counts the reasons."""


class Tally:
    """Counts samples that were due and those that could not be read, and stops the run when these are too many.

    Args:
        source: what is counted, for the message.
        max_share: of the samples that were due.
        allowed: so many bad samples are no reason to stop, whatever their share.
    """

    def __init__(self, source: str, max_share: float, allowed: int) -> None:
        self.source, self.max_share, self.allowed = source, max_share, allowed
        self.due = 0
        self.reasons: Counter[str] = Counter()

    def count(self, due: int, entries: list[dict[str, Any]]) -> None:
        """Take note of some samples.

        Raises:
            TooManyBad: beyond both limits.
        """
        self.due += due
        self.reasons.update(f"{entry['stage']}: {entry['reason']}" for entry in entries)
        bad = self.reasons.total()
        if bad > self.allowed and bad > self.max_share * self.due:
            most = "; ".join(f"{count} x {reason}" for reason, count in self.reasons.most_common(5))
            more = f"; and {len(self.reasons) - 5} other reasons" if len(self.reasons) > 5 else ""
            raise TooManyBad(
                f"{self.source}: {bad} videos could not be read for {self.due} samples, which is more than "
                f"data.max_bad_share {self.max_share:g} and data.bad_allowed {self.allowed}: {most}{more}"
            )


def _plain(text: str) -> str:
    # Names are foreign text like the files: no line breaks, no escape sequences.
    return text if text.isascii() and text.isprintable() else ascii(text)[1:-1]
