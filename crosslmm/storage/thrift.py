"""Thrift's compact protocol, as far as it takes to know what the metadata of a Parquet file will cost Arrow.

Numbers and types of fields: https://github.com/apache/parquet-format (parquet.thrift).
"""

from typing import Any

I16, I32, I64, BINARY, LIST, SET, STRUCT = 4, 5, 6, 8, 9, 10, 12
FIXED_SIZES = {1: 0, 2: 0, 3: 1, 7: 8}
"""Sizes of the values of other types: true, false, byte and double [bytes]."""
MAX_DEPTH = 16
"""Most structs and lists in each other; Parquet's metadata has seven."""


class Malformed(ValueError):
    """These bytes are not a struct, or one with more items than allowed."""


def read_struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Parse the struct at `at`.

    Like Thrift's own readers, it takes the last of two fields with one number.

    Returns:
        (fields, end): the 32-bit integers and structs among its fields, by number; and the offset after it.

    Raises:
        Malformed: there is none.
    """
    fields: dict[int, Any] = {}
    number = 0
    try:
        while data[at]:
            number, kind, at = _field(data, at, number)
            if kind == I32:
                value, at = _varint(data, at)
                value &= 2**32 - 1
                fields[number] = (value >> 1) ^ -(value & 1)
            elif kind == STRUCT and depth < MAX_DEPTH:
                fields[number], at = read_struct(data, at, depth + 1)
            else:
                at, _ = _skip(data, at, kind, depth, 0, 0)
    except IndexError:
        raise Malformed("it ends early") from None
    return fields, at + 1


def count_items(data: bytes, most: int) -> dict[int, int]:
    """Return how many items the lists in each field of the struct at the start of `data` have, lists in lists included.

    Raises:
        Malformed: there is no struct, or all lists together have more than `most` items.
    """
    counts: dict[int, int] = {}
    at = number = total = 0
    try:
        while data[at]:
            number, kind, at = _field(data, at, number)
            at, count = _skip(data, at, kind, 0, total, most)
            counts[number] = counts.get(number, 0) + count - total
            total = count
    except IndexError:
        raise Malformed("it ends early") from None
    return counts


def _field(data: bytes, at: int, number: int) -> tuple[int, int, int]:
    """Read a field's header; return its number, its type, and the offset of its value."""
    head, at = data[at], at + 1
    if head >> 4:
        return number + (head >> 4), head & 15, at
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), head & 15, at


def _skip(data: bytes, at: int, kind: int, depth: int, items: int, most: int) -> tuple[int, int]:
    """Return the offset after a value, and `items` plus the items of the lists in it."""
    if kind in (I16, I32, I64):
        return _varint(data, at)[1], items
    if kind == BINARY:
        length, at = _varint(data, at)
        return at + length, items
    if kind in FIXED_SIZES:
        return at + FIXED_SIZES[kind], items
    if depth >= MAX_DEPTH:
        raise Malformed(f"more than {MAX_DEPTH} structs and lists lie in each other")
    if kind == STRUCT:
        while data[at]:
            _, field, at = _field(data, at, 0)
            at, items = _skip(data, at, field, depth + 1, items, most)
        return at + 1, items
    if kind in (LIST, SET):
        head, at = data[at], at + 1
        size = head >> 4
        if size == 15:
            size, at = _varint(data, at)
        items += size
        if items > most:
            raise Malformed(f"its lists have more than {most} items")
        if head & 15 in (1, 2, 3):  # booleans take a byte here
            return at + size, items
        for _ in range(size):
            at, items = _skip(data, at, head & 15, depth + 1, items, most)
        return at, items
    raise Malformed(f"it has a field of type {kind}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
        if byte < 128 or shift > 63:
            return value, at
