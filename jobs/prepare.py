"""Write the sample set: short H.264 clips of moving shapes, with questions, into a folder or an s3:// URI."""

from typing import Annotated

from jsonargparse import auto_cli
from pydantic import Field

from crosslmm.data.shapes import write_sample_set


def prepare(
    folder: str,
    train: Annotated[int, Field(ge=4)] = 3000,
    held_out: Annotated[int, Field(ge=4)] = 160,
    seed: int = 0,
) -> None:
    """Write the sample set: short H.264 clips of moving shapes, with questions about colour, shape, motion and order.

    Args:
        folder: path or s3:// URI that gets the clips, train.jsonl and held_out.jsonl.
        train: clips to train on.
        held_out: clips to validate with, drawn apart from those.
        seed: the same seed gives the same bytes.
    """
    write_sample_set(folder, train, held_out, seed)
    print(f"{folder}: {train} clips in train.jsonl, {held_out} in held_out.jsonl")


if __name__ == "__main__":
    auto_cli(prepare, as_positional=True)
