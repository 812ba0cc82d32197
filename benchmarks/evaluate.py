"""What an evaluation costs beside a plain loop: python -m benchmarks.evaluate [--json].

`evaluate_over_plain`: questions per second of an evaluation on Ray (decoders in processes of their own, one actor with
    the model, replies written block by block) / those of a loop in one process that reads the same blocks one after the
    other, with the same decoder and the same batches. The model has one thread in both, which stands for one GPU.
    Encoder and decoder stand in the proportion of the 2B's, two questions a video. Both count from the end of the first
    block to that of the last one, for Ray's start takes its time once.
`eight_questions_over_one`: time for eight questions about a video of 32 frames / time for one, in the same proportions,
    answers of two tokens (a letter and the end); median of nine turns.
`memory_growth`: memory of the driver and of all processes of Ray (proportional set size) at the end of 2,000 questions
    about 1,000 videos / at their first quarter.

About ten minutes on two cores.
"""

import argparse
import json
import logging
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
from rich.table import Table

from benchmarks import report
from benchmarks.model import configurations
from crosslmm.cli import parse_run, start_job
from crosslmm.config import RunConfig, to_yaml, validate_run
from crosslmm.data.manifest import Manifest
from crosslmm.data.samples.clips import encode_clip
from crosslmm.data.video.decode import VideoFailure
from crosslmm.data.video.decode_pool import Decoder
from crosslmm.evaluate.asking.batch_answerer import BatchAnswerer, DecodedVideos
from crosslmm.evaluate.asking.blocks import VideoRows, videos_per_block
from crosslmm.evaluate.questions.manifest import read_manifest
from crosslmm.evaluate.questions.question import Question, about
from crosslmm.evaluate.run import EvaluationResult, run_evaluation
from crosslmm.evaluate.settings import EvaluationSettings, Overrides
from crosslmm.inference.answerer import Answerer
from crosslmm.model.loading import build_model, build_processor
from crosslmm.run_folder import MODEL_CONFIG_FILE
from crosslmm.tracking import quiet_mlflow

