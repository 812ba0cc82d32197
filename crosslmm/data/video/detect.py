"""Find out what a file is from its first bytes, whether it is encrypted, and whether its end is missing.

No decoder is left to guess: playlists and scripts could make it open other files and hosts.
"""

import os
import re
from collections.abc import Callable, Iterator
from typing import BinaryIO

from crosslmm.data.video import mp4
from crosslmm.data.video.container import UnreadableVideo

SUPPORTED = (
    "an mp4, mov, mkv, webm, avi, ts, m2ts, mpg, vob, flv, wmv, ogv or mxf file, a raw H.264, HEVC or MPEG stream, nor "
    "a jpeg, png, webp, gif, avif or heic image"
)
SIGNATURES = {
    b"\x1aE\xdf\xa3": "matroska",
    b"\x00\x00\x01\xba": "mpeg",
    b"FLV\x01": "flv",
    b"0&\xb2u\x8ef\xcf\x11": "asf",
    b"OggS\x00": "ogg",
    b"\x06\x0e+4\x02\x05\x01\x01\r\x01\x02": "mxf",
    b"GIF87a": "gif",
    b"GIF89a": "gif",
    b"\xff\xd8\xff": "jpeg_pipe",
    b"\x89PNG\r\n\x1a\n": "png_pipe",
    b"\x00\x00\x01\xb3": "mpegvideo",
}
"""First bytes of formats, and libav's names of these."""
RAW_STREAM = re.compile(rb"\x00?\x00\x00\x01(?:(?P<h264>[\x06\x09\x27\x47\x67])|(?P<hevc>[\x40\x42\x46\x4e]\x01))")
"""First bytes of streams without a container: a delimiter, parameters, or a comment."""
HEIF_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
"""Brands of images and animations in the boxes of mp4."""
PACKET_SIZES = {188: 0, 192: 4, 204: 0}
"""Sizes of a transport stream's packets, and the offset of the sync byte: broadcast, camcorders (a time stamp comes
first), broadcast with error correction [bytes]."""
SYNC_PACKETS = 5
"""Packets whose sync bytes are looked at."""
SCRAMBLED_SHARE = 0.5
"""A stream with at least this share of scrambled packets counts as encrypted."""
VIDEO_TYPES = {0x01, 0x02, 0x10, 0x1B, 0x24, 0x33, 0x42, 0xEA}
"""Types of the streams in a transport stream's tables that are videos."""
SCANNED_BYTES = 256 * 2**10
"""Bytes of a file that are searched for scrambled packets."""
SEGMENT = 0x18538067
"""Name of the element that holds all others of a Matroska file, after the header."""
UNKNOWN_END = 2**63
"""End of a Matroska element of unknown size, beyond the end of every file [bytes]."""
MIN_MISSING_SHARE = 1e-3
"""Share of a file from which on its end is missing; writers err by a few bytes."""
MAX_ELEMENTS = 256
"""Elements of a Matroska file in one parent that are looked at; there are about twenty."""


def detect_format(file: BinaryIO, max_bytes: int) -> str:
    """Return libav's name of a file's container; or "webp" (read by Pillow), or "heif" (by libav's mov).

    Raises:
        UnreadableVideo: the file is empty, too large, or has none of the supported formats.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(SYNC_PACKETS * max(PACKET_SIZES))
    if not head:
        raise UnreadableVideo("the file is empty")
    if size > max_bytes:
        raise UnreadableVideo(f"it has {size} bytes, and data.max_video_bytes is {max_bytes}")
    if head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS:
        return "heif"
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
        return "mov"
    if head[:4] == b"RIFF" and head[8:11] == b"AVI":
        return "avi"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if _packet_size(head):
        return "mpegts"
    raw = RAW_STREAM.match(head)
    container = (
        raw.lastgroup if raw else next((name for first, name in SIGNATURES.items() if head.startswith(first)), None)
    )
    if container is None:
        raise UnreadableVideo(f"not {SUPPORTED}: it begins with {head[:12]!r}")
    return "apng" if container == "png_pipe" and _is_animated_png(file) else container


def require_unencrypted(file: BinaryIO, format_name: str) -> None:
    """Check that a file's video is not encrypted, as far as the format says so.

    Raises:
        UnreadableVideo: it is.
    """
    check = ENCRYPTION.get(format_name)
    if check and (scheme := check(file)):
        raise UnreadableVideo(f"its video is encrypted ({scheme})")


def describe_missing_end(file: BinaryIO, format_name: str) -> str | None:
    """Return in words how much of a file is missing if it was cut off, as far as the format states its size."""
    claim, size = CLAIMED_SIZE.get(format_name), file.seek(0, os.SEEK_END)
    claimed = claim(file) if claim else 0
    if claimed - size <= MIN_MISSING_SHARE * claimed:
        return None
    return f"the file was cut off: it has {size} of its {claimed} bytes"


def _packet_size(head: bytes) -> int:
    """Return the size of a transport stream's packets [bytes]; 0 for another file."""
    for size, offset in PACKET_SIZES.items():
        syncs = head[offset::size]
        if len(syncs) >= 2 and set(syncs) == {ord("G")}:
            return size
    return 0


def _is_animated_png(file: BinaryIO) -> bool:
    """Return whether a PNG announces an animation before its first picture."""
    at = 8
    for _ in range(1000):  # a picture comes after a dozen others
        file.seek(at)
        head = file.read(8)
        if len(head) < 8 or head[4:] in (b"acTL", b"IDAT"):
            return head[4:] == b"acTL"
        at += 12 + int.from_bytes(head[:4])
    return False


