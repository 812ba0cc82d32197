"""Bad and odd files: the right frames or the right reason, every time; no hang, no crash, no request."""

import http.server
import os
import re
import threading
import time
from itertools import pairwise

import numpy as np
import pytest

from crosslmm.config import BadConfig, DataConfig
from crosslmm.data.video import pyav
from crosslmm.data.video.decode import VideoFailure, decode_video, require_backend
from crosslmm.data.video.decode_pool import Decoder, VideoPool
from tests.support import misbehave, zoo

pytestmark = pytest.mark.corrupt

COUNT, SIDE, DEADLINE_S = 8, 64, 20.0
UNDECODABLE = r"InvalidDataError|EOFError|OSError|no frames that can be decoded"


def middles(first, frames):
    """Numbers of the frames on screen in the middles of equal parts of frames that begin with `first`."""
    return (first + np.floor((np.arange(COUNT) + 0.5) * frames / COUNT).astype(int)).tolist()


def on_screen(times):
    """The same for frames that appear at these times, the last one for a tenth of a second."""
    moments = (np.arange(COUNT) + 0.5) * (times[-1] + 0.1) / COUNT
    return (np.searchsorted(times, moments, side="right") - 1).tolist()


UNEVEN = np.concatenate([[0], np.cumsum(np.tile([0.1, 0.3, 0.05, 0.2], 8))])[:30]
WHOLE = middles(0, zoo.FRAMES)
MP4 = zoo.video()
LONG_GOP = zoo.video(g="250")
FAST = zoo.video(container={"movflags": "faststart"}, g="5", bf="0")
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
QUARTERS = {1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 3: (0, -1, 1, 0)}


def head(data, share):
    return data[: int(len(data) * share)]


def half_changed():
    """A transport stream whose frames grow in the middle of it."""
    return zoo.video("mpegts", frames=20) + zoo.video(
        "mpegts", frames=20, first=20, times=2 + np.arange(20) / zoo.FPS, size=(256, 128)
    )


