"""Bytes of a text file -> pieces of UTF-8, unpacked and decoded as they are read, -> lines.

A small file can unpack to gigabytes. It is unpacked piece by piece, so that it costs no memory, and only up to a limit,
so that it costs no time either.
"""

import codecs
import itertools
from collections.abc import Iterable, Iterator

import pyarrow as pa

from crosslmm.data.rows.values import MAX_ROW_BYTES, BadRow, too_long
from crosslmm.storage.parquet import unpacked_limit

PIECE_BYTES = 2**20
"""Size of a piece, packed or not [bytes]."""
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
"""Compressions that are unpacked, by the first bytes of a file, whatever its name is."""
REFUSED = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip", b"7z\xbc\xaf": "7z"}
"""Compressions and archives that are not."""
ENCODINGS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # begins with the mark of UTF-16
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
"""Encodings by byte order mark."""

Line = tuple[int, bytes | BadRow]
"""Number of a line, from 1, and its bytes without its end; or why they are not there."""


def compression_of(head: bytes) -> str | None:
    """Return the compression of a file that begins with these bytes; None if there is none.

    Raises:
        BadRow: it has one that is not unpacked here.
    """
    for magic, name in REFUSED.items():
        if head.startswith(magic):
            raise BadRow(f"is packed with {name}; unpack it, or pack it with gzip or zstd")
    return next((name for magic, name in COMPRESSIONS.items() if head.startswith(magic)), None)


def encoding_of(head: bytes) -> tuple[str, int]:
    """Return the encoding of a text that begins with these bytes, and the length of its byte order mark.

    Raises:
        BadRow: it is UTF-16 or UTF-32 without a mark.
    """
    for mark, encoding in ENCODINGS.items():
        if head.startswith(mark):
            return encoding, len(mark)
    zeros = [byte == 0 for byte in head[:4]]
    if zeros in ([False, True] * 2, [True, False] * 2):
        name = "UTF-16LE" if zeros[1] else "UTF-16BE"
        raise BadRow(f"is {name} without a byte order mark; iconv -f {name} -t UTF-8 makes UTF-8 of it")
    return "utf-8", 0


def utf8_pieces(data: bytes) -> Iterator[bytes]:
    """Yield the text of a file as UTF-8 without a byte order mark, in pieces of about `PIECE_BYTES`.

    UTF-8 is passed on as it is, errors included: each makes only its own line unreadable.

    Raises:
        BadRow: it is damaged, unpacks to too much, or has another compression or encoding.
    """
    pieces = _unpacked(data) if compression_of(data[:8]) else cut(data)
    first = next(pieces, b"")
    encoding, mark = encoding_of(first[:4])
    pieces = itertools.chain([first[mark:]], pieces)
    return pieces if encoding == "utf-8" else _transcoded(pieces, encoding)


def cut(data: bytes) -> Iterator[bytes]:
    """Yield bytes in pieces."""
    for start in range(0, len(data), PIECE_BYTES):
        yield data[start : start + PIECE_BYTES]


def _unpacked(data: bytes) -> Iterator[bytes]:
    name, limit, total = compression_of(data[:8]), unpacked_limit(len(data)), 0
    try:
        with pa.CompressedInputStream(pa.BufferReader(data), name) as stream:
            while piece := stream.read(PIECE_BYTES):
                total += len(piece)
                if total > limit:
                    raise BadRow(f"{len(data)} bytes of {name} unpack to more than {limit}")
                yield piece
    except OSError as error:
        raise BadRow(f"its {name} is damaged: {error}") from None


def _transcoded(pieces: Iterable[bytes], encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for piece in pieces:
            yield decoder.decode(piece).encode()
        yield decoder.decode(b"", final=True).encode()
    except UnicodeError as error:
        raise BadRow(f"its {encoding.upper()} is damaged: {error}") from None


def lines(pieces: Iterable[bytes], first: int = 1, keep_ends: bool = False, blank: bool = True) -> Iterator[Line]:
    r"""Yield all lines, which end with \n, \r\n or \r; one that is too long for a row is not kept.

    Args:
        pieces: the text.
        first: number of the first line.
        keep_ends: keep the end of each line.
        blank: whether blank lines are wanted; otherwise they may be left out, many at a time.
    """
    number, rest, dropped = first, b"", 0
    for piece in pieces:
        if not blank and piece.isspace() and b"\r" not in piece and not rest:
            number, rest = number + piece.count(b"\n"), piece[piece.rfind(b"\n") + 1 :]
            continue
        whole = (rest + piece).splitlines(keepends=True)
        # The last line may go on in the next piece, or its \r may be the first half of \r\n.
        rest = whole.pop() if whole and not whole[-1].endswith(b"\n") else b""
        for line in whole:
            yield number, _line(line, dropped, keep_ends)
            number, dropped = number + 1, 0
        if len(rest) > MAX_ROW_BYTES and not rest.endswith(b"\r"):
            dropped, rest = dropped + len(rest), b""
    if rest or dropped:
        yield number, _line(rest, dropped, keep_ends)


def _line(text: bytes, dropped: int, keep_end: bool) -> bytes | BadRow:
    size = dropped + len(text)
    if size > MAX_ROW_BYTES + 2:  # with its end
        return BadRow(too_long(size))
    return text if keep_end else text.rstrip(b"\r\n")


def numbered_lines(pieces: Iterable[bytes], first: int = 1) -> Iterator[Line]:
    """Yield the lines that are not blank, with their numbers; the first line has number `first`."""
    for number, line in lines(pieces, first, blank=False):
        if isinstance(line, BadRow) or line.strip():
            yield number, line
