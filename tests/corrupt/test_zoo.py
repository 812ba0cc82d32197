"""Damaged and unusual files give the right frames or the right reason; no hang, no crash, no network request."""

import functools
import http.server
import os
import re
import struct
import threading
import time
from itertools import pairwise

import numpy as np
import pytest

from crosslmm.config import BadConfig, DataConfig
from crosslmm.data.frame_sampling import SampledFrames
from crosslmm.data.video import timeline
from crosslmm.data.video.decode import VideoFailure, decode_video, probe_video, require_backend
from crosslmm.data.video.decode_pool import Decoder, VideoPool
from tests.support import misbehave, zoo

pytestmark = pytest.mark.corrupt

COUNT, SIDE, DEADLINE_S = 8, 64, 20.0
UNDECODABLE = r"InvalidDataError|EOFError|OSError|no frames that can be decoded"


def middles(first, frames):
    """Return the numbers of the frames on screen in the middles of equal parts of frames that start with `first`."""
    return (first + np.floor((np.arange(COUNT) + 0.5) * frames / COUNT).astype(int)).tolist()


def on_screen(times):
    """Return the same for frames that appear at these times, the last one for 0.1 s."""
    moments = (np.arange(COUNT) + 0.5) * (times[-1] + 0.1) / COUNT
    return (np.searchsorted(times, moments, side="right") - 1).tolist()


UNEVEN = np.concatenate([[0], np.cumsum(np.tile([0.1, 0.3, 0.05, 0.2], 8))])[:30]
WHOLE = middles(0, zoo.FRAMES)
MP4 = zoo.video()
LONG_GOP = zoo.video(g="250")
FAST = zoo.video(container={"movflags": "faststart"}, g="5", bf="0")
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
ROTATIONS = {1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 3: (0, -1, 1, 0)}


def head(data, share):
    return data[: int(len(data) * share)]


def size_changing_stream():
    """Return a transport stream whose frames become larger halfway."""
    return zoo.video("mpegts", frames=20) + zoo.video(
        "mpegts", frames=20, first=20, times=2 + np.arange(20) / zoo.FPS, size=(256, 128)
    )


# Unusual but complete files: exactly these frames.
RIGHT = {
    "mp4": (MP4, WHOLE),
    "mp4 with one keyframe": (LONG_GOP, WHOLE),
    "mp4 without B-frames": (FAST, WHOLE),
    "mp4 with audio": (zoo.video(audio=True), WHOLE),
    "mp4 in fragments": (zoo.video(container=FRAGMENTS), WHOLE),
    "mp4 of mpeg4": (zoo.video(codec="mpeg4"), WHOLE),
    "hevc with open groups": (zoo.video(codec="libx265", **{"x265-params": "log-level=none:open-gop=1"}), WHOLE),
    "mov": (zoo.video("mov"), WHOLE),
    "mkv": (zoo.video("matroska"), WHOLE),
    "mkv with open groups": (zoo.video("matroska", **{"x264-params": "open-gop=1"}), WHOLE),
    "mkv that starts late": (
        zoo.video(
            "matroska", times=1000 + np.arange(zoo.FRAMES) / zoo.FPS, container={"avoid_negative_ts": "disabled"}
        ),
        WHOLE,
    ),
    "webm": (zoo.video("webm", "libvpx-vp9"), WHOLE),
    "av1": (zoo.video("mp4", "libsvtav1", **{"svtav1-params": "lp=1"}), WHOLE),
    "avi": (zoo.video("avi", "mpeg4"), WHOLE),
    "avi with B-frames": (zoo.video("avi", "mpeg4", bf="2"), WHOLE),
    "transport stream": (zoo.video("mpegts"), WHOLE),
    "one frame": (zoo.video(frames=1), [0]),
    "two frames": (zoo.video(frames=2), [0, 1]),
    "slides": (zoo.video(frames=5, times=[0, 0.1, 0.2, 3, 4], bf="0"), [2, 3]),
    "variable frame rate": (zoo.video(frames=30, times=UNEVEN), on_screen(UNEVEN)),
    "variable frame rate in mkv": (zoo.video("matroska", frames=30, times=UNEVEN), on_screen(UNEVEN)),
    "edit list that starts at a keyframe": (zoo.with_edit_list(MP4, 10, 30), middles(10, 30)),
    "edit list that starts between keyframes": (zoo.with_edit_list(MP4, 13, 27), middles(13, 27)),
    "edit list that ends early": (zoo.with_edit_list(MP4, 0, 20), middles(0, 20)),
    "edit list over one keyframe": (zoo.with_edit_list(LONG_GOP, 17, 16), middles(17, 16)),
    "mp4 whose track lasts four days by its header": (zoo.patch_boxes(MP4, b"mdhd", 16, [0x7FFFFFFF]), WHOLE),
    "mp4 whose film lasts 24 days by its header": (zoo.patch_boxes(MP4, b"mvhd", 16, [0x7FFFFFFF]), WHOLE),
    "mp4 with a frame of two billion ticks": (zoo.patch_boxes(MP4, b"stts", 8, [0x7FFFFFFF]), WHOLE),
    "mp4 whose index is larger than the file": (zoo.patch_boxes(MP4, b"moov", -8, [0x7FFFFFFF]), WHOLE),
    "mkv called mp4": (zoo.video("matroska", frames=24), middles(0, 24)),
}