def _scrambled_transport_stream(file: BinaryIO) -> str | None:
    """Look at the packets of the videos that the stream's tables name; audio may be scrambled alone."""
    file.seek(0)
    data = file.read(SCANNED_BYTES)
    size = _packet_size(data[: SYNC_PACKETS * max(PACKET_SIZES)])
    packets = [data[at : at + 188] for at in range(PACKET_SIZES.get(size, 0), len(data) - 187, size or len(data))]
    programs, videos = {0}, {-1}
    flags = []
    for packet in packets:
        pid = int.from_bytes(packet[1:3]) & 0x1FFF
        if pid in programs and packet[1] & 0x40:
            for number, kind in _table_entries(packet, pid):
                (programs if pid == 0 else videos if kind in VIDEO_TYPES else set()).add(number)
        elif pid in videos:
            flags.append(packet[3] >= 0x80)
    return "a scrambled transport stream" if sum(flags) > SCRAMBLED_SHARE * max(len(flags), 1) else None


def _table_entries(packet: bytes, pid: int) -> Iterator[tuple[int, int]]:
    """Yield the PID and the type of each entry of a table that begins in a packet: programs (`pid` 0), or the
    streams of one."""
    start = 4 + (1 + packet[4] if packet[3] & 0x20 else 0)  # after an adaptation field
    section = packet[start + 1 + packet[start] :] if start < len(packet) else b""
    end = min(len(section), 3 + (int.from_bytes(section[1:3]) & 0xFFF) - 4)
    at = 8 if pid == 0 else 12 + (int.from_bytes(section[10:12]) & 0xFFF)
    while at + 4 < end + (pid == 0):
        yield int.from_bytes(section[at + (2 if pid == 0 else 1) :][:2]) & 0x1FFF, section[at]
        at += 4 if pid == 0 else 5 + (int.from_bytes(section[at + 3 : at + 5]) & 0xFFF)


def _scrambled_program_stream(file: BinaryIO) -> str | None:
    file.seek(0)
    # After the header of a video packet's MPEG-2 form, two bits say whether it is scrambled.
    flags = [
        match[1][0] & 0x30 for match in re.finditer(rb"\x00\x00\x01\xe0..([\x80-\xbf])", file.read(SCANNED_BYTES), re.S)
    ]
    return "CSS, as on DVDs" if sum(map(bool, flags)) > SCRAMBLED_SHARE * max(len(flags), 1) else None


def _protected_asf(file: BinaryIO) -> str | None:
    """Look for the content encryption objects of a WMV's header."""
    file.seek(16)
    size = min(int.from_bytes(file.read(8), "little"), SCANNED_BYTES)
    file.seek(0)
    header = file.read(size)
    marks = (
        b"\xfb\xb3\x11\x22\x23\xbd\xd2\x11\xb4\xb7\x00\xa0\xc9\x55\xfc\x6e",
        b"\x14\xe6\x8a\x29\x22\x26\x17\x4c\xb9\x35\xda\xe0\x7e\xe9\x28\x9c",
    )
    return "Windows Media DRM" if any(mark in header for mark in marks) else None


def _encrypted_matroska(file: BinaryIO) -> str | None:
    """Look for ContentEncryption in the first video track."""
    everything = 0, file.seek(0, os.SEEK_END)
    tracks = 0x1654AE6B
    track, kind, encodings, encoding, encryption = 0xAE, 0x83, 0x6D80, 0x6240, 0x5035
    for entry in _elements(file, track, _first(file, tracks, _first(file, SEGMENT, everything))):
        at, _ = _first(file, kind, entry)
        file.seek(at)
        if file.read(1) == b"\1":
            element = _first(file, encryption, _first(file, encoding, _first(file, encodings, entry)))
            return "ContentEncryption" if element[1] else None
    return None


def _claimed_avi_size(file: BinaryIO) -> int:
    file.seek(4)
    size = int.from_bytes(file.read(4), "little")
    return 0 if size == 2**32 - 1 else 8 + size  # unknown while it was written


def _claimed_matroska_size(file: BinaryIO) -> int:
    _, end = _first(file, SEGMENT, (0, UNKNOWN_END))
    return end if end < UNKNOWN_END else 0


def _first(file: BinaryIO, name: int, parent: tuple[int, int]) -> tuple[int, int]:
    return next(_elements(file, name, parent), (0, 0))


def _elements(file: BinaryIO, name: int, parent: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield the content [start, end) of each EBML element with this id in a parent, up to the first cluster."""
    start, end = parent
    for _ in range(MAX_ELEMENTS):
        if start >= end:
            return
        file.seek(start)
        head = file.read(12)
        id_length = 9 - head[0].bit_length() if head else 9
        if id_length > 4 or len(head) <= id_length or head[:id_length] == b"\x1f\x43\xb6\x75":
            return
        size_length = 9 - head[id_length].bit_length()
        size = int.from_bytes(head[id_length : id_length + size_length]) & ((1 << 7 * size_length) - 1)
        content = start + id_length + size_length
        start = end if size == (1 << 7 * size_length) - 1 else min(content + size, end)  # all ones: unknown
        if int.from_bytes(head[:id_length]) == name:
            yield content, start


ENCRYPTION: dict[str, Callable[[BinaryIO], str | None]] = {
    "mov": mp4.encryption_scheme,
    "matroska": _encrypted_matroska,
    "mpegts": _scrambled_transport_stream,
    "mpeg": _scrambled_program_stream,
    "asf": _protected_asf,
}
"""Functions that return the name of a file's encryption, or None."""
CLAIMED_SIZE: dict[str, Callable[[BinaryIO], int]] = {
    "mov": mp4.claimed_size,
    "matroska": _claimed_matroska_size,
    "avi": _claimed_avi_size,
}
"""Functions that return the size which a file of a format should have [bytes]; 0 if it does not say."""
