"""What a job that encodes says of itself."""

import io

from rich.console import Console

from crosslmm.config import DataConfig
from crosslmm.encode.run import _Record


def block(began, ended):
    return {"stored": [], "bad": [], "lost": 0.0, "whole": 0.0, "began": began, "ended": ended}


def test_encoding_takes_from_the_first_block_to_the_last_whatever_order_they_come_in(tmp_path):
    record = _Record(str(tmp_path), {}, DataConfig(), Console(file=io.StringIO()))
    assert record.encoding_s == 0
    with record:
        for began, ended in ((104.0, 107.0), (101.5, 105.0), (103.0, 109.25)):
            record.take(block(began, ended))
    assert record.encoding_s == 109.25 - 101.5