# Truncated files: frames with ascending numbers, and at least this many of them.
SALVAGED = {
    "mp4 cut at 90 %": (head(FAST, 0.9), 6),
    "mp4 cut at 60 %": (head(FAST, 0.6), 4),
    "fragments cut at 60 %": (head(zoo.video(container=FRAGMENTS), 0.6), 4),
    "mkv cut at 60 %": (head(zoo.video("matroska"), 0.6), 6),
    "mkv cut at 90 %": (head(zoo.video("matroska"), 0.9), 6),
    "webm cut at 70 %": (head(zoo.video("webm", "libvpx-vp9"), 0.7), 5),
    "avi cut at 90 %": (head(zoo.video("avi", "mpeg4"), 0.9), 5),
    "transport stream that changes its size": (size_changing_stream(), 6),
    "transport stream cut at 30 %": (head(zoo.video("mpegts"), 0.3), 6),
    "transport stream cut inside a packet": (zoo.video("mpegts")[:-5001], 6),
    "transport stream cut at its beginning": (zoo.video("mpegts")[188 * 20 :], 5),
    "mp4 with its last chunk missing": (FAST[:-40], 6),
}

# Unreadable files: stage and reason of the failure.
BAD = {
    "empty": (b"", "check", "the file is empty"),
    "one byte": (b"\0", "check", "not an mp4"),
    "zeros": (bytes(5000), "check", "not an mp4"),
    "text": (b"\x1b[2Jnot a video\n", "check", r"begins with b'\\x1b\[2Jnot a vi'"),
    "broken jpeg": (b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(900), "decode|check", UNDECODABLE),
    "gif without a picture": (b"GIF89a" + bytes(900), "check", "no frames"),
    "webp without a picture": (b"RIFF\xff\0\0\0WEBPVP8X" + bytes(900), "check|decode", "no frames"),
    "zip called mp4": (b"PK\3\4" + bytes(900), "check", "not an mp4"),
    "wav called avi": (b"RIFF\0\0\0\0WAVEfmt " + bytes(900), "check", "not an mp4"),
    "audio only": (zoo.audio_only(), "check", "no video stream"),
    "audio with a cover picture": (zoo.audio_only(picture=True), "check", "no video stream"),
    "mp4 cut before its index": (head(MP4, 0.5), "decode", "InvalidDataError"),
    "mp4 cut inside its index": (head(MP4, 0.95), "decode|check", UNDECODABLE),
    "mp4 cut before its first frame": (head(FAST, 0.3), "decode|check", UNDECODABLE),
    "mkv cut before its first frame": (head(zoo.video("matroska"), 0.2), "decode|check", UNDECODABLE),
    "mkv header only": (zoo.video("matroska")[:60], "decode|check", UNDECODABLE),
    "avi header only": (zoo.video("avi", "mpeg4")[:2000], "decode|check", UNDECODABLE),
    "noise after an mp4 header": (MP4[:40] + np.random.default_rng(0).bytes(5000), "decode", UNDECODABLE),
    "noise after an mkv header": (b"\x1aE\xdf\xa3" + np.random.default_rng(0).bytes(5000), "decode", UNDECODABLE),
    "index that points past the end": (zoo.patch_boxes(MP4, b"stco", 8, [0x7FFFFFFF]), "check", "no frames"),
    "frames of two gigabytes": (zoo.patch_boxes(MP4, b"stsz", 4, [0x7FFFFFFF]), "decode|check", UNDECODABLE),
    "two billion frames by the index": (zoo.patch_boxes(MP4, b"stsz", 8, [0x7FFFFFFF]), "decode", "InvalidDataError"),
    "10,000 x 10,000 pixels": (
        zoo.video("avi", "mjpeg", frames=1, size=(10000, 10000)), "check", r"more than .* of data\.max_frame_pixels"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def decoder():
    with Decoder(DataConfig(num_frames=COUNT, decode_timeout_s=DEADLINE_S), SIDE) as decoder:
        yield decoder


@pytest.fixture
def decoded(decoder, tmp_path):
    def decoded(data, name="clip.mp4"):
        (tmp_path / name).write_bytes(data)
        return decoder([str(tmp_path / name)])[0]

    return decoded


def numbers(result):
    """Return the number of each frame; fail if the video is unreadable."""
    assert isinstance(result, SampledFrames), result
    return [zoo.read_number(frame) for frame in result.images]


def require_printable(result):
    """Return a failure; fail if it is none, or if its reason could garble a terminal."""
    assert isinstance(result, VideoFailure), result
    assert result.reason.isascii()
    assert result.reason.isprintable()
    return result


def test_encoding_leaves_the_scheduler_policy_unchanged():
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.parametrize("kind", RIGHT)
def test_unusual_file_gives_exact_frames(decoded, kind):
    data, expected = RIGHT[kind]
    assert numbers(decoded(data)) == expected


@pytest.mark.parametrize("form", ["mp4", "matroska", "mpegts"])
def test_fps_sampling_does_not_read_every_packet(tmp_path, monkeypatch, form):
    path = tmp_path / "clip.mp4"
    path.write_bytes(zoo.video(form))
    monkeypatch.setattr(timeline, "scan", None)
    policies = {"fps": [0, 5, 10], "fps_then_uniform": [0, 19, 39]}
    for policy, expected in list(policies.items())[: 1 if form == "mpegts" else 2]:
        data = DataConfig(num_frames=3, sampling=policy, fps=2)
        assert numbers(decode_video(str(path), data, SIDE)) == expected


@pytest.mark.parametrize("clockwise", ROTATIONS)
def test_rotation_is_applied_in_the_right_direction(decoded, clockwise):
    result = decoded(zoo.with_rotation(zoo.video(size=(128, 128)), ROTATIONS[clockwise]))
    assert numbers(result)[0] != WHOLE[0]
    assert [zoo.read_number(frame) for frame in np.rot90(result.images, clockwise, axes=(1, 2))] == WHOLE


@pytest.mark.parametrize("kind", SALVAGED)
def test_truncated_file_gives_only_frames_it_has(decoded, kind):
    data, minimum = SALVAGED[kind]
    result = numbers(decoded(data))
    # No decoder notices that a frame was cut in the middle, so the last frame may be damaged.
    result = result[:-1] if result[-1] is None else result
    assert len(result) >= minimum
    assert None not in result
    assert all(a < b for a, b in pairwise(result))


@pytest.mark.parametrize("kind", BAD)
def test_bad_file_gives_its_reason(decoded, kind):
    data, stage, reason = BAD[kind]
    result = require_printable(decoded(data))
    assert re.fullmatch(stage, result.stage), result
    assert re.search(reason, result.reason), result


@pytest.mark.parametrize("part", ["frames", "index", "anywhere"])
@pytest.mark.parametrize("form", ["mp4", "matroska", "mpegts"])
@pytest.mark.parametrize("seed", range(6))
def test_flipped_bits_affect_only_their_own_file(decoded, form, part, seed):
    """No decoder notices a flipped bit in the payload of a frame; that would take checksums."""
    data = zoo.video(form)
    index = data.index(b"moov") if form == "mp4" else len(data) * 4 // 5
    begin, end = {"frames": (60, index), "index": (index, len(data)), "anywhere": (0, len(data))}[part]
    result = decoded(zoo.flip_bits(data, begin, end, seed=seed))
    if isinstance(result, VideoFailure):
        assert require_printable(result).stage in ("check", "decode")
    else:
        assert 1 <= len(result) <= COUNT
        assert result.images.shape[1:] == (SIDE, SIDE, 3)


@pytest.mark.parametrize("share", np.arange(0.02, 1, 0.07).round(2))
@pytest.mark.parametrize("form", ["mp4", "faststart", "fragments", "matroska", "avi", "mpegts"])
def test_file_cut_anywhere_gives_only_real_frames(decoded, form, share):
    container = {"faststart": {"movflags": "faststart"}, "fragments": FRAGMENTS}.get(form)
    codec = "mpeg4" if form == "avi" else "libx264"
    data = zoo.video("mp4" if container else form, codec, container=container)
    result = decoded(head(data, share))
    if isinstance(result, VideoFailure):
        assert require_printable(result).stage in ("check", "decode")
    else:
        seen = numbers(result)
        assert None not in seen[:-1]
        assert all(a < b for a, b in pairwise(s for s in seen if s is not None))


@pytest.fixture(scope="module")
def listener():
    """Start a server on loopback -> its URL, and the paths of the requests that it received."""
    requests = []

    class RequestRecorder(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), RequestRecorder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()


def lures(url):
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}/hls.ts\n#EXT-X-ENDLIST\n".encode()
    dash = (
        f'<MPD profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><BaseURL>{url}/dash.mp4</BaseURL></MPD>'.encode()
    )
    return {
        "hls": hls,
        "dash": b"<?xml version='1.0'?>" + dash,
        "concat": f"ffconcat version 1.0\nfile {url}/concat.mp4\n".encode(),
        "sdp": f"v=0\ns=-\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\na=control:{url}\n".encode(),
        "asx": f'<asx version="3.0"><entry><ref href="{url}/asx.mp4"/></entry></asx>'.encode(),
        "hls after an mp4 header": b"\0\0\0\x18ftypisom\0\0\0\0isomiso2" + hls,
        "dash after an mp4 header": b"\0\0\0\x18ftypisom\0\0\0\0isomiso2" + dash,
        "hls after an mkv header": b"\x1aE\xdf\xa3" + hls,
        "hls after a transport stream header": (b"G" + hls).ljust(188, b"\n") + b"G" + bytes(187),
        "hls after an avi header": b"RIFF\xff\0\0\0AVI " + hls,
    }


@pytest.mark.parametrize("backend", ["pyav", "decord", "torchcodec"])
def test_no_file_makes_a_decoder_open_a_connection(listener, tmp_path, backend):
    try:
        require_backend(backend)
    except BadConfig as error:
        pytest.skip(str(error))
    url, requests = listener
    files = lures(url)
    for name, data in files.items():
        (tmp_path / f"{name}.mp4").write_bytes(data)
    (tmp_path / "external.mp4").write_bytes(zoo.with_external_data(MP4, f"{url}/external.mp4"))
    (tmp_path / "link.mp4").symlink_to("/etc/hostname")
    data = DataConfig(num_frames=COUNT, decoder=backend, decode_timeout_s=DEADLINE_S)
    with Decoder(data, SIDE) as decoder:
        *failures, external, link = decoder([f"{tmp_path}/{name}.mp4" for name in [*files, "external", "link"]])
        for name, failure in zip(files, failures, strict=True):
            assert require_printable(failure), name
        assert require_printable(link).stage == "check"
        # Its frames are in the file, whatever the header claims.
        assert isinstance(external, VideoFailure) or numbers(external) == WHOLE
        http_uri = decoder([f"{url}/clip.mp4"])[0]
    assert "only local paths" in require_printable(http_uri).reason
    assert requests == []


def disguised_lures(url):
    """Return playlists and session descriptions behind the first bytes of a container, some with a video after them."""
    forms = {name: data for name, data in lures(url).items() if " after " not in name and not name.startswith("dash")}
    disguises = {
        "mp4": lambda lure: b"\n\n\n\nfree\n" + lure,
        "mp4, followed by one": lambda lure: struct.pack(">I", 9 + len(lure)) + b"wide\n" + lure + MP4,
        "mkv": lambda lure: b"\x1aE\xdf\xa3\n" + lure,
        "avi": lambda lure: b"RIFF\n\n\n\nAVI\n" + lure,
        "transport stream": lambda lure: (b"G\n" + lure).ljust(188, b"\n") + b"G".ljust(188, b"\n"),
        "transport stream, followed by one": lambda lure: (
            (b"G\n" + lure).ljust(188, b"\n") + b"G".ljust(20 * 188, b"\n") + zoo.video("mpegts")
        ),
    }
    return {f"{form} as {name}": wrap(lure) for form, lure in forms.items() for name, wrap in disguises.items()}


@pytest.mark.parametrize("backend", ["pyav", "decord", "torchcodec"])
def test_no_file_makes_a_decoder_open_a_socket(tmp_path, backend):
    """The kernel kills a child that opens one, a session description's UDP ports included."""
    try:
        require_backend(backend)
    except BadConfig as error:
        pytest.skip(str(error))
    files = lures("http://127.0.0.1:9") | disguised_lures("http://127.0.0.1:9")
    for name, content in files.items():
        (tmp_path / f"{name}.mp4").write_bytes(content)
    (tmp_path / "good.mp4").write_bytes(MP4)
    data = DataConfig(num_frames=COUNT, decoder=backend, decode_timeout_s=DEADLINE_S)
    decode = functools.partial(misbehave.decode_without_sockets, data=data)
    with VideoPool(data, decode) as decoder:
        *results, good, control = decoder([*(f"{tmp_path}/{name}.mp4" for name in [*files, "good"]), "socket"])
    assert numbers(good) == WHOLE
    assert control == VideoFailure("the decoder died (exit code -31)", "crash", attempts=2)
    for name, result in zip(files, results, strict=True):
        if isinstance(result, VideoFailure):
            assert require_printable(result).stage in ("check", "decode"), (name, result)
        else:
            assert "followed by" in name
            assert len(numbers(result)) >= 6


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize(
    ("form", "codec"),
    [
        ("matroska", "ffv1"),
        ("avi", "huffyuv"),
        ("avi", "cinepak"),
        ("mov", "qtrle"),
        ("mov", "png"),
        ("avi", "ffvhuff"),
    ],
)
def test_codec_that_is_not_listed_is_refused_by_name(tmp_path, backend, form, codec):
    pixels = {"png": "rgb24", "huffyuv": "yuv422p", "cinepak": "rgb24", "qtrle": "rgb24"}.get(codec, "yuv420p")
    (tmp_path / "clip").write_bytes(zoo.video(form, codec, frames=3, pixels=pixels))
    data = DataConfig(num_frames=COUNT, decoder=backend)
    for result in (decode_video(f"{tmp_path}/clip", data, SIDE), probe_video(f"{tmp_path}/clip", data)):
        assert re.match(rf"its codec is {codec}, and only h264, .* are decoded", require_printable(result).reason)
        assert result.stage == "check"


@pytest.mark.parametrize(
    ("form", "codec"),
    [("mpegts", "mpeg2video"), ("avi", "msmpeg4v2"), ("avi", "msmpeg4"), ("webm", "libvpx")],
)
def test_older_codecs_are_decoded(decoded, form, codec):
    seen = numbers(decoded(zoo.video(form, codec)))
    assert len(seen) == COUNT
    assert all(a < b for a, b in pairwise(seen))


def test_decord_survives_bad_files_or_is_replaced(tmp_path):
    data = DataConfig(num_frames=COUNT, decoder="decord", decode_timeout_s=DEADLINE_S)
    kinds = RIGHT | SALVAGED | BAD
    for i, (content, *_) in enumerate(kinds.values()):
        (tmp_path / f"{i}.mp4").write_bytes(content)
    with Decoder(data, SIDE) as decoder:
        result = dict(zip(kinds, decoder([f"{tmp_path}/{i}.mp4" for i in range(len(kinds))]), strict=True))
    assert numbers(result["mp4"]) == WHOLE
    for kind in BAD:
        require_printable(result[kind])


@pytest.mark.parametrize(
    ("misbehaves", "stage"),
    [
        (misbehave.spins, "deadline"),
        (misbehave.crashes, "crash"),
        (misbehave.overflows, "crash"),
        (misbehave.hogs, "decode"),
    ],
)
def test_misbehaving_native_decoder_affects_one_video(tmp_path, misbehaves, stage):
    good = str(tmp_path / "good.mp4")
    (tmp_path / "good.mp4").write_bytes(MP4)
    with VideoPool(DataConfig(num_frames=COUNT, decode_timeout_s=2, decode_memory_gib=1), misbehaves) as decoder:
        began = time.monotonic()
        before, bad, after = decoder([good, "bad", good])
        assert time.monotonic() - began < 15
    assert numbers(before) == numbers(after) == WHOLE
    assert require_printable(bad).stage == stage


def test_limit_messages_name_the_configuration_key(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(MP4)
    for limit, (value, reason) in {
        "max_video_bytes": (1000, rf"it has {len(MP4)} bytes, and data\.max_video_bytes is 1000"),
        "max_video_s": (3.5, r"it lasts 4 s, and data\.max_video_s is 3\.5"),
        "max_frame_pixels": (8191, r"128 x 64, and data\.max_frame_pixels is 8191"),
    }.items():
        failure = decode_video(str(path), DataConfig(num_frames=COUNT, **{limit: value}), SIDE)
        assert re.search(reason, require_printable(failure).reason)
        assert failure.stage == "check"


def test_there_are_at_least_60_kinds_of_files():
    assert len(RIGHT) + len(SALVAGED) + len(BAD) + len(lures("")) >= 60
