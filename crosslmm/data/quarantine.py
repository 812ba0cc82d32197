"""What could not be read, and why; who takes its place; and when there is too much of it."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from crosslmm.data.video.decode_pool import Unreadable


@dataclass(frozen=True)
class QuarantineEntry:
    """One row whose video could not be read: a line of the ledger. All text is printable ASCII."""

    manifest: str
    """Path or URI of the row's manifest."""
    line: int
    """Line of that manifest, from 1 (of the one that it was prepared from)."""
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
    def from_row(cls, row: dict[str, Any], uri: str, video: Unreadable) -> "QuarantineEntry":
        """The entry of a manifest's row, one of whose videos cannot be read."""
        manifest, name, place = (to_printable(text) for text in (row["manifest"], row["id"], uri))
        return cls(
            manifest, row["line"], name, place, video.version, video.stage, to_printable(video.reason), video.attempts
        )

    def to_dict(self) -> dict[str, Any]:
        """As it is written to the ledger."""
        return asdict(self)


class TooManyUnreadable(Exception):
    """More of a source cannot be read than the configuration allows; the message counts the reasons."""


class ErrorBudget:
    """Counts the samples of each source that were due and those that could not be read, and stops the run when these
    are too many of one source.

    Args:
        max_share: of a source's samples that were due.
        allowed: so many bad samples of a source are no reason to stop, whatever their share.
    """

    def __init__(self, max_share: float, allowed: int) -> None:
        self.max_share, self.allowed = max_share, allowed
        self.due: Counter[str] = Counter()
        self.reasons: dict[str, Counter[str]] = defaultdict(Counter)

    def record(self, due: Iterable[str], entries: list[dict[str, Any]]) -> None:
        """Take note of some samples.

        Args:
            due: the manifest of each sample.
            entries: what could not be read in their places.

        Raises:
            TooManyUnreadable: beyond both limits.
        """
        self.due.update(to_printable(manifest) for manifest in due)
        for entry in entries:
            self.reasons[entry["manifest"]][f"{entry['stage']}: {entry['reason']}"] += 1
        for source, reasons in self.reasons.items():
            bad = reasons.total()
            if bad > self.allowed and bad > self.max_share * self.due[source]:
                most = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5))
                more = f"; and {len(reasons) - 5} other reasons" if len(reasons) > 5 else ""
                raise TooManyUnreadable(
                    f"{source}: {bad} videos could not be read for {self.due[source]} samples, which is more than "
                    f"data.max_bad_share {self.max_share:g} and data.bad_allowed {self.allowed}: {most}{more}"
                )


def to_printable(text: str) -> str:
    """Text as the ledger has it. Names are foreign text like the files: no line breaks, no escape sequences."""
    return text if text.isascii() and text.isprintable() else ascii(text)[1:-1]
