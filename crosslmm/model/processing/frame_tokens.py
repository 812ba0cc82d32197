"""Placeholders of videos -> the tokens of their frames, after the time of each frame if the model reads times."""

import math
from collections.abc import Callable, Sequence

from crosslmm.model.processing.media import Kind

STAMP = "<{:.1f} seconds>"
"""Text before a frame's pooled tokens, as in Qwen3-VL; the time is counted from the beginning of the video [s]."""

Times = Sequence[float]
"""When each frame of a video is shown, counted from its beginning [s]."""


class FrameTokens:
    """What the placeholder of a video becomes.

    Args:
        placeholder: id of `<|video_pad|>`.
        per_frame: pooled tokens per frame.
        write: returns the token ids of a stamp; None: frames have none.
    """

    def __init__(self, placeholder: int, per_frame: int, write: Callable[[str], list[int]] | None) -> None:
        self.placeholder, self.per_frame, self.write = placeholder, per_frame, write

    def expand(
        self, ids: Sequence[int], targets: Sequence[int], num_frames: Sequence[int], times: Sequence[Times | None]
    ) -> tuple[list[int], list[int]]:
        """Replace each placeholder by the tokens of its frames, and repeat its entry in `targets` as often.

        Args:
            ids: token ids with one placeholder per video.
            targets: an entry for each of them.
            num_frames: frames of each video.
            times: of each, see `require_times`.
        """
        videos = iter(zip(num_frames, times, strict=True))
        tokens: list[int] = []
        is_target: list[int] = []
        for token, target in zip(ids, targets, strict=True):
            run = self._of_video(*next(videos)) if token == self.placeholder else [token]
            tokens += run
            is_target += [target] * len(run)
        return tokens, is_target

    def _of_video(self, frames: int, times: Times | None) -> list[int]:
        pooled = [self.placeholder] * self.per_frame
        if times is None or self.write is None:
            return pooled * frames
        return [token for time in times for token in [*self.write(STAMP.format(time)), *pooled]]

    def require_times(
        self, kinds: Sequence[Kind], num_frames: Sequence[int], times: Sequence[Times | None] | None
    ) -> list[Times | None]:
        """Return the times that are written: none of images, and none at all if frames have no stamps.

        Args:
            kinds: which of the videos are images.
            num_frames: frames of each.
            times: of each, as far as they are known.

        Raises:
            ValueError: those of a video are unknown, or not as many as its frames.
        """
        if self.write is None:
            return [None] * len(kinds)
        known = list(times or [None] * len(kinds))
        if len(known) != len(kinds):
            raise ValueError(f"times are given for {len(known)} videos and images, and there are {len(kinds)}")
        return [
            None if kind == "image" else _checked(of_video, count, i)
            for i, (kind, count, of_video) in enumerate(zip(kinds, num_frames, known, strict=True), start=1)
        ]


def _checked(times: Times | None, frames: int, number: int) -> Times:
    if times is None:
        raise ValueError(
            f"this model reads the time of each frame, and nothing says those of video {number}: give times, the "
            "seconds at which its frames are shown"
        )
    if len(times) != frames or not all(math.isfinite(time) and time >= 0 for time in times):
        raise ValueError(
            f"times of video {number} are {len(times)} values for {frames} frames; give one number of seconds, at "
            "least 0, for each"
        )
    return times
