"""The folder of a benchmark: a local folder or a bucket, in the layout in which the benchmark is published."""

import fnmatch
import functools
import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from crosslmm import storage
from crosslmm.data.row_schema import resolve_video
from crosslmm.data.rows import files
from crosslmm.data.rows.values import BadRow
from crosslmm.data.video.frame_list import BadFrameList, FrameList
from crosslmm.evaluate.questions.question import BadBenchmark, Question
from crosslmm.text import first_error, printable

MAX_ROWS = 200_000
"""Most rows of a benchmark."""
MAX_FILE_BYTES = 64 * 2**20
"""Largest file of subtitles [bytes]."""
IMAGES = (".jpg", ".jpeg", ".png")


class Folder:
    """Reads the files of a benchmark. What its tables name must lie in the folder, or in one of the roots.

    Args:
        uri: path or s3:// URI.
        roots: further folders that links may lead to.

    Raises:
        BadBenchmark: there is no such folder.
    """

    def __init__(self, uri: str, roots: Sequence[str] = ()) -> None:
        self.uri = storage.absolute(uri).rstrip("/")
        self.roots = [self.uri, *map(storage.absolute, roots)]
        self._digests: dict[str, str] = {}
        if not storage.is_folder(self.uri):
            raise BadBenchmark(f"--data {uri}: there is no such folder")

    @functools.cached_property
    def names(self) -> dict[str, None]:
        """Names of all files below the folder, sorted."""
        return dict.fromkeys(storage.names_in(self.uri, self.roots))

    @property
    def digest(self) -> str:
        """SHA-256 [hex] of the names and contents of all tables and subtitles that were read."""
        return hashlib.sha256(repr(sorted(self._digests.items())).encode()).hexdigest()

    def rows(self, *patterns: str) -> list[dict[str, Any]]:
        """Return the rows of the files that match a pattern, in the order of their names.

        Args:
            patterns: relative to the folder, such as `Subset/test-*.parquet`; the first with a match counts.

        Raises:
            BadBenchmark: no file matches, or one cannot be read.
        """
        for pattern in patterns:
            if matching := fnmatch.filter(self.names, pattern):
                rows = [row for name in matching for row in self._table(name)]
                if len(rows) > MAX_ROWS:
                    raise BadBenchmark(f"{self.uri}: {pattern} has more than {MAX_ROWS} rows")
                if rows:
                    return rows
                raise BadBenchmark(f"{self.uri}: {pattern} has no rows")
        raise BadBenchmark(f"{self.uri}: there is no {' and no '.join(patterns)} in it; see docs/evaluation.md")

    def _table(self, name: str) -> list[dict[str, Any]]:
        uri = storage.join(self.uri, name)
        try:
            self._digests[name], raw = files.read_rows(storage.follow(uri, self.roots), self.roots)
            return [_parsed(row, number) for number, row in raw]
        except storage.Unavailable:
            raise
        except (OSError, ValueError) as error:
            raise BadBenchmark(f"{uri}: cannot be read: {first_error(error)}") from None

    def read(self, name: str) -> bytes | None:
        """Return the content of a file that a row names; None if there is none.

        Raises:
            BadBenchmark: it is too large or cannot be read, or its name leads out of the folder.
        """
        if name not in self.names:
            return None
        try:
            data = storage.read_at_most(storage.safe_join(self.uri, name, self.roots), MAX_FILE_BYTES)
        except storage.Unavailable:
            raise
        except (OSError, ValueError) as error:
            raise BadBenchmark(f"{name}: cannot be read: {first_error(error)}") from None
        self._digests[name] = hashlib.sha256(data).hexdigest()
        return data

    def video(self, *names: str) -> str:
        """Return the path or URI of the first of these files that exists; of the first, if none does.

        Raises:
            BadBenchmark: it lies outside of the folder and the roots.
        """
        name = next((name for name in names if name in self.names), names[0])
        return self._address(storage.resolve(self.uri, name))

    def frames(self, name: str, fps: float) -> str | None:
        """Return the address of a video whose frames are the images in a folder, in the order of their names; None if
        there are no images."""
        images = sorted(self._images.get(name.strip("/"), []))
        if not images:
            return None
        try:
            return str(FrameList(tuple(self._address(storage.join(self.uri, image)) for image in images), fps=fps))
        except BadFrameList as error:
            raise BadBenchmark(f"{name}: {error}") from None

    @functools.cached_property
    def _images(self) -> dict[str, list[str]]:
        """Images of each folder."""
        images = defaultdict(list)
        for name in self.names:
            if name.lower().endswith(IMAGES):
                images[name.rpartition("/")[0]].append(name)
        return images

    def _address(self, uri: str) -> str:
        try:
            return resolve_video(uri, self.roots)
        except ValueError as error:
            raise BadBenchmark(str(error)) from None


