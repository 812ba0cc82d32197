"""Search how few tokens are enough: python jobs/tune.py --config ... --space joint --trials 32 --promote best.

Each trial is a training run (jobs/train.py) of the configuration with a point of the space laid over it. Videos are
encoded once where that pays, trials that fall behind are stopped early, and at the end a page shows accuracy against
compute. --space takes a name in tune_spaces/ or a Python file of your own.
On a cluster: ray job submit -- python jobs/tune.py ...
Exit status: 0 searched, 1 no trial came to its end, 130 it was stopped (the same --name goes on in both), 2 the request
was refused.
"""

import dataclasses
import json
import sys
from pathlib import Path

from jsonargparse import ArgumentParser

from crosslmm.cli import fail, parse_job, stop_on_sigterm
from crosslmm.config import BadConfig

SPACES = Path(__file__).parent.parent / "tune_spaces"


def main() -> int:
    """Parse, search, print."""
    from crosslmm.sweep.settings import SweepSettings
    from crosslmm.sweep.space import load

    names = ", ".join(sorted(path.stem for path in SPACES.glob("*.py") if path.stem != "__init__"))

    def add_own(parser: ArgumentParser) -> None:
        told = f"what is searched: {names}, or a Python file with a function space(config)"
        parser.add_argument("--space", default="joint", metavar="NAME_OR_FILE", help=told)
        parser.add_class_arguments(SweepSettings, fail_untyped=False)

    try:
        config, own = parse_job(sys.argv[1:], str(__doc__), add_own)
        space_name = own.pop("space")
        chosen = SweepSettings(**own)
        chosen.check(config)
        space = load(space_name, SPACES, config)
    except BadConfig as error:
        fail(error)
    from crosslmm.data.manifest import BadManifest
    from crosslmm.encode.run import EncodingFailed
    from crosslmm.storage import BadLocation, Unavailable
    from crosslmm.sweep.run import run_sweep
    from crosslmm.sweep.tuner import SweepFailed

    stop_on_sigterm()
    try:
        outcome = run_sweep(config, chosen, space_name, space)
    except (BadConfig, BadManifest, BadLocation) as error:
        fail(error)
    except (SystemExit, KeyboardInterrupt):
        print("stopped; the same --name goes on with the sweep", file=sys.stderr)
        return 130
    except (SweepFailed, EncodingFailed, Unavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(dataclasses.asdict(outcome)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
