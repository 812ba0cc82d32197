"""Write a sample set: short H.264 clips with questions, into a folder or an s3:// URI."""

from typing import Annotated, Literal

from jsonargparse import auto_cli
from pydantic import Field

from crosslmm.data.digits import write_digits
from crosslmm.data.shapes import write_sample_set


def prepare(
    folder: str,
    train: Annotated[int, Field(ge=4)] = 3000,
    held_out: Annotated[int, Field(ge=4)] = 160,
    seed: int = 0,
    kind: Literal["shapes", "digits"] = "shapes",
) -> None:
    """Write a sample set: short H.264 clips with questions.

    Args:
        folder: path or s3:// URI that gets the clips, train.jsonl and held_out.jsonl.
        train: clips to train on.
        held_out: clips to validate with, drawn apart from those.
        seed: the same seed gives the same bytes.
        kind: moving shapes, with questions about colour, shape, motion and order; or small handwritten digits, which
            need scikit-learn.
    """
    write = {"shapes": write_sample_set, "digits": write_digits}[kind]
    write(folder, train, held_out, seed)
    print(f"{folder}: {train} clips in train.jsonl, {held_out} in held_out.jsonl")


if __name__ == "__main__":
    auto_cli(prepare, as_positional=True)
