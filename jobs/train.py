"""Train CrossLMM.

    python jobs/train.py                                                       # the tiny preset on generated clips
    python jobs/train.py --data.manifest clips.jsonl --name first-try          # your own videos
    python jobs/train.py --config paper-2b --config stage-1 --data.manifest s3://bucket/train.jsonl
    python jobs/train.py --hours 8 --dollars 500 --price 3                     # what it may cost
    python jobs/train.py --evaluate mvbench --evaluate_data /data/mvbench      # and score the model
    ray job submit --address http://HEAD:8265 --runtime-env cluster/runtime-env.yaml --submission-id first-try-1 -- \\
        python jobs/train.py --storage s3://bucket/runs --name first-try

Uses the Ray cluster that it finds, or starts one. The same command with the same --name resumes the run. The last
line of the output is one JSON object with the result.

Exit status: 0 trained and registered; 1 failed, 130 stopped or out of budget (the same --name resumes both); 2 the
request was refused.
"""

import dataclasses
import json
import os
import sys

from jsonargparse import ArgumentParser

from crosslmm.cli import fail, parse_job, print_error, start_job
from crosslmm.config import BadConfig
from crosslmm.planning.budget import Budget


def main() -> int:
    """Parse the arguments, train, print the result."""
    try:
        config, own = parse_job(sys.argv[1:], str(__doc__), _add_own)
        benchmark, benchmark_folder = own.pop("evaluate"), own.pop("evaluate_data")
        budget = Budget(**own)
        budget.check_budget()
        start_job(config.name)
    except BadConfig as error:
        fail(error)
    # These take seconds to import: refuse invalid arguments first.
    import ray

    from crosslmm.data.manifest import BadManifest
    from crosslmm.evaluate.after_training import evaluation_of
    from crosslmm.evaluate.asking.pipeline import EvaluationFailed
    from crosslmm.evaluate.questions.question import BadBenchmark
    from crosslmm.lease import LeaseLost
    from crosslmm.storage import BadLocation
    from crosslmm.tracking import quiet_mlflow
    from crosslmm.train.launcher import OutOfBudget, TrainingFailed
    from crosslmm.train.run import run_training

    quiet_mlflow()
    try:
        evaluate = evaluation_of(benchmark, benchmark_folder, config)
        result = dataclasses.asdict(run_training(config, budget=budget))
        if evaluate:
            result["evaluation"] = dataclasses.asdict(evaluate(result["model_uri"]))
    except (BadConfig, BadManifest, BadBenchmark, BadLocation) as error:
        fail(error)
    except (SystemExit, KeyboardInterrupt):
        print(
            "stopped; the same command goes on from the last checkpoint, if there is one", file=sys.stderr, flush=True
        )
        # Threads of Ray and MLflow may be in native code, which does not survive the interpreter's shutdown.
        ray.shutdown()
        os._exit(130)
    except OutOfBudget as error:
        print(error, file=sys.stderr)
        return 130
    # OSError: the store is down when the driver itself needs it.
    except (LeaseLost, TrainingFailed, EvaluationFailed, OSError) as error:
        print_error(error)
        return 1
    print(json.dumps(result))
    return 0


def _add_own(parser: ArgumentParser) -> None:
    text = "Benchmark on which the registered model is scored; docs/evaluation.md lists them."
    parser.add_argument("--evaluate", metavar="BENCHMARK", help=text)
    parser.add_argument("--evaluate_data", metavar="FOLDER", help="Folder of the benchmark (path or s3:// URI).")
    parser.add_class_arguments(Budget, fail_untyped=False)


if __name__ == "__main__":
    raise SystemExit(main())
