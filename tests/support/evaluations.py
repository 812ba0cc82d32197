"""Evaluations made up from replies, without a model; and a model that answers with letters, without training."""

from pathlib import Path

import torch

from crosslmm.config import RunConfig
from crosslmm.data.thumbnails import strip
from crosslmm.evaluate.asking.blocks import VideoRows
from crosslmm.evaluate.benchmarks import BENCHMARKS
from crosslmm.evaluate.evaluated import ModelEvaluation
from crosslmm.evaluate.evaluation_folder import EvaluationFolder
from crosslmm.evaluate.questions.folder import Folder
from crosslmm.evaluate.questions.source import Source
from crosslmm.evaluate.scores.judging import Reply, judge, score
from crosslmm.model import CrossLMMForConditionalGeneration, CrossLMMProcessor
from crosslmm.model.loading import build_model
from tests.support.benchmark_folders import FOLDERS, PREDICTIONS
from tests.support.common import open_gates, random_frames
from tests.support.exports import save_exported

IDENTITY = {
    "model": "models:/crosslmm/7", "model_sha256": "ab" * 32, "benchmark": "", "data_sha256": "cd" * 32,
    "questions_sha256": "ef" * 32, "num_frames": 4, "sampling": "uniform", "fps": 1.0, "decoder": "auto",
    "max_new_tokens": 16, "likelihood": False,
}  # fmt: skip


def source(name: str, folder: Path) -> Source:
    """Write the made-up folder of a benchmark, and read it."""
    FOLDERS[name](folder)
    opened = Folder(str(folder))
    return Source(name, BENCHMARKS[name].read(opened), BENCHMARKS[name], opened.uri, opened.digest, opened.roots)


def replies(source: Source, texts=PREDICTIONS, unreadable=()) -> list[Reply]:
    """Return a reply to each question: the texts in turn, and no frames of those that are unreadable."""
    times = [[0.0, 0.25, 0.5, 0.75]]
    return [
        Reply(error="no such file") if i in unreadable else Reply(texts[i % len(texts)], times=times, seconds=0.1)
        for i in range(len(source.questions))
    ]


def evaluated(
    source: Source, storage: Path, given: list[Reply], name: str = "evaluation", limit: float = 0.005
) -> ModelEvaluation:
    """Return an evaluation with these replies, with strips of frames in its folder."""
    folder = EvaluationFolder(str(storage), name)
    begun = folder.begin(IDENTITY | {"benchmark": source.benchmark.name}, 32)
    rows = VideoRows(source.questions, source.uri, source.roots)
    strips = {str(i): strip([random_frames(4, i)]) for i in range(len(rows.groups))}
    folder.write_block(0, list(enumerate(given)), strips)
    answers = [
        judge(i, question, reply, source.benchmark)
        for i, (question, reply) in enumerate(zip(source.questions, given, strict=True))
    ]
    scored = score(answers, source.benchmark)
    return ModelEvaluation(
        "models:/crosslmm/7", None, folder, begun, answers, scored, scored.unreadable <= limit, asked=len(answers)
    )


def export_model(config: RunConfig, processor: CrossLMMProcessor, folder: Path, seed: int = 0) -> Path:
    """Export the tiny model with random weights and open gates, which says letters that depend on the frames."""
    model = build_model(config.model, processor, seed=seed)
    open_gates(model)
    _say_letters(model, processor)
    save_exported(folder, model, processor, config)
    return folder


@torch.no_grad()
def _say_letters(model: CrossLMMForConditionalGeneration, processor: CrossLMMProcessor) -> None:
    """Make the rows of the letters in the output projection, which are their embeddings too, those directions in which
    the last hidden states of different questions about different frames differ most."""
    side = processor.image_size
    conversations = [
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": f"{i}?"}]}] for i in range(12)
    ]
    frames = [[random_frames(4, i, side)] for i in range(12)]
    hidden = []
    handle = model.language_model.model.norm.register_forward_hook(lambda *call: hidden.append(call[-1][:, -1]))
    for _ in range(3):  # changed embeddings change the hidden states
        hidden.clear()
        model(**processor(conversations, frames, for_generation=True), logits_to_keep=1)
        states = hidden[0]
        directions = torch.linalg.svd(states - states.mean(0))[2][:2]
        mean = torch.nn.functional.normalize(states.mean(0), dim=0)
        directions = directions - (directions @ mean)[:, None] * mean
        for letter, row in zip("ABCD", torch.cat([directions, -directions]), strict=True):
            model.get_input_embeddings().weight[processor.tokenizer.encode(letter)[0]] = 20 * row
    handle.remove()
