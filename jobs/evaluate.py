"""Score a model on a benchmark or a manifest.

    python jobs/evaluate.py --benchmark videomme --data /data/videomme
    python jobs/evaluate.py --model models:/crosslmm/7 --benchmark mvbench --data s3://bucket/mvbench --promote champion
    python jobs/evaluate.py --model runs/first-try/model --manifest held-out.jsonl

Asks the questions on the Ray cluster that it finds, or on one that it starts. Each video is encoded once for all its
questions. The same command resumes an evaluation that was stopped. Prints a table; the last line of the output is one
JSON object with the result. MLflow gets the score on a run of its own and on the model version.

Exit status: 0 scored; 1 failed, or so many questions could not be asked that there is no score; 3 scored, but not
better, so not promoted; 130 stopped (the same command resumes it); 2 the request was refused.
"""

import dataclasses
import json
import sys

from crosslmm.cli import fail, print_error, start_job
from crosslmm.config import BadConfig

NOT_PROMOTED = 3
"""Exit status."""


def main() -> int:
    """Parse the arguments, evaluate, print the result."""
    from crosslmm.evaluate.settings import parse

    try:
        settings, overrides = parse(sys.argv[1:], str(__doc__))
        start_job(settings.name)
    except BadConfig as error:
        fail(error)
    # These take seconds to import: refuse invalid arguments first.
    from crosslmm.data.manifest import BadManifest
    from crosslmm.evaluate.asking.pipeline import EvaluationFailed
    from crosslmm.evaluate.questions.as_manifest import write_manifest
    from crosslmm.evaluate.questions.question import BadBenchmark
    from crosslmm.evaluate.questions.source import read_source
    from crosslmm.evaluate.run import run_evaluation
    from crosslmm.evaluate.table import print_table
    from crosslmm.storage import BadLocation, Unavailable
    from crosslmm.text import printable
    from crosslmm.tracking import quiet_mlflow

    quiet_mlflow()
    try:
        if settings.write_manifest:
            source = read_source(settings)
            rows = write_manifest(source, settings.write_manifest)
            keys = f"--data.validation_manifest {settings.write_manifest} --data.roots [{source.uri}]"
            print(printable(f"{rows} rows, for {keys}"))
            return 0
        result = run_evaluation(settings, overrides)
    except (BadConfig, BadManifest, BadBenchmark, BadLocation) as error:
        fail(error)
    except (SystemExit, KeyboardInterrupt):
        print("stopped; the same command resumes it", file=sys.stderr)
        return 130
    except (EvaluationFailed, ConnectionError, Unavailable) as error:
        print_error(error)
        return 1
    print_table(result)
    print(json.dumps(dataclasses.asdict(result)))
    if result.accuracy is None:
        print_error(f"{result.counts['unreadable']} of {result.questions} questions could not be asked: no score")
        return 1
    return NOT_PROMOTED if result.promoted is False else 0


if __name__ == "__main__":
    raise SystemExit(main())