LIMITS = {"evaluate_over_plain": 0.9, "eight_questions_over_one": 1.5, "memory_growth": 1.1}
"""The first from below, the others from above."""
VIDEOS, QUESTIONS_PER_VIDEO, FRAMES = 96, 2, 4
LONG_FRAMES, TURNS = 32, 9
MANY = 2_000
SCALING = {
    "num_workers": 1, "use_gpu": False, "cpus_per_worker": 1.0, "decode_workers": 1, "cpus_per_decode_worker": 0.5,
}  # fmt: skip


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    start_job()
    torch.set_num_threads(1)
    quiet_mlflow()
    logging.getLogger("crosslmm").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        large, tiny = export(folder / "2b", proportions_of_2b()), export(folder / "tiny", parse_run([], ""))
        detail: dict[str, Any] = {}
        figures = {"eight_questions_over_one": eight_over_one(large, detail)}
        manifest = write_questions(folder / "some", VIDEOS)
        figures["evaluate_over_plain"] = over_plain(large, manifest, folder, detail)
        figures["memory_growth"] = memory_growth(tiny, write_questions(folder / "many", MANY // 2), folder, detail)
    table = Table("", "measured", "limit", title="evaluation")
    for name, limit in LIMITS.items():
        bound = f"{'>=' if name == 'evaluate_over_plain' else '<='} {limit}"
        table.add_row(name, f"{figures[name]:.3f}", bound)
    report("evaluate", table, figures, detail, arguments.json)


def proportions_of_2b() -> RunConfig:
    """Return a configuration whose encoder and decoder stand in the proportion of the 2B's."""
    vision, language = configurations("2b")
    values = parse_run([f"--data.num_frames={FRAMES}"], "").model_dump()
    language = language | {"max_position_embeddings": 4096}
    values["model"] |= {"vision": vision, "language": language, "pool_stride": 9, "cross_attention_every": 4}
    values["scaling"] |= SCALING
    return validate_run(values)


def export(folder: Path, config: RunConfig) -> Path:
    """Export a model with random weights."""
    config = config.model_copy(update={"scaling": config.scaling.model_copy(update=SCALING)})
    processor = build_processor(config.model)
    folder.mkdir()
    build_model(config.model, processor, seed=0).save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / MODEL_CONFIG_FILE).write_text(to_yaml(config))
    return folder


def write_questions(folder: Path, videos: int) -> Path:
    """Write clips of a second, and a manifest with two questions about each; the expected answers are short."""
    folder.mkdir()
    random = np.random.default_rng(0)
    clips = [
        encode_clip(np.repeat(random.integers(0, 256, (4, 64, 64, 3), dtype=np.uint8), 4, axis=0)) for _ in range(8)
    ]
    rows = []
    for i in range(videos):
        (folder / f"{i}.mp4").write_bytes(clips[i % 8])
        for k in range(QUESTIONS_PER_VIDEO):
            content = [{"type": "video"}, {"type": "text", "text": f"What is it, {i} {k}?"}]
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A"}]
            rows.append(json.dumps({"id": f"{i}-{k}", "video": f"{i}.mp4", "messages": messages}))
    (folder / "questions.jsonl").write_text("\n".join(rows))
    return folder / "questions.jsonl"


def eight_over_one(model: Path, detail: dict[str, Any]) -> float:
    """Return the time for eight questions about a video over that for one."""
    answerer = Answerer(model, "cpu")
    side = answerer.processor.image_size
    frames = np.random.default_rng(0).integers(0, 256, (LONG_FRAMES, side, side, 3), dtype=np.uint8)
    watched = DecodedVideos([frames], [np.arange(LONG_FRAMES, dtype=float)])
    asker = BatchAnswerer(answerer, max_new_tokens=2)
    questions = [Question(str(i), **about("video", f"What happens in the video, {i}?"), answer="A") for i in range(8)]
    seconds: dict[int, list[float]] = {1: [], 8: []}
    for _ in range(TURNS + 1):
        for count, times in seconds.items():
            began = time.perf_counter()
            asker([(watched, questions[:count])])
            times.append(time.perf_counter() - began)
    medians = {count: statistics.median(times[1:]) for count, times in seconds.items()}  # the first turn warms up
    detail["questions_s"] = medians
    return medians[8] / medians[1]


def evaluate(model: Path, manifest: Path, folder: Path, name: str) -> EvaluationResult:
    """Run an evaluation, as jobs/evaluate.py does."""
    settings = EvaluationSettings(model=str(model), manifest=str(manifest), name=name, max_new_tokens=2)
    tracking = {"uri": f"sqlite:///{folder}/mlflow.db", "artifacts": str(folder / "artifacts")}
    return run_evaluation(settings, Overrides({"storage": str(folder / "runs"), "tracking": tracking}))


def over_plain(model: Path, manifest: Path, folder: Path, detail: dict[str, Any]) -> float:
    """Return the rate of an evaluation over that of a plain loop; the two take turns."""
    rates: dict[str, list[float]] = {"evaluate": [], "plain": []}
    for turn in range(3):
        rates["plain"].append(plain_rate(model, manifest))
        rate = evaluate(model, manifest, folder, f"rate-{turn}").questions_per_s
        assert rate is not None
        rates["evaluate"].append(rate)
    detail["questions_per_s"] = rates
    return statistics.median(rates["evaluate"]) / statistics.median(rates["plain"])


def plain_rate(model: Path, manifest: Path) -> float:
    """Read and ask block by block in one process; return the rate after the first block [questions/s]."""
    answerer = Answerer(model, "cpu")
    asker = BatchAnswerer(answerer, max_new_tokens=2)
    opened = Manifest(str(manifest))
    rows = VideoRows(read_manifest(opened), opened.uri, opened.roots)
    size = videos_per_block(answerer.config.data, answerer.processor.image_size)
    ends: list[tuple[float, int]] = []
    with Decoder(answerer.config.data, answerer.processor.image_size) as decoder:
        for start in range(0, len(rows.groups), size):
            groups = rows.groups[start : start + size]
            videos = decoder([rows.questions[group[0]].videos[0] for group in groups])
            asked = [
                (DecodedVideos([video.images], [video.times]), [rows.questions[i] for i in group])
                for video, group in zip(videos, groups, strict=True)
                if not isinstance(video, VideoFailure)
            ]
            asker(asked)
            ends.append((time.perf_counter(), sum(map(len, groups))))
    return sum(count for _, count in ends[1:]) / (ends[-1][0] - ends[0][0])


def memory_growth(model: Path, manifest: Path, folder: Path, detail: dict[str, Any]) -> float:
    """Return the memory at the end of a long evaluation over that at its first quarter."""
    samples: list[tuple[int, int]] = []
    ended = threading.Event()
    blocks = folder / "runs" / "evaluations" / "memory" / "blocks"

    def watch() -> None:
        while not ended.wait(0.5):
            samples.append((len(list(blocks.glob("*.jsonl"))), memory_of_all()))

    ray.shutdown()  # a cluster of its own, so that nothing of earlier ones is counted
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        result = evaluate(model, manifest, folder, "memory")
    finally:
        ended.set()
        thread.join()
    done = max(count for count, _ in samples)
    quarter = [memory for count, memory in samples if done / 4 <= count < done / 2]
    last = [memory for count, memory in samples if 3 * done / 4 <= count < done]
    detail["memory_mb"] = {"quarter": statistics.median(quarter) / 1e6, "end": statistics.median(last) / 1e6}
    detail["memory_questions"] = result.questions
    return statistics.median(last) / statistics.median(quarter)


def memory_of_all() -> int:
    """Return the memory of this process and of all processes below it, shared memory counted once [bytes]."""
    total = 0
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it has ended
            continue
    return total


if __name__ == "__main__":
    main()
