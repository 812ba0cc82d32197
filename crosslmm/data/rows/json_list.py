"""A list of rows in one JSON text, read element by element: no more than one of them is in memory as text."""

import codecs
from collections.abc import Iterable, Iterator
from typing import Any

from crosslmm.data.rows.values import MAX_ROW_BYTES, BadRow, StrictDecoder, json_error

SPACE = " \t\r\n"


def json_list(pieces: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    """Yield number, from 1, and value of each element; a `BadRow` in place of one that is not strictly JSON.

    Args:
        pieces: UTF-8.

    Raises:
        BadRow: the text is not a list, or ends within it.
    """
    text, number = _Text(pieces), 0
    if text.take() != "[":
        raise BadRow("is not a JSON list")
    if text.peek() == "]":
        text.take()
    else:
        while True:
            number += 1
            yield number, text.value(number)
            if (mark := text.take()) == "]":
                break
            if mark != ",":
                raise BadRow(f"row {number} of the list is followed by {mark!a} and not by a comma or the list's end")
    if text.peek():
        raise BadRow("the list is followed by something else")


class _Text:
    """A text that is read piece by piece: `_ahead` is in memory, and what lies before `_at` in it is consumed."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = codecs.iterdecode(pieces, "utf-8")
        self._ahead, self._at = "", 0
        self._decoder = StrictDecoder()

    def peek(self) -> str:
        """Return the next character that is not space; empty at the end."""
        while True:
            while self._at < len(self._ahead) and self._ahead[self._at] in SPACE:
                self._at += 1
            if self._at < len(self._ahead) or not self._more():
                return self._ahead[self._at : self._at + 1]

    def take(self) -> str:
        """Return the next character that is not space, and go past it."""
        mark = self.peek()
        self._at += len(mark)
        return mark

    def value(self, number: int) -> Any:
        """Return the next value, element `number` of the list; a BadRow if it is not strictly JSON."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.decode(self._ahead, self._at)
                if end < len(self._ahead) or not self._more():  # a number may go on in the next piece
                    self._at = end
                    return BadRow(f"Invalid JSON: {self._decoder.problem}") if self._decoder.problem else value
            except ValueError as error:
                if len(self._ahead) - self._at > MAX_ROW_BYTES:
                    raise BadRow(f"row {number} of the list has no end within {MAX_ROW_BYTES} characters") from None
                if not self._more():
                    raise BadRow(f"row {number} of the list: Invalid JSON: {json_error(error)}") from None

    def _more(self) -> bool:
        """Read another piece; return False at the end."""
        try:
            piece = next(self._pieces, None)
        except UnicodeDecodeError as error:
            raise BadRow(f"is not UTF-8: {error}") from None
        if piece is None:
            return False
        self._ahead, self._at = self._ahead[self._at :] + piece, 0
        return True