# Odd, and whole: exactly these frames.
RIGHT = {
    "mp4": (MP4, WHOLE),
    "mp4 with one keyframe": (LONG_GOP, WHOLE),
    "mp4 without B-frames": (FAST, WHOLE),
    "mp4 with sound": (zoo.video(audio=True), WHOLE),
    "mp4 in fragments": (zoo.video(container=FRAGMENTS), WHOLE),
    "mp4 of mpeg4": (zoo.video(codec="mpeg4"), WHOLE),
    "hevc with open groups": (zoo.video(codec="libx265", **{"x265-params": "log-level=none:open-gop=1"}), WHOLE),
    "mov": (zoo.video("mov"), WHOLE),
    "mkv": (zoo.video("matroska"), WHOLE),
    "mkv with open groups": (zoo.video("matroska", **{"x264-params": "open-gop=1"}), WHOLE),
    "mkv that begins late": (
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
    "edit list that begins at a keyframe": (zoo.edited(MP4, 10, 30), middles(10, 30)),
    "edit list that begins between keyframes": (zoo.edited(MP4, 13, 27), middles(13, 27)),
    "edit list that ends early": (zoo.edited(MP4, 0, 20), middles(0, 20)),
    "edit list over one keyframe": (zoo.edited(LONG_GOP, 17, 16), middles(17, 16)),
    "mp4 whose track lasts four days by its header": (zoo.patched(MP4, b"mdhd", 16, [0x7FFFFFFF]), WHOLE),
    "mp4 whose film lasts 24 days by its header": (zoo.patched(MP4, b"mvhd", 16, [0x7FFFFFFF]), WHOLE),
    "mp4 with a frame of two billion ticks": (zoo.patched(MP4, b"stts", 8, [0x7FFFFFFF]), WHOLE),
    "mp4 whose index is larger than the file": (zoo.patched(MP4, b"moov", -8, [0x7FFFFFFF]), WHOLE),
    "mkv called mp4": (zoo.video("matroska", frames=24), middles(0, 24)),
}

# Cut, and worth saving: numbers that ascend, and no fewer than this.
SALVAGED = {
    "mp4 cut at 90 %": (head(FAST, 0.9), 6),
    "mp4 cut at 60 %": (head(FAST, 0.6), 4),
    "fragments cut at 60 %": (head(zoo.video(container=FRAGMENTS), 0.6), 4),
    "mkv cut at 60 %": (head(zoo.video("matroska"), 0.6), 6),
    "mkv cut at 90 %": (head(zoo.video("matroska"), 0.9), 6),
    "webm cut at 70 %": (head(zoo.video("webm", "libvpx-vp9"), 0.7), 5),
    "avi cut at 90 %": (head(zoo.video("avi", "mpeg4"), 0.9), 5),
    "transport stream that changes its size": (half_changed(), 6),
    "transport stream cut at 30 %": (head(zoo.video("mpegts"), 0.3), 6),
    "transport stream cut inside of a packet": (zoo.video("mpegts")[:-5001], 6),
    "transport stream cut at its beginning": (zoo.video("mpegts")[188 * 20 :], 5),
    "mp4 with its last chunk missing": (FAST[:-40], 6),
}

BAD = {
    "empty": (b"", "check", "the file is empty"),
    "one byte": (b"\0", "check", "not an mp4"),
    "zeros": (bytes(5000), "check", "not an mp4"),
    "text": (b"\x1b[2Jnot a video\n", "check", r"begins with b'\\x1b\[2Jnot a vi'"),
    "broken jpeg": (b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(900), "decode|check", UNDECODABLE),
    "gif called mp4": (b"GIF89a" + bytes(900), "check", "not an mp4"),
    "zip called mp4": (b"PK\3\4" + bytes(900), "check", "not an mp4"),
    "wav called avi": (b"RIFF\0\0\0\0WAVEfmt " + bytes(900), "check", "not an mp4"),
    "sound alone": (zoo.sound_alone(), "check", "no video stream"),
    "sound with a cover picture": (zoo.sound_alone(picture=True), "check", "no video stream"),
    "mp4 cut before its index": (head(MP4, 0.5), "decode", "InvalidDataError"),
    "mp4 cut inside of its index": (head(MP4, 0.95), "decode|check", UNDECODABLE),
    "mp4 cut before its first frame": (head(FAST, 0.3), "decode|check", UNDECODABLE),
    "mkv cut before its first frame": (head(zoo.video("matroska"), 0.2), "decode|check", UNDECODABLE),
    "mkv's header alone": (zoo.video("matroska")[:60], "decode|check", UNDECODABLE),
    "avi's header alone": (zoo.video("avi", "mpeg4")[:2000], "decode|check", UNDECODABLE),
    "noise behind an mp4's header": (MP4[:40] + np.random.default_rng(0).bytes(5000), "decode", UNDECODABLE),
    "noise behind an mkv's header": (b"\x1aE\xdf\xa3" + np.random.default_rng(0).bytes(5000), "decode", UNDECODABLE),
    "index that points behind the file": (zoo.patched(MP4, b"stco", 8, [0x7FFFFFFF]), "check", "no frames"),
    "frames of two gigabytes by the index": (zoo.patched(MP4, b"stsz", 4, [0x7FFFFFFF]), "decode|check", UNDECODABLE),
    "two billion frames by the index": (zoo.patched(MP4, b"stsz", 8, [0x7FFFFFFF]), "decode", "InvalidDataError"),
    "10,000 x 10,000 pixels": (
        zoo.video("avi", "mjpeg", frames=1, size=(10000, 10000)), "check", r"10000 x 10000, and data\.max_frame_pixels"
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


def numbers(found):
    assert isinstance(found, np.ndarray), found
    return [zoo.read(frame) for frame in found]


def harmless(found):
    assert isinstance(found, VideoFailure), found
    assert found.reason.isascii()
    assert found.reason.isprintable()
    return found


def test_making_them_leaves_these_tests_processes_like_others():
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.parametrize("kind", RIGHT)
def test_an_odd_file_gives_its_right_frames(decoded, kind):
    data, expected = RIGHT[kind]
    assert numbers(decoded(data)) == expected


@pytest.mark.parametrize("form", ["mp4", "matroska", "mpegts"])
def test_the_other_policies_see_their_frames_and_measure_nothing(tmp_path, monkeypatch, form):
    path = tmp_path / "clip.mp4"
    path.write_bytes(zoo.video(form))
    monkeypatch.setattr(pyav, "_measure_duration", None)
    for policy, expected in {"fps": [0, 5, 10], "fps_then_uniform": [0, 19, 39]}.items():
        data = DataConfig(num_frames=3, sampling=policy, fps=2)
        assert numbers(decode_video(str(path), data, SIDE)) == expected


@pytest.mark.parametrize("clockwise", QUARTERS)
def test_a_turned_file_is_turned(decoded, clockwise):
    found = decoded(zoo.turned(zoo.video(size=(128, 128)), QUARTERS[clockwise]))
    assert numbers(found)[0] != WHOLE[0]
    assert numbers(np.rot90(found, clockwise, axes=(1, 2))) == WHOLE


@pytest.mark.parametrize("kind", SALVAGED)
def test_a_cut_file_gives_the_frames_it_has_and_no_others(decoded, kind):
    data, least = SALVAGED[kind]
    found = numbers(decoded(data))
    # A frame that is cut in its middle cannot be told by any decoder, so the last one may not read.
    found = found[:-1] if found[-1] is None else found
    assert len(found) >= least
    assert None not in found
    assert all(a < b for a, b in pairwise(found))


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_gives_its_reason(decoded, kind):
    data, stage, reason = BAD[kind]
    found = harmless(decoded(data))
    assert re.fullmatch(stage, found.stage), found
    assert re.search(reason, found.reason), found


@pytest.mark.parametrize("part", ["frames", "index", "anywhere"])
@pytest.mark.parametrize("form", ["mp4", "matroska", "mpegts"])
@pytest.mark.parametrize("seed", range(6))
def test_turned_bits_cost_a_file_itself_at_most(decoded, form, part, seed):
    """No decoder can tell a turned bit in a picture's payload from another picture: only checksums could."""
    data = zoo.video(form)
    index = data.index(b"moov") if form == "mp4" else len(data) * 4 // 5
    begin, end = {"frames": (60, index), "index": (index, len(data)), "anywhere": (0, len(data))}[part]
    found = decoded(zoo.flipped(data, begin, end, seed=seed))
    if isinstance(found, VideoFailure):
        assert harmless(found).stage in ("check", "decode")
    else:
        assert 1 <= len(found) <= COUNT
        assert found.shape[1:] == (SIDE, SIDE, 3)


@pytest.mark.parametrize("share", np.arange(0.02, 1, 0.07).round(2))
@pytest.mark.parametrize("form", ["mp4", "faststart", "fragments", "matroska", "avi", "mpegts"])
def test_whatever_the_cut_the_frames_are_the_file_s_own(decoded, form, share):
    container = {"faststart": {"movflags": "faststart"}, "fragments": FRAGMENTS}.get(form)
    codec = "mpeg4" if form == "avi" else "libx264"
    data = zoo.video("mp4" if container else form, codec, container=container)
    found = decoded(head(data, share))
    if isinstance(found, VideoFailure):
        assert harmless(found).stage in ("check", "decode")
    else:
        seen = numbers(found)
        assert None not in seen[:-1]
        assert all(a < b for a, b in pairwise(s for s in seen if s is not None))


@pytest.fixture(scope="module")
def listener():
    """A server on loopback that remembers who asked."""
    asked = []

    class Remember(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Remember)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
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
        "hls in an mp4's clothes": b"\0\0\0\x18ftypisom\0\0\0\0isomiso2" + hls,
        "dash in an mp4's clothes": b"\0\0\0\x18ftypisom\0\0\0\0isomiso2" + dash,
        "hls in an mkv's clothes": b"\x1aE\xdf\xa3" + hls,
        "hls in a transport stream's clothes": (b"G" + hls).ljust(188, b"\n") + b"G" + bytes(187),
        "hls in an avi's clothes": b"RIFF\xff\0\0\0AVI " + hls,
    }


@pytest.mark.parametrize("backend", ["pyav", "decord", "torchcodec"])
def test_no_file_makes_a_decoder_ask_a_server(listener, tmp_path, backend):
    try:
        require_backend(backend)
    except BadConfig as error:
        pytest.skip(str(error))
    url, asked = listener
    files = lures(url)
    for name, data in files.items():
        (tmp_path / f"{name}.mp4").write_bytes(data)
    (tmp_path / "elsewhere.mp4").write_bytes(zoo.elsewhere(MP4, f"{url}/elsewhere.mp4"))
    (tmp_path / "link.mp4").symlink_to("/etc/hostname")
    data = DataConfig(num_frames=COUNT, decoder=backend, decode_timeout_s=DEADLINE_S)
    with Decoder(data, SIDE) as decoder:
        *found, elsewhere, link = decoder([f"{tmp_path}/{name}.mp4" for name in [*files, "elsewhere", "link"]])
        for name, one in zip(files, found, strict=True):
            assert harmless(one), name
        assert harmless(link).stage == "check"
        # Its frames lie in the file, whatever it says.
        assert isinstance(elsewhere, VideoFailure) or numbers(elsewhere) == WHOLE
        http_uri = decoder([f"{url}/clip.mp4"])[0]
    assert "only local paths" in harmless(http_uri).reason
    assert asked == []


def test_decord_survives_the_zoo_or_is_replaced(tmp_path):
    data = DataConfig(num_frames=COUNT, decoder="decord", decode_timeout_s=DEADLINE_S)
    kinds = RIGHT | SALVAGED | BAD
    for i, (content, *_) in enumerate(kinds.values()):
        (tmp_path / f"{i}.mp4").write_bytes(content)
    with Decoder(data, SIDE) as decoder:
        found = dict(zip(kinds, decoder([f"{tmp_path}/{i}.mp4" for i in range(len(kinds))]), strict=True))
    assert numbers(found["mp4"]) == WHOLE
    for kind in BAD:
        harmless(found[kind])


@pytest.mark.parametrize(
    ("misbehaves", "stage"),
    [
        (misbehave.spins, "deadline"),
        (misbehave.crashes, "crash"),
        (misbehave.overflows, "crash"),
        (misbehave.hogs, "decode"),
    ],
)
def test_a_decoder_that_misbehaves_in_native_code_costs_its_own_video_alone(tmp_path, misbehaves, stage):
    good = str(tmp_path / "good.mp4")
    (tmp_path / "good.mp4").write_bytes(MP4)
    with VideoPool(DataConfig(num_frames=COUNT, decode_timeout_s=2, decode_memory_gib=1), misbehaves) as decoder:
        began = time.monotonic()
        before, bad, after = decoder([good, "bad", good])
        assert time.monotonic() - began < 15
    assert numbers(before) == numbers(after) == WHOLE
    assert harmless(bad).stage == stage


def test_limits_of_bytes_duration_and_pixels_are_named(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(MP4)
    for limit, reason in {
        "max_video_bytes": (1000, rf"it has {len(MP4)} bytes, and data\.max_video_bytes is 1000"),
        "max_video_s": (3.5, r"it lasts 4 s, and data\.max_video_s is 3\.5"),
        "max_frame_pixels": (8191, r"128 x 64, and data\.max_frame_pixels is 8191"),
    }.items():
        value, says = reason
        found = decode_video(str(path), DataConfig(num_frames=COUNT, **{limit: value}), SIDE)
        assert re.search(says, harmless(found).reason)
        assert found.stage == "check"


def test_there_are_at_least_25_kinds():
    assert len(RIGHT) + len(SALVAGED) + len(BAD) + len(lures("")) >= 60
