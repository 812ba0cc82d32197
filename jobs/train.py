"""Train CrossLMM: python jobs/train.py [--config NAME_OR_FILE_OR_URI] [--SECTION.KEY VALUE ...].

Without arguments it trains the `tiny` preset on sample data, on a Ray cluster that it finds or else starts here.
On a cluster: ray job submit -- python jobs/train.py ...
Exit status: 0 trained and registered, 1 the run broke off, 130 it was stopped (the same --name resumes it in both),
2 the request was refused.
"""

import dataclasses
import json
import os
import sys

from crosslmm.cli import fail, parse_run, stop_on_sigterm
from crosslmm.config import BadConfig, redacted


def main() -> int:
    """Parse, train, print."""
    try:
        config = parse_run(sys.argv[1:], description=str(__doc__))
    except BadConfig as error:
        fail(error)
    # Only now what takes seconds to import.
    import ray

    from crosslmm.data.manifest import BadManifest
    from crosslmm.storage import BadLocation
    from crosslmm.train.launcher import TrainingFailed
    from crosslmm.train.run import run_training

    stop_on_sigterm()
    try:
        outcome = run_training(config)
    except (BadConfig, BadManifest, BadLocation) as error:
        fail(error)
    except (SystemExit, KeyboardInterrupt):
        print("stopped; the same --name resumes the run from its last checkpoint", file=sys.stderr, flush=True)
        # Threads of Ray and of the record may be in native code, which does not survive the interpreter's end.
        ray.shutdown()
        os._exit(130)
    except (TrainingFailed, OSError) as error:  # the store may be away when the driver itself needs it
        print(f"error: {redacted(str(error))}", file=sys.stderr)
        return 1
    print(json.dumps(dataclasses.asdict(outcome)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
