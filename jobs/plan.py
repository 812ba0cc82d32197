"""Predict memory, time and price of a run before renting machines.

    python jobs/plan.py                                                        # paper-2b at its own number of frames
    python jobs/plan.py --config paper-2b --config stage-2 --frames 64,128 --gpu h100 --gpus 8
    python jobs/plan.py --config tiny --json

Takes the configuration of jobs/train.py. Needs no GPU and no weights: the model runs on the meta device. If the run
does not fit the GPU's memory, the nearest setting that fits is printed.

Exit status: 0 planned (whether it fits or not); 2 the request was refused.
"""

import dataclasses
import json
import sys

from jsonargparse import ArgumentParser
from pydantic import ValidationError
from rich.console import Console

from crosslmm.cli import fail, parse_job
from crosslmm.config import BadConfig, validate_run
from crosslmm.text import first_error


def main() -> int:
    """Parse the arguments, plan, and print the plan."""
    from crosslmm.planning.assumptions import Assumptions

    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("--frames", type=str, metavar="N[,N...]",
                            help="frames per video, one column each (default: data.num_frames)")  # fmt: skip
        parser.add_argument("--gpus", type=int, metavar="N", help="number of GPUs; short for --scaling.num_workers")
        parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
        parser.add_class_arguments(Assumptions, fail_untyped=False)

    try:
        config, arguments = parse_job(sys.argv[1:], str(__doc__), add_arguments, default="paper-2b")
        frames, gpus, as_json = arguments.pop("frames"), arguments.pop("gpus"), arguments.pop("json")
        if gpus is not None:
            values = config.model_dump()
            values["scaling"]["num_workers"] = gpus
            config = validate_run(values)
        counts = [config.data.num_frames] if frames is None else frame_counts(frames)
        assumptions = Assumptions(**arguments)
        # These import torch: refuse invalid arguments first.
        from crosslmm.planning.plan import plan
        from crosslmm.planning.report import print_plan

        with Console(stderr=True).status("Tracing the model on the meta device, about 30 s for each number of frames"):
            planned = plan(config, counts, assumptions)
    except ValidationError as error:
        fail(BadConfig(first_error(error)))
    except BadConfig as error:
        fail(error)
    if as_json:
        print(json.dumps(dataclasses.asdict(planned)))
    else:
        print_plan(planned, Console(width=None if sys.stdout.isatty() else 120, highlight=False))
    return 0


def frame_counts(text: str) -> list[int]:
    """Parse "32,64" to [32, 64].

    Raises:
        BadConfig: `text` is not a comma-separated list of whole numbers of at least 1.
    """
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(counts) < 1:
        raise BadConfig(f"--frames {text}: expected a number of at least 1, or several as in 32,64")
    return counts


if __name__ == "__main__":
    raise SystemExit(main())
