"""An exported model -> answers about videos."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from rich.progress import track
from transformers import AutoModelForImageTextToText, AutoProcessor, EncoderDecoderCache

import crosslmm.model  # noqa: F401  registers the model with the Auto classes
from crosslmm.config import validate_run
from crosslmm.data.manifest import Manifest
from crosslmm.data.video.decode_pool import Decoder, Unreadable

transformers.logging.disable_progress_bar()

CONFIG = "run.yaml"
"""Beside the weights: the configuration that they were trained with, frames per video included."""


class Answerer:
    """Loads a folder that `crosslmm.train.checkpoint.export` wrote, and answers questions about videos.

    Args:
        folder: local folder with weights, processor and `run.yaml`.
        device: where to compute; default a GPU if there is one.
    """

    def __init__(self, folder: str | Path, device: str | None = None) -> None:
        self.config = validate_run(yaml.safe_load((Path(folder) / CONFIG).read_text()))
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.processor = AutoProcessor.from_pretrained(folder)
        # Flash attention is a matter of the machine that trained, not of the one that answers.
        half = self.device.startswith("cuda") and self.config.train.precision == "bf16"
        dtype = torch.bfloat16 if half else torch.float32
        model = AutoModelForImageTextToText.from_pretrained(
            folder, attn_implementation="sdpa", dtype=dtype, use_safetensors=True
        )
        self.model: Any = model.eval().to(self.device)
        # Its roots were those of the training's manifests.
        self.decoder = Decoder(self.config.data.model_copy(update={"roots": []}), self.processor.image_size)

    def __call__(self, videos: Sequence[str], questions: Sequence[str], max_new_tokens: int = 64) -> list[str]:
        """Greedy answers, one for each pair of video (path or s3:// URI) and question.

        Raises:
            ValueError: a video that cannot be read; the message names it and says why.
        """
        shown = [[self._frames(uri)] for uri in videos]
        asked = [[_question(question, first=True)] for question in questions]
        prompts = self.processor(asked, shown, answer=True).to(self.device)
        tokens = self.model.generate(**prompts, max_new_tokens=max_new_tokens, do_sample=False)
        new = tokens[:, prompts["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]

    def talk(self, video: str) -> "Talk":
        """Begin a conversation about one video or image.

        Raises:
            ValueError: it cannot be read; the message names it and says why.
        """
        return Talk(self, self._frames(video))

    def _frames(self, uri: str) -> np.ndarray:
        (video,) = self.decoder([uri])
        if isinstance(video, Unreadable):
            raise ValueError(f"{uri}: {video.reason}")
        return video


class Talk:
    """Several questions about one video: it is encoded once, and its keys and values serve every turn."""

    def __init__(self, answerer: Answerer, video: np.ndarray) -> None:
        self.answerer = answerer
        self.video = video
        self.messages: list[dict[str, Any]] = []
        self._cache: EncoderDecoderCache | None = None
        self._cached = torch.empty(0, dtype=torch.int64)

    def ask(self, question: str, max_new_tokens: int = 64) -> str:
        """The greedy answer to a question that may refer to those before."""
        processor, model = self.answerer.processor, self.answerer.model
        messages = [*self.messages, _question(question, first=not self.messages)]
        prompt = processor([messages], [[self.video]], answer=True).to(self.answerer.device)
        ids = prompt["input_ids"][0]
        if self._cache is not None:
            # What was said may be spelled in other tokens when it is read again: keep what still holds.
            shared = min(len(ids), len(self._cached))
            same = int((ids[:shared] == self._cached[:shared]).cumprod(0).sum())
            self._cache.self_attention_cache.crop(same - len(self._cached))
            self._cached = self._cached[:same]
        out = model.generate(
            **prompt,
            past_key_values=self._cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        self._cache = out.past_key_values
        self._cached = out.sequences[0, : out.past_key_values.get_seq_length()]
        (said,) = processor.batch_decode(out.sequences[:, len(ids) :], skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": said.strip()}]
        return said.strip()


def _question(question: str, first: bool) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "video"}] * first + [{"type": "text", "text": question}]}


@dataclass(frozen=True)
class Score:
    """How a model did on a manifest."""

    accuracy: float
    """Share of rows whose greedy answer matches exactly."""
    accuracy_by_kind: dict[str, float]
    asked: list[tuple[str, str, str, str]]
    """(video, question, answer, expected) of every row."""


def score(predict: Callable[[list[str], list[str]], list[str]], manifest: Manifest, batch_size: int = 16) -> Score:
    """Ask each row's first question and compare with its answer. Rows without exactly one video are left out."""
    rows = [row for row in manifest.rows if len(row["videos"]) == 1]
    if not rows:
        raise ValueError(f"{manifest.uri}: no row has exactly one video, so there is nothing to ask")
    questions, expected = zip(*(first_turn(row["messages"]) for row in rows), strict=True)
    videos, answers = [row["videos"][0] for row in rows], []
    for start in track(range(0, len(rows), batch_size), description="asking", transient=True):
        part = slice(start, start + batch_size)
        answers += predict(videos[part], list(questions[part]))
    right = [said == wanted for said, wanted in zip(answers, expected, strict=True)]
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for row, is_right in zip(rows, right, strict=True):
        by_kind[row["kind"] or "all"].append(is_right)
    return Score(
        accuracy=sum(right) / len(right),
        accuracy_by_kind={kind: sum(r) / len(r) for kind, r in sorted(by_kind.items())},
        asked=list(zip(videos, questions, answers, expected, strict=True)),
    )


def first_turn(messages: list[dict[str, Any]]) -> tuple[str, str]:
    """The first question of a conversation, its videos left out, and the first answer."""
    content = next(m["content"] for m in messages if m["role"] == "user")
    question = content if isinstance(content, str) else " ".join(p["text"] for p in content if p["type"] == "text")
    return question, next(m["content"] for m in messages if m["role"] == "assistant").strip()
