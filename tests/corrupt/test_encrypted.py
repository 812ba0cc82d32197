"""Encrypted files are refused by the name of their encryption."""

import functools
import struct
from itertools import pairwise

import pytest

from crosslmm.data.video.decode import VideoFailure, decode_video, probe_video
from tests.support import zoo
from tests.support.ffmpeg import COUNT, DATA, FAST, H264, MPEG2, SIDE, SLOW, VP8, make, needs_ffmpeg

pytestmark = [pytest.mark.corrupt, needs_ffmpeg]


def cenc(path, scheme="cenc"):
    key = ["-encryption_scheme", "cenc-aes-ctr", "-encryption_key", "7" * 32, "-encryption_kid", "a" * 32]
    make(path, *H264, *key, **SLOW)
    path.write_bytes(path.read_bytes().replace(b"cenc", scheme.encode()))


def fairplay(path):
    make(path, *H264, **SLOW)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"drmi", 2))


def scrambled(path):
    data = bytearray(make(path, *H264, audio_s=4, **SLOW).read_bytes())
    size, start = (192, 4) if path.suffix == ".m2ts" else (188, 0)
    for at in range(start, len(data), size):
        if int.from_bytes(data[at + 1 : at + 3]) & 0x1FFF in (0x100, 0x1011):
            data[at + 3] |= 0x80
    path.write_bytes(data)


def css(path):
    data = bytearray(make(path, *MPEG2, **FAST).read_bytes())
    at = data.find(b"\x00\x00\x01\xe0")
    while at >= 0:
        data[at + 6] |= 0x10
        at = data.find(b"\x00\x00\x01\xe0", at + 4)
    path.write_bytes(data)


def drm(path):
    data = make(path, "-c:v", "wmv2", "-g", "10", **SLOW).read_bytes()
    content_encryption = bytes.fromhex("fbb3112223bdd211b4b700a0c955fc6e") + struct.pack("<Q", 40) + bytes(16)
    size = struct.unpack_from("<Q", data, 16)[0]
    head = data[:16] + struct.pack("<QI", size + 40, struct.unpack_from("<I", data, 24)[0] + 1) + data[28:30]
    path.write_bytes(head + content_encryption + data[30:])


def element(name, content):
    return name + struct.pack(">I", 0x10000000 | len(content)) + content


def encrypted_webm(path):
    """Insert ContentEncodings into the track, as packagers do."""
    data = make(path, *VP8, **SLOW).read_bytes()
    encryption = element(b"\x50\x35", element(b"\x47\xe1", b"\5"))
    encodings = element(b"\x6d\x80", element(b"\x62\x40", element(b"\x50\x33", b"\1") + encryption))
    tracks = data.index(b"\x16\x54\xae\x6b", data.index(b"\x16\x54\xae\x6b") + 4)  # after the seek head
    path.write_bytes(grown(data, tracks, encodings))


def grown(data, tracks, addition):
    """Return a Matroska file with an addition at the end of its first track."""

    def size_at(at):
        length = 9 - data[at].bit_length()
        return int.from_bytes(data[at : at + length]) & ((1 << 7 * length) - 1), length

    tracks_size, tracks_length = size_at(tracks + 4)
    entry = tracks + 4 + tracks_length
    entry_size, entry_length = size_at(entry + 1)
    content = data[entry + 1 + entry_length : entry + 1 + entry_length + entry_size] + addition
    rest = data[entry + 1 + entry_length + entry_size : tracks + 4 + tracks_length + tracks_size]
    return (
        data[:tracks]
        + element(b"\x16\x54\xae\x6b", element(b"\xae", content) + rest)
        + data[tracks + 4 + tracks_length + tracks_size :]
    )


ENCRYPTED = {
    "mp4": ("a.mp4", cenc, "cenc"),
    "mp4 of Apple's scheme": ("a.mp4", functools.partial(cenc, scheme="cbcs"), "cbcs"),
    "film of iTunes": ("a.mp4", fairplay, "FairPlay"),
    "webm": ("a.webm", encrypted_webm, "ContentEncryption"),
    "transport stream": ("a.ts", scrambled, "a scrambled transport stream"),
    "camcorder's transport stream": ("a.m2ts", scrambled, "a scrambled transport stream"),
    "dvd": ("a.vob", css, "CSS, as on DVDs"),
    "wmv": ("a.wmv", drm, "Windows Media DRM"),
}


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize("kind", ENCRYPTED)
def test_encrypted_file_is_refused_as_such(tmp_path, kind, backend):
    name, make_file, scheme = ENCRYPTED[kind]
    make_file(tmp_path / name)
    failure = VideoFailure(f"its video is encrypted ({scheme})", "check")
    assert decode_video(f"{tmp_path}/{name}", DATA.model_copy(update={"decoder": backend}), SIDE) == failure
    assert probe_video(f"{tmp_path}/{name}", DATA) == failure


def test_audio_that_is_encrypted_alone_is_no_obstacle(tmp_path):
    path = make(tmp_path / "a.ts", *H264, audio_s=4, **SLOW)
    data = bytearray(path.read_bytes())
    for at in range(0, len(data), 188):
        if int.from_bytes(data[at + 1 : at + 3]) & 0x1FFF == 0x101:
            data[at + 3] |= 0x80
    path.write_bytes(data)
    result = decode_video(str(path), DATA, SIDE)
    assert all(a < b for a, b in pairwise(zoo.read_number(image) for image in result.images))
    assert len(result) == COUNT
