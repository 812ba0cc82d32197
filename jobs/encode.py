"""Encode every video once: python jobs/encode.py --config ... --data.manifest ... --features.folder s3://bucket/features.

Decodes each video of the manifests as jobs/train.py would with this configuration, runs the frozen vision encoder, and
stores its features in the folder that it prints; jobs/train.py --data.features THAT_FOLDER then reads these instead of
videos. Videos, size, price and work are printed before it begins. What the folder has already is not made again.
On a cluster: ray job submit -- python jobs/encode.py ...
Exit status: 0 encoded (unreadable videos are named in the folder's quarantine.jsonl), 1 it broke off, 130 it was
stopped (the same command goes on in both), 2 the request was refused.
"""

import dataclasses
import json
import sys

from jsonargparse import ArgumentParser

from crosslmm.cli import fail, parse_job, start_job
from crosslmm.config import BadConfig


def main() -> int:
    """Parse, encode, print."""
    from crosslmm.data.feature_format import FeatureConfig

    def add_own(parser: ArgumentParser) -> None:
        parser.add_class_arguments(FeatureConfig, "features", fail_untyped=False)

    try:
        config, own = parse_job(sys.argv[1:], str(__doc__), add_own)
    except BadConfig as error:
        fail(error)
    from crosslmm.data.manifest import BadManifest
    from crosslmm.encode.run import EncodingFailed, run_encoding
    from crosslmm.storage import BadLocation, Unavailable

    start_job()
    try:
        outcome = run_encoding(config, FeatureConfig(**own["features"]))
    except (BadConfig, BadManifest, BadLocation) as error:
        fail(error)
    except (SystemExit, KeyboardInterrupt):
        print("stopped; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except (EncodingFailed, Unavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(dataclasses.asdict(outcome)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
