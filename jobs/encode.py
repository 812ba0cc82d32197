"""Encode every video once, so that training reads features instead of videos.

    python jobs/encode.py --config my-run.yaml --features.folder s3://bucket/features
    python jobs/train.py --config my-run.yaml --data.features FOLDER_THAT_ENCODE_PRINTED
    ray job submit --address http://HEAD:8265 --runtime-env cluster/runtime-env.yaml -- \\
        python jobs/encode.py --config my-run.yaml

Decodes each video of the manifests as jobs/train.py would with this configuration, runs the frozen vision encoder and
stores its features. Prints the number of videos, the size and the price before it starts, and skips videos that the
folder already holds. The last line of the output is one JSON object with the result.

Exit status: 0 encoded (quarantine.jsonl in the folder lists unreadable videos); 1 failed, 130 stopped (the same command
resumes both); 2 the request was refused.
"""

import dataclasses
import json
import sys

from jsonargparse import ArgumentParser

from crosslmm.cli import fail, parse_job, print_error, start_job
from crosslmm.config import BadConfig


def main() -> int:
    """Parse the arguments, encode, print the result."""
    from crosslmm.data.feature_format import FeatureConfig

    def add_own(parser: ArgumentParser) -> None:
        parser.add_class_arguments(FeatureConfig, "features", fail_untyped=False)

    try:
        config, own = parse_job(sys.argv[1:], str(__doc__), add_own)
        start_job(config.name)
    except BadConfig as error:
        fail(error)
    from crosslmm.data.manifest import BadManifest
    from crosslmm.encode.run import EncodingFailed, run_encoding
    from crosslmm.lease import LeaseLost
    from crosslmm.storage import BadLocation, Unavailable

    try:
        result = run_encoding(config, FeatureConfig(**own["features"]))
    except (BadConfig, BadManifest, BadLocation) as error:
        fail(error)
    except (SystemExit, KeyboardInterrupt):
        print("stopped; the same command resumes where it stopped", file=sys.stderr)
        return 130
    except (LeaseLost, EncodingFailed, Unavailable) as error:
        print_error(error)
        return 1
    print(json.dumps(dataclasses.asdict(result)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
