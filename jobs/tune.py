"""Search for the fewest tokens that are enough, or for the best values of anything else in the configuration.

    python jobs/tune.py --config tiny --config tiny-sweep --space joint --trials 12 --promote best
    python jobs/tune.py --config my-run.yaml --space my_space.py --name how-few --dollars 500 --price 3

Each trial is a training run of the configuration with one point of the space on top. Videos are encoded once if that
pays, trials that fall behind are stopped early, and a report shows accuracy against compute. The same command with the
same --name continues a sweep. The last line of the output is one JSON object with the result.

Exit status: 0 finished; 1 no trial finished; 130 stopped (the same --name continues); 2 the request was refused.
"""

import dataclasses
import json
import sys
from pathlib import Path

from jsonargparse import ArgumentParser

from crosslmm.cli import fail, parse_job, print_error, start_job
from crosslmm.config import BadConfig

SPACES = Path(__file__).parent.parent / "tune_spaces"


def main() -> int:
    """Parse the arguments, search, print the result."""
    from crosslmm.sweep.settings import SweepSettings

    names = ", ".join(sorted(path.stem for path in SPACES.glob("*.py") if path.stem != "__init__"))

    def add_own(parser: ArgumentParser) -> None:
        text = f"Search space: {names}, or a Python file with a function space(config)."
        parser.add_argument("--space", default="joint", metavar="NAME_OR_FILE", help=text)
        parser.add_class_arguments(SweepSettings, fail_untyped=False)

    try:
        config, own = parse_job(sys.argv[1:], str(__doc__), add_own)
        start_job(config.name)
        space_name = own.pop("space")
        settings = SweepSettings(**own)
        settings.check(config)
        from crosslmm.sweep.space import load  # takes seconds: refuse invalid arguments first

        space = load(space_name, SPACES, config)
    except BadConfig as error:
        fail(error)
    import optuna

    from crosslmm.data.manifest import BadManifest
    from crosslmm.encode.run import EncodingFailed
    from crosslmm.lease import LeaseLost
    from crosslmm.storage import BadLocation, Unavailable
    from crosslmm.sweep.run import run_sweep
    from crosslmm.sweep.tuner import SweepFailed
    from crosslmm.tracking import quiet_mlflow

    quiet_mlflow()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        result = run_sweep(config, settings, space_name, space)
    except (BadConfig, BadManifest, BadLocation) as error:
        fail(error)
    except (SystemExit, KeyboardInterrupt):
        print("stopped; the same --name continues the sweep", file=sys.stderr)
        return 130
    except (LeaseLost, SweepFailed, EncodingFailed, Unavailable) as error:
        print_error(error)
        return 1
    print(json.dumps(dataclasses.asdict(result)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