def _parsed(raw: Any, number: int) -> dict[str, Any]:
    """Return a row of a table as an object."""
    if isinstance(raw, BadRow):
        raise raw
    row = storage.parse_json(raw) if isinstance(raw, str | bytes) else raw
    if not isinstance(row, dict):
        raise ValueError(f"row {number} is not an object")
    return row


def questions_of(
    table: str, rows: Sequence[dict[str, Any]], make: Callable[[int, dict[str, Any]], Question]
) -> list[Question]:
    """Make the questions of a table.

    Args:
        table: name of the table, for messages.
        rows: its rows.
        make: makes a question of (number from 0, row). It may raise `BadBenchmark` for a row that cannot be asked,
            which then counts as unreadable.

    Raises:
        BadBenchmark: no row has a column that is needed, so this is another table.
    """
    questions = []
    for number, row in enumerate(rows):
        try:
            questions.append(make(number, row))
        except KeyError as error:
            key = error.args[0]
            if not any(key in other for other in rows):
                columns = ", ".join(map(str, row))
                raise BadBenchmark(f"{table}: there is no column {key}; it has {columns[:300]}") from None
            questions.append(_unaskable(number, f"has no {key}"))
        except BadBenchmark as error:
            questions.append(_unaskable(number, str(error)))
    return questions


def _unaskable(number: int, reason: str) -> Question:
    messages = [{"role": "user", "content": ""}]
    return Question(f"row {number + 1}", (), messages, "", error=printable(f"row {number + 1}: {reason}"))


def text(row: dict[str, Any], key: str) -> str:
    """Return a column of a row as text.

    Raises:
        KeyError: the row has no such column.
        BadBenchmark: it holds neither text nor a number.
    """
    value = row[key]
    if not isinstance(value, str | int | float):
        raise BadBenchmark(f"its {key} is not text")
    return _writable(str(value), key)


def texts(row: dict[str, Any], key: str) -> list[str]:
    """Return a column of a row as a list of texts; raises like `text`."""
    value = row[key]
    if not isinstance(value, list) or not all(isinstance(item, str | int | float) for item in value):
        raise BadBenchmark(f"its {key} is not a list of texts")
    return [_writable(str(item), key) for item in value]


def groups(row: dict[str, Any], *keys: str, **renamed: str) -> tuple[tuple[str, str], ...]:
    """Return the groups of a row: the values of these columns, several for a list, none for a missing column.

    Args:
        row: the row.
        keys: columns.
        renamed: key of the group -> column.
    """
    pairs = []
    for key, column in {**{key: key for key in keys}, **renamed}.items():
        values = row.get(column, [])
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, str | int | float) and str(value):
                pairs.append((key, _writable(str(value), column)))
    return tuple(dict.fromkeys(pairs))


def _writable(value: str, key: str) -> str:
    """Return a text that can be written as UTF-8: JSON may contain halves of surrogate pairs."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadBenchmark(f"its {key} has half a surrogate pair") from None
    return value
