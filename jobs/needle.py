"""Search for needles in long videos: coloured plates in a few frames among up to 10,000, at every depth.

    python jobs/needle.py
    python jobs/needle.py --model runs/needles/model --frames [64,256,1024] --hops [1] --videos 20
    python jobs/needle.py --haystack [film-1.mp4,film-2.mp4] --t2v false

Videos are noise, or files of one's own, shown one after the other. Their frames are encoded once, into a local file,
and every cross-attention reads them from there a chunk at a time, so that length costs no device memory but that of the
pooled tokens. Prints a table of accuracy, seconds and memory; writes the same as a page and to MLflow. The last line of
the output is one JSON object. The same command resumes a search that was stopped.

Exit status: 0 done; 1 MLflow did not answer (the same command records what was found); 2 the request was refused; 130
stopped.
"""

import dataclasses
import json
import sys

from crosslmm.cli import fail, print_error, start_job
from crosslmm.config import BadConfig


def main() -> int:
    """Parse the arguments, search, print the result."""
    from crosslmm.evaluate.needle.settings import parse

    try:
        settings, tracking = parse(sys.argv[1:], str(__doc__))
        start_job(settings.name)
    except BadConfig as error:
        fail(error)
    # These take seconds to import: refuse invalid arguments first.
    from crosslmm.evaluate.needle.run import run_search
    from crosslmm.storage import BadLocation, Unavailable
    from crosslmm.tracking import quiet_mlflow

    quiet_mlflow()
    try:
        result = run_search(settings, tracking)
    except (BadConfig, BadLocation) as error:
        fail(error)
    except (SystemExit, KeyboardInterrupt):
        print("stopped; the same command resumes it", file=sys.stderr)
        return 130
    except (ConnectionError, Unavailable) as error:
        print_error(error)
        return 1
    print(json.dumps(dataclasses.asdict(result)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
