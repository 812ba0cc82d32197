"""What libav does not tell about an mp4 or mov file: read from its boxes."""

import io
import itertools
import math
import struct
from collections.abc import Iterator
from typing import BinaryIO

CONTAINERS = set(b"moov trak mdia minf dinf stbl edts udta mvex moof traf wave".split())
"""Boxes whose content libav reads as boxes."""
MAX_ENTRIES = 16
"""Most descriptions of a track's samples that are looked at."""
MAX_ITEMS = 1000
"""Most items of an image that are looked at; a photo of a phone has about fifty."""
MAX_DEPTH = 10
"""Deepest box that libav enters."""


def has_compressed_header(file: BinaryIO) -> bool:
    """Return whether the index is compressed: libav would unpack up to 4 GiB from a thousandth of that."""
    return _contains_compressed(file, 0, file.seek(0, io.SEEK_END), MAX_DEPTH)


def _contains_compressed(file: BinaryIO, start: int, end: int, depth: int) -> bool:
    """Look for it in boxes at any depth: libav takes it wherever it stands."""
    return depth > 0 and any(
        box == b"cmov" or (box in CONTAINERS and _contains_compressed(file, first, last, depth - 1))
        for box, first, last in _boxes(file, start, end)
    )


def claimed_size(file: BinaryIO) -> int:
    """Return the size that the file's boxes claim [bytes]; a file that was cut off is smaller."""
    return max((last for _, _, last in _claimed_boxes(file, 0, file.seek(0, io.SEEK_END))), default=0)


def encryption_scheme(file: BinaryIO) -> str | None:
    """Return the name of the scheme by which a video track is encrypted ("cenc", "cbcs", ...); None if none is."""
    for track in _boxes_at(file, (b"moov", b"trak", b"mdia"), (0, file.seek(0, io.SEEK_END))):
        for start, _ in _boxes_at(file, (b"hdlr",), track):
            file.seek(start + 8)
            if file.read(4) != b"vide":
                break
        else:
            for start, end in _boxes_at(file, (b"minf", b"stbl", b"stsd"), track):
                for entry, first, last in itertools.islice(_boxes(file, start + 8, end), MAX_ENTRIES):
                    if entry in (b"encv", b"drmi"):
                        # The boxes of a visual sample entry come after 78 bytes of other fields.
                        for position, _ in _boxes_at(file, (b"sinf", b"schm"), (first + 78, last)):
                            file.seek(position + 4)
                            return file.read(4).decode("ascii", "replace").strip()
                        return "FairPlay" if entry == b"drmi" else "unknown scheme"
    return None


def is_in_tiles(file: BinaryIO) -> bool:
    """Return whether an image is a grid of others, of which libav shows one."""
    for meta, end in _boxes_at(file, (b"meta",), (0, file.seek(0, io.SEEK_END))):
        for start, last in _boxes_at(file, (b"iinf",), (meta + 4, end)):
            file.seek(start)
            entries = start + (6 if file.read(1) == b"\0" else 8)
            for _, entry, _ in itertools.islice(_boxes(file, entries, last), MAX_ITEMS):
                file.seek(entry)
                head = file.read(14)
                if b"grid" in (head[8:12], head[10:14]):  # the item's number has two bytes or four
                    return True
    return False


def read_rotation(file: BinaryIO, track: int) -> int:
    """Return the rotation in the display matrix of an mp4's track [degrees]. PyAV has it only for decoded frames."""
    header = b""
    for box, box_start, box_end in _boxes(file, 0, file.seek(0, io.SEEK_END)):
        for child, start, end in _boxes(file, box_start, box_end) if box == b"moov" else ():
            for name, position, _ in _boxes(file, start, end) if child == b"trak" else ():
                if name == b"tkhd":
                    file.seek(position)
                    header = file.read(92)
                    has_long_times = header[:1] == b"\1"  # version 1: times of 8 bytes
                    number, matrix = (20, 52) if has_long_times else (12, 40)
                    if len(header) >= matrix + 16 and struct.unpack_from(">I", header, number)[0] == track:
                        a, b, _, c, d = struct.unpack_from(">5i", header + bytes(4), matrix)
                        angle = math.atan2(b * math.hypot(a, c), a * math.hypot(b, d))
                        return -round(math.degrees(angle))
    return 0


def _boxes_at(file: BinaryIO, path: tuple[bytes, ...], span: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield the content [start, end) of each box at a path of names."""
    for box, start, end in _boxes(file, *span):
        if box == path[0]:
            yield from _boxes_at(file, path[1:], (start, end)) if len(path) > 1 else [(start, end)]


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield name and content [start, end) of each mp4 box between two offsets; stop at a malformed box."""
    for name, first, last in _claimed_boxes(file, start, end):
        yield name, first, min(last, end)


def _claimed_boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield boxes as `_boxes` does, but with the end that their size claims, which may be after `end`."""
    while start + 8 <= end:
        file.seek(start)
        head = file.read(16)
        if len(head) < 8:
            return
        size, name, header_size = int.from_bytes(head[:4]), head[4:8], 8
        if size == 1:
            size, header_size = int.from_bytes(head[8:16]), 16
        elif size == 0:
            size = end - start
        if size < header_size:
            return
        yield name, start + header_size, start + size
        start += size
