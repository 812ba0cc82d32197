"""JSON values of foreign rows: parsed strictly, with limits, and described in messages."""

import json
from typing import Any

MAX_ROW_BYTES = 4 * 2**20
"""Longest row as JSON: a line, an element of a list, or the sidecar of a video [bytes]."""
MAX_ROW_VALUES = 10_000
"""Most values of a row: texts, numbers, objects and lists. Each malformed value can cost an error of a kilobyte."""


class BadRow(ValueError):
    """A row, or a whole manifest, that cannot be read; the message names the error and, where there is one, the
    remedy."""


class StrictDecoder:
    """Parses JSON. Fields that are null are left out of objects: they are fields that a row lacks. What Python's parser
    would let pass is remembered: NaN, and keys that occur twice.

    Attributes:
        problem: what was wrong with the last value; None if it is JSON.
    """

    def __init__(self) -> None:
        self.problem: str | None = None
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._refuse)

    def decode(self, text: str, start: int = 0) -> tuple[Any, int]:
        """Return the value that begins at `start`, and where it ends.

        Raises:
            ValueError: there is no JSON value, or one nested too deep.
        """
        self.problem = None
        try:
            return self._decoder.raw_decode(text, start)
        except RecursionError:
            raise ValueError("nested too deep") from None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            self.problem = f"the key {shown(twice)} occurs twice in one object"
        return {key: value for key, value in pairs if value is not None}

    def _refuse(self, name: str) -> None:
        self.problem = f"{name} is not a JSON value; write null or a number"


def parse_json(text: str | bytes, prefix: str = "") -> Any:
    """Parse the JSON of one row, or of one of its fields.

    Args:
        text: a str, or bytes in UTF-8.
        prefix: begins each message, as in "messages: ".

    Raises:
        BadRow: it is not JSON, too long, or has too many values.
    """
    if len(text) > MAX_ROW_BYTES:
        raise BadRow(f"{prefix}{too_long(len(text))}")
    decoder = StrictDecoder()
    try:
        text = (text.decode() if isinstance(text, bytes) else text).strip(" \t\r\n")
        value, end = decoder.decode(text)
    except ValueError as error:
        raise BadRow(f"{prefix}Invalid JSON: {json_error(error)}") from None
    if rest := text[end:].lstrip():
        raise BadRow(f"{prefix}Invalid JSON: something follows the value, at character {len(text) - len(rest) + 1}")
    if decoder.problem:
        raise BadRow(f"{prefix}Invalid JSON: {decoder.problem}")
    return value if len(text) <= MAX_ROW_VALUES else require_few_values(value, prefix)


def json_error(error: ValueError) -> str:
    """Return what is wrong with a JSON text, without a line number: the text is one line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return str(error)


def require_few_values(row: Any, prefix: str = "") -> Any:
    """Return a parsed row.

    Raises:
        BadRow: it has more than `MAX_ROW_VALUES` values.
    """
    pending, count = [row], 0
    while pending:
        value = pending.pop()
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        count += len(items)
        if count > MAX_ROW_VALUES:
            raise BadRow(f"{prefix}has more than {MAX_ROW_VALUES} values")
        pending.extend(items)
    return row


def too_long(size: int) -> str:
    """Return why a row of this size [bytes] is refused."""
    return f"has {size} bytes, of at most {MAX_ROW_BYTES}"


def shown(value: Any) -> str:
    """Return a value for a message: in ASCII, short."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def text_of(value: Any, name: str) -> str:
    """Return a value that must be text.

    Raises:
        BadRow: it is not; the message calls it `name`.
    """
    if not isinstance(value, str):
        raise BadRow(f"{name} is {shown(value)}, and should be text")
    return value
