from crosslmm.config import DataConfig
from crosslmm.encode.recorder import EncodingRecorder


def report(started, ended):
    return {
        "entries": [], "quarantined": [], "shortfalls": [], "squared_error": 0.0, "squared_values": 0.0,
        "started": started, "ended": ended,
    }  # fmt: skip


def test_encoding_s_spans_the_blocks_in_any_order(tmp_path):
    recorder = EncodingRecorder(str(tmp_path), {}, DataConfig())
    assert recorder.encoding_s == 0
    with recorder:
        for started, ended in ((104.0, 107.0), (101.5, 105.0), (103.0, 109.25)):
            recorder.add(report(started, ended))
    assert recorder.encoding_s == 109.25 - 101.5
