"""Counts of checked rows: of one chunk, or of a whole manifest."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from crosslmm import storage
from crosslmm.data.ingest.preview import first_rows
from crosslmm.data.manifest_shards import Part
from crosslmm.data.quarantine import escape_to_ascii
from crosslmm.data.rows.problems import MAX_EXAMPLES, MAX_KINDS, OTHER_KINDS, add_reasons, count_reason


@dataclass
class Summary:
    """Counts of the rows of one chunk or several, and the files written for one. Stored as JSON for each chunk."""

    plan: str = ""
    """Key of the plan that the chunk belongs to."""
    rows: int = 0
    """Number of good rows."""
    rejected: int = 0
    """Number of malformed rows."""
    quarantined: int = 0
    """Number of rows with an unreadable video."""
    videos: int = 0
    """Number of probed videos; one that appears in several chunks counts in each."""
    seconds: float = 0.0
    """Total duration of these videos [s]."""
    named: list[list[Any]] = field(default_factory=list)
    """[line, reason] of the first malformed rows."""
    reasons: dict[str, list[Any]] = field(default_factory=dict)
    """Malformed rows by kind of reason: [number of rows, first lines, first reason]."""
    unreadable: dict[str, int] = field(default_factory=dict)
    """Number of quarantined rows by "stage: reason"."""
    codecs: dict[str, int] = field(default_factory=dict)
    """Number of videos by codec."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Number of videos by "WIDTHxHEIGHT" [px]."""
    forms: dict[str, int] = field(default_factory=dict)
    """Number of rows by form."""
    unused: dict[str, int] = field(default_factory=dict)
    """Number of rows by key that is not followed."""
    previews: list[dict[str, Any]] = field(default_factory=list)
    """The first rows, see `preview`; only where nothing is written."""
    parts: list[dict[str, Any]] = field(default_factory=list)
    """Descriptions of the written parts, as `manifest_shards.write_part` returns them."""
    files: dict[str, str] = field(default_factory=dict)
    """Names of the other files of the chunk: "index", "rejected", "probes", "waiting"; only those that exist."""

    def reject(self, lines: Iterable[tuple[int, str]]) -> None:
        """Count malformed rows, (line, reason) each."""
        for line, reason in lines:
            self.rejected += 1
            self.named = sorted([*self.named, [line, reason]])[:MAX_EXAMPLES]
            count_reason(self.reasons, line, reason)

    def add(self, other: "Summary") -> None:
        """Add the counts of another summary, but not its parts and files."""
        self.rows += other.rows
        self.rejected += other.rejected
        self.quarantined += other.quarantined
        self.videos += other.videos
        self.seconds += other.seconds
        self.named = sorted([*self.named, *other.named])[:MAX_EXAMPLES]
        add_reasons(self.reasons, other.reasons)
        self.previews = first_rows([*self.previews, *other.previews])
        for name in ("unreadable", "codecs", "sizes", "forms", "unused"):
            self.count(name, getattr(other, name))

    def count(self, name: str, counts: dict[str, int]) -> None:
        """Add to the counter `name`, which keeps the most frequent kinds and sums up the others."""
        counter = Counter(getattr(self, name)) + Counter(counts)
        most = dict(counter.most_common(MAX_KINDS))
        rest = counter.total() - sum(most.values())
        setattr(self, name, most | ({OTHER_KINDS: most.get(OTHER_KINDS, 0) + rest} if rest else {}))

    @property
    def is_empty(self) -> bool:
        """Whether no row was counted, good or bad."""
        return not self.rows + self.rejected + self.quarantined

    def describe_malformed(self, manifest: str) -> str:
        """Return the number of malformed rows and the first of them, in one line."""
        line, reason = self.named[0]
        total = self.rows + self.rejected + self.quarantined
        return f"{escape_to_ascii(manifest)}: line {line}: {reason}; {self.rejected:,} of {total:,} rows are malformed"


_SUMMARY, _PARTS = TypeAdapter(Summary), TypeAdapter(list[Part])
_REASONS = TypeAdapter(dict[str, tuple[int, list[int], str]])


def parse_summary(data: bytes, target: str) -> Summary:
    """Parse the summary of a chunk of the conversion to the folder `target`.

    Raises:
        ValueError: it is not a summary, or names files outside of the folder.
    """
    summary = _SUMMARY.validate_python(storage.parse_json(data))
    _REASONS.validate_python(summary.reasons)
    for name in [*(part.name for part in _PARTS.validate_python(summary.parts)), *summary.files.values()]:
        storage.join(target, name)
    if "index" not in summary.files or bool(summary.rejected) != ("rejected" in summary.files):
        raise ValueError("it does not name all files of its chunk")
    return summary
