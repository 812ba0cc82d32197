"""lmms-eval, really run with this package's model: the same answers and the same score as jobs/evaluate.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.benchmark_folders import FOLDERS
from tests.support.common import ROOT
from tests.support.evaluations import export_model

pytestmark = [pytest.mark.harness, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1200)]

# The task of lmms-eval 0.7.3 with its own functions, reading a local table instead of the hub's.
TASK = """
task: local_videomme
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {table}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.videomme_doc_to_visual
doc_to_text: !function functions.videomme_doc_to_text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 16, temperature: 0, top_p: 1.0, num_beams: 1, do_sample: false}}
process_results: !function functions.videomme_process_results
metric_list:
  - metric: videomme_perception_score
    aggregation: !function functions.videomme_aggregate_results
    higher_is_better: true
lmms_eval_specific_kwargs:
  default: {{pre_prompt: "", post_prompt: "\\nAnswer with the option's letter from the given choices directly."}}
"""


@pytest.fixture(scope="module")
def folder(config, processor, tmp_path_factory):
    """A folder with the exported tiny model and the task; the benchmark lies where lmms-eval looks for it."""
    folder = tmp_path_factory.mktemp("harness")
    (folder / "model").mkdir()
    export_model(config, processor, folder / "model", seed=1)
    data = Path(os.environ["HF_HOME"], "videomme")
    FOLDERS["videomme"](data)
    (folder / "task").mkdir()
    (folder / "task" / "functions.py").write_text("from lmms_eval.tasks.videomme.utils import *\n")
    (folder / "task" / "task.yaml").write_text(TASK.format(table=data / "videomme" / "test-00000-of-00001.parquet"))
    return folder


def run(*command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_both_ways_give_the_same_answers_and_score(folder):
    run(
        "-m", "lmms_eval", "--model", "crosslmm", "--model_args", f"pretrained={folder}/model,device=cpu",
        "--tasks", "local_videomme", "--include_path", str(folder / "task"), "--batch_size", "1", "--log_samples",
        "--output_path", str(folder / "theirs"),
    )  # fmt: skip
    (samples,) = (folder / "theirs").rglob("*samples_local_videomme.jsonl")
    (results,) = (folder / "theirs").rglob("*results.json")
    theirs = {}
    for line in samples.read_text().splitlines():
        row = json.loads(line)
        answer = row["filtered_resps"]  # a list, or the text itself
        theirs[row["doc_id"]] = answer if isinstance(answer, str) else answer[0]
    stdout = run(
        "jobs/evaluate.py", "--benchmark=videomme", f"--data={os.environ['HF_HOME']}/videomme",
        f"--model={folder}/model", f"--storage={folder}/runs", f"--tracking.uri=sqlite:///{folder}/mlflow.db",
    )  # fmt: skip
    result = json.loads(stdout.splitlines()[-1])
    lines = [json.loads(line) for line in Path(result["folder"], "answers.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in lines] == [theirs[line["number"]] for line in lines]
    assert len({line["prediction"] for line in lines}) >= 3
    scored = json.loads(results.read_text())["results"]["local_videomme"]["videomme_perception_score,none"]
    assert 100 * result["accuracy"]["value"] == pytest.approx(scored)
