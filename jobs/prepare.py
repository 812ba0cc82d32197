"""Make manifests ready for training.

    python jobs/prepare.py sample data                                      write a small set of clips with questions
    python jobs/prepare.py validate s3://bucket/train.jsonl                 count malformed rows, write nothing
    python jobs/prepare.py convert s3://bucket/train.jsonl s3://bucket/train    check rows, probe videos, write a folder
    python jobs/prepare.py requeue s3://bucket/train                        retry unreadable videos

Each command has its own --help. Commands on manifests use the Ray cluster that they find, or start one on this machine;
on a cluster: ray job submit -- python jobs/prepare.py ... The last line of stdout is JSON, except that of sample.
Exit status: 0 done, 1 rows are malformed or the command failed, 130 stopped (after 1 and 130 the same command resumes),
2 bad request.
"""

import sys

from crosslmm.cli import fail, print_error, start_job
from crosslmm.config import BadConfig
from crosslmm.data.ingest.commands import parse


def main() -> int:
    """Parse, call, print."""
    try:
        command, arguments = parse(sys.argv[1:], str(__doc__))
        start_job()
    except BadConfig as error:
        fail(error)
    # Imported late: these take seconds, and --help needs none of them.
    from crosslmm.data.ingest.ray_tasks import IngestError
    from crosslmm.data.manifest import BadManifest
    from crosslmm.data.quarantine import TooManyUnreadable
    from crosslmm.lease import LeaseLost
    from crosslmm.storage import BadLocation

    try:
        status, line = command(**arguments)
    except (BadConfig, BadManifest, BadLocation) as error:
        fail(error)
    except (SystemExit, KeyboardInterrupt):
        print("stopped; the same command resumes", file=sys.stderr)
        return 130
    except (LeaseLost, IngestError, TooManyUnreadable, OSError) as error:
        print_error(error)
        return 1
    print(line)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
