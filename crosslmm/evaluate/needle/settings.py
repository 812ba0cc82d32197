"""Settings of a search for needles: the arguments of jobs/needle.py."""

from collections.abc import Sequence
from typing import Annotated

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from pydantic import Field, ValidationError

from crosslmm.cli_help import print_help
from crosslmm.config import BadConfig, TrackingConfig, require_no_credentials
from crosslmm.config.schema import Count, Section
from crosslmm.data.samples.needles import MAX_HOPS
from crosslmm.text import first_error, one_line

COMMON = ("model", "frames", "depths", "hops", "videos", "haystack", "storage", "name", "tracking.uri")
"""Keys that a short --help shows."""

Depth = Annotated[float, Field(ge=0, le=100)]
Hops = Annotated[int, Field(ge=1, le=MAX_HOPS)]


class NeedleSettings(Section):
    """The search."""

    model: str = "models:/crosslmm@candidate"
    """Registered model (models:/NAME@ALIAS or models:/NAME/VERSION), or folder of an exported one (path or s3://)."""
    frames: list[Count] = Field(default=[64, 256, 1024, 4096, 10_000])
    """Lengths of the videos [frames]."""
    depths: list[Depth] = Field(default=[0.0, 25.0, 50.0, 75.0, 100.0])
    """Where the first needle is: 0 is the first frame, 100 the last one that leaves room for the others [%]."""
    hops: list[Hops] = Field(default=[1, 2])
    """Needles of a question; with several, it names the first one and asks for the last."""
    videos: Count = 12
    """Questions of a cell, each about a video with needles of its own; with 12, and one or two hops, each colour is the
    right answer equally often [questions]."""
    haystack: list[str] = Field(default=[])
    """Video files, shown one after the other (paths or s3:// URIs); empty: generated noise."""
    v2v: bool = True
    """False closes the gates of V2V."""
    t2v: bool = True
    """False closes the gates of T2V."""
    chunk_frames: Count = 64
    """Frames whose patches are on the device at once [frames]."""
    storage: str = "runs"
    """Folder of all runs (path or s3:// URI)."""
    scratch: str | None = None
    """Local folder for frames and features of the longest video, which are deleted at the end; null: the system's
    temporary folder."""
    device: str | None = None
    """Device to compute on; null: a GPU if there is one, else the CPU."""
    seed: int = 0
    """Seed of the noise, and of what the needles are."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)] | None = None
    """Name of the search; the same name resumes it. Null makes one of model and settings."""

    def check(self) -> None:
        """Raise BadConfig if the needles do not fit into the shortest video."""
        require_no_credentials("--storage", self.storage)
        if min(self.frames) < max(self.hops):
            raise BadConfig(f"--frames {min(self.frames)}: has no room for {max(self.hops)} needles (--hops)")


def parse(argv: Sequence[str], description: str) -> tuple[NeedleSettings, TrackingConfig]:
    """Parse a command line. `--help` prints and exits with 0.

    Raises:
        BadConfig: an argument is unknown or does not fit.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(NeedleSettings, fail_untyped=False)
    parser.add_class_arguments(TrackingConfig, "tracking", fail_untyped=False)
    if any(argument in ("-h", "--help") for argument in argv):
        print_help(parser, everything="all" in argv, defaults={}, common=COMMON)
        raise SystemExit(0)
    try:
        given = parser.parse_args(list(argv), defaults=False).as_dict()
        tracking = TrackingConfig.model_validate(given.pop("tracking", {}))
        settings = NeedleSettings.model_validate(given)
    except ArgumentError as error:
        raise BadConfig(one_line(str(error))) from error
    except ValidationError as error:
        raise BadConfig(first_error(error)) from None
    settings.check()
    return settings, tracking
