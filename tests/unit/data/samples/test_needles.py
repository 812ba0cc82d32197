"""The sample set of needles."""

from collections import Counter

import numpy as np
import pytest

from crosslmm.config import DataConfig
from crosslmm.data.manifest import Manifest
from crosslmm.data.samples import needles
from crosslmm.data.samples.needles import COLOURS, NEEDLES, chance, haystack, insert, question, write_needles
from crosslmm.data.video.decode import decode_video


def test_a_frame_of_the_haystack_depends_on_its_number_alone():
    whole = haystack(3, range(40), 48)
    assert np.array_equal(whole[7:9], haystack(3, [7, 8], 48))
    assert len({frame.tobytes() for frame in whole}) == 40
    assert not np.array_equal(whole[0], haystack(4, [0], 48)[0])


@pytest.mark.parametrize("side", [48, 50, 224])
def test_a_plate_covers_a_ninth_of_a_frame(side):
    (frame,) = haystack(0, [0], side)
    for colour in NEEDLES:
        changed = (insert(frame, colour, np.random.default_rng(1)) != frame).any(axis=-1)
        assert changed.mean() == pytest.approx(1 / 9, abs=0.03)
    assert frame.shape == (side, side, 3)


def test_no_cell_of_noise_is_as_saturated_as_a_plate():
    noise = haystack(0, range(200), 48).astype(int)
    plates = np.array([COLOURS[colour] for colour in NEEDLES])
    assert np.ptp(noise, axis=-1).max() < np.ptp(plates, axis=-1).min()


def test_the_mean_of_a_frame_hides_a_plate():
    frames = haystack(0, range(200), 48)
    rng = np.random.default_rng(0)
    moved = [np.abs(insert(frame, "red", rng).mean((0, 1)) - frame.mean((0, 1))).max() for frame in frames]
    assert np.mean(moved) < frames.mean((1, 2)).std(0).min()


def test_clips_show_what_the_answers_say(tmp_path):
    write_needles(str(tmp_path), train=4, held_out=12)
    rows = Manifest(str(tmp_path / "held_out.jsonl")).rows
    assert Counter(row["kind"] for row in rows) == {"1 hop": 6, "2 hops": 6}
    for row in rows:
        frames = decode_video(row["videos"][0], DataConfig(num_frames=4), needles.SIDE).images
        seen = []
        for frame in frames:
            cells = frame.reshape(6, 8, 6, 8, 3).mean((1, 3))
            y, x = np.unravel_index(np.ptp(cells, axis=-1).argmax(), (6, 6))
            if np.ptp(cells[y, x]) > 110:
                seen.append(min(NEEDLES, key=lambda name: np.abs(cells[y, x] - COLOURS[name]).sum()))
        asked, answer = (message["content"] for message in row["messages"])
        assert question(seen) == (asked[-1]["text"], answer)


def test_chance():
    assert (chance(1), chance(2)) == (1 / 4, 1 / 3)
