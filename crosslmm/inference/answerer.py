"""Answer questions about videos with an exported model."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import Cache
from transformers.utils import logging as transformers_logging

from crosslmm import storage
from crosslmm.config import validate_run
from crosslmm.data.frame_sampling import SampledFrames
from crosslmm.data.row_schema import resolve_video
from crosslmm.data.video.decode import VideoFailure
from crosslmm.data.video.decode_pool import Decoder
from crosslmm.data.video.frame_list import describe_video, map_files
from crosslmm.model import CrossLMMForConditionalGeneration, CrossLMMProcessor
from crosslmm.model.adapters import lora
from crosslmm.model.adapters.base import absolute, is_adapter, open_adapter
from crosslmm.model.cache import fork
from crosslmm.model.generation import greedy_answers
from crosslmm.model.weights_source import TOKENIZER, WEIGHTS, WeightsSource
from crosslmm.run_folder import MODEL_CONFIG_FILE

log = logging.getLogger(__name__)

EXPORTED = (*WEIGHTS, *TOKENIZER, "generation_config.json", "processor_config.json", MODEL_CONFIG_FILE)
"""Files of an exported model that are opened."""
ANSWER_TOKENS = 64
"""Lower limit of the default `max_new_tokens` [tokens]."""
NO_VIDEO = "video cannot be read or lies outside the roots"
"""What the sender of a row learns about its video: neither whether a file exists nor what is in it."""


class BadRow(ValueError):
    """A row that cannot be answered. Its text is shown to whoever sent the row."""


class Answerer:
    """An exported model that answers questions about videos.

    Args:
        folder: folder (path, s3:// URI or hub name) with weights, processor and `run.yaml`, as
            `crosslmm.train.checkpoint.export.export` writes it.
        device: device to compute on; default: a GPU if there is one, else the CPU.
        adapter: folder of an adapter (path or s3:// URI) that belongs to this model. Its own processor and `run.yaml`
            apply, if it has them.

    Attributes:
        max_new_tokens: default length limit of an answer: at least that of the validations of its run [tokens].

    Raises:
        ValueError: the adapter belongs to another model, or is not one that `crosslmm.model.adapters.lora` loads; or
            `folder` is an adapter itself.
    """

    def __init__(self, folder: str | Path, device: str | None = None, adapter: str | Path | None = None) -> None:
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if is_adapter(str(folder)):
            raise ValueError(f"{folder}: is an adapter; name the model that it belongs to, and this as its adapter")
        with contextlib.ExitStack() as stack:
            stack.enter_context(_no_progress_bar())
            whole = stack.enter_context(WeightsSource(absolute(str(folder))).local(EXPORTED))
            own = stack.enter_context(open_adapter(str(adapter), **whole)) if adapter else whole
            source = own if Path(own["pretrained_model_name_or_path"], MODEL_CONFIG_FILE).exists() else whole
            run = Path(source["pretrained_model_name_or_path"], MODEL_CONFIG_FILE)
            self.config = validate_run(yaml.safe_load(run.read_text()))
            half = self.device.startswith("cuda") and self.config.train.precision == "bf16"
            self.processor = CrossLMMProcessor.from_pretrained(**source, trust_remote_code=False)
            # SDPA whatever the training used: flash-attn may be missing on this machine.
            model = CrossLMMForConditionalGeneration.from_pretrained(
                **whole,
                attn_implementation="sdpa",
                dtype=torch.bfloat16 if half else torch.float32,
                trust_remote_code=False,
                use_safetensors=True,
            )
            if adapter:
                try:
                    lora.load(model, Path(own["pretrained_model_name_or_path"]))
                except ValueError as error:
                    raise ValueError(f"{adapter}: {error}") from error
        self.model: Any = model.eval().to(self.device)
        self.max_new_tokens = max(ANSWER_TOKENS, self.config.train.max_new_tokens or 0)
        # The roots in the configuration restrict the manifests of training; here the caller names each video.
        self.decoder = Decoder(self.config.data.model_copy(update={"roots": []}), self.processor.image_size)

    def __call__(self, videos: Sequence[str], questions: Sequence[str], max_new_tokens: int | None = None) -> list[str]:
        """Return the greedy answer to each pair of video (path or s3:// URI) and question.

        Raises:
            ValueError: a video is unreadable; the message names it and the reason.
        """
        frames = [self._decode(uri) for uri in videos]
        conversations = [[_user_message(question, video)] for question, video in zip(questions, frames, strict=True)]
        return self._generate(conversations, frames, max_new_tokens or self.max_new_tokens)

    def answer_rows(
        self, videos: Sequence[Any], questions: Sequence[Any], roots: Sequence[str], max_new_tokens: int | None = None
    ) -> list[tuple[str | None, str | None]]:
        """Answer rows that nobody has checked; a bad row gets an error, and the others are answered.

        Args:
            videos: path or s3:// URI of each row's video, relative to the first root or absolute.
            questions: a question about each.
            roots: folders that videos may lie in, links resolved.
            max_new_tokens: length limit of an answer [tokens]; default: the attribute of this name.

        Returns:
            (answer, error) of each row; one of the two is None. Why a video is refused goes to the log alone.

        Raises:
            storage.Unavailable: the store is unreachable or failing; says nothing about the rows.
        """
        max_new_tokens = max_new_tokens or self.max_new_tokens
        good: list[tuple[list[dict[str, Any]], SampledFrames]] = []
        errors: list[str | None] = []
        for video, question in zip(videos, questions, strict=True):
            try:
                good.append(self._prepare(video, question, roots, max_new_tokens))
                errors.append(None)
            except BadRow as error:
                errors.append(str(error))
        conversations, frames = [c for c, _ in good], [f for _, f in good]
        answers = iter(self._generate(conversations, frames, max_new_tokens) if good else [])
        return [(None, error) if error else (next(answers), None) for error in errors]

    def _prepare(
        self, video: Any, question: Any, roots: Sequence[str], max_new_tokens: int
    ) -> tuple[list[dict[str, Any]], SampledFrames]:
        """Return the conversation and the frames of an unchecked row.

        Raises:
            BadRow: the row cannot be answered.
            storage.Unavailable: the store is unreachable or failing.
        """
        if not _is_text(question):
            raise BadRow("question is not text")
        frames = self._decode_unchecked(video, roots)
        conversation, times = [_user_message(question, frames)], [frames.times.tolist()]
        try:
            # The last new token is not fed back.
            tokens = self.processor.length(conversation, [len(frames)], True, times) + max_new_tokens - 1
        except ValueError as error:
            raise BadRow(f"question: {error}") from error
        if tokens > self.processor.max_length:
            limit = self.processor.max_length
            raise BadRow(f"video, question and answer take up to {tokens} tokens, and the model reads {limit}")
        return conversation, frames

    def _decode_unchecked(self, video: Any, roots: Sequence[str]) -> SampledFrames:
        try:
            if not _is_text(video):
                raise ValueError(f"{video!a} is not text")
            return self._decode(_inside(video, roots))
        except (ValueError, OSError) as error:
            # S3 also refuses an object that is missing, where the bucket may not be listed.
            if isinstance(error, storage.Unavailable) and not isinstance(error, storage.Refused):
                raise
            log.warning("a row is not answered: %s", ascii(str(error))[1:-1][:300])
            raise BadRow(NO_VIDEO) from None

    def _generate(
        self, conversations: Sequence[list[dict[str, Any]]], videos: Sequence[SampledFrames], max_new_tokens: int
    ) -> list[str]:
        images, times = [[video.images] for video in videos], [[video.times.tolist()] for video in videos]
        prompts = self.processor(conversations, images, times=times, for_generation=True)
        return greedy_answers(self.model, self.processor, prompts, max_new_tokens)

    def start_conversation(self, video: str) -> "Conversation":
        """Start a conversation about one video or image.

        Raises:
            ValueError: the video is unreadable; the message names it and the reason.
        """
        return Conversation(self, self._decode(video))

    def _decode(self, uri: str) -> SampledFrames:
        (video,) = self.decoder([uri])
        if isinstance(video, VideoFailure):
            raise ValueError(f"{describe_video(uri)}: {video.reason}")
        if video.shortfall:
            log.warning("%s: %s", describe_video(uri), video.shortfall)
        return video


class _Cached(NamedTuple):
    """What the model has read of a conversation: one value, so that tokens and cache never contradict each other."""

    ids: torch.Tensor
    cache: Cache


class Conversation:
    """Several questions about one video, which is encoded once: its keys and values are reused in every turn.

    A question that fails or is interrupted leaves the conversation as it was before. `messages` may be edited.
    """

    def __init__(self, answerer: Answerer, video: SampledFrames) -> None:
        self.answerer = answerer
        self.video = video
        self.messages: list[dict[str, Any]] = []
        self._cached: _Cached | None = None

    def ask(self, question: str, max_new_tokens: int | None = None) -> str:
        """Return the greedy answer to a question, which may refer to earlier turns.

        Raises:
            ValueError: the conversation is longer than the model's context.
        """
        processor, model = self.answerer.processor, self.answerer.model
        messages = [*self.messages, _user_message(question, None if self.messages else self.video)]
        times = [[self.video.times.tolist()]]
        prompt = processor([messages], [[self.video.images]], times=times, for_generation=True).to(self.answerer.device)
        ids = prompt["input_ids"][0]
        out = model.generate(
            **prompt,
            past_key_values=self._common_prefix(ids),
            max_new_tokens=max_new_tokens or self.answerer.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        (answer,) = processor.batch_decode(out.sequences[:, len(ids) :], skip_special_tokens=True)
        self._cached = _Cached(out.sequences[0, : out.past_key_values.get_seq_length()], out.past_key_values)
        self.messages = [*messages, {"role": "assistant", "content": answer.strip()}]
        return answer.strip()

    def _common_prefix(self, ids: torch.Tensor) -> Cache | None:
        """Return a cache of the longest prefix of `ids` that was read before; None if it lacks a token of the video.

        Tokenised again, earlier turns may differ from the cached tokens.
        """
        if self._cached is None:
            return None
        length = min(len(ids) - 1, len(self._cached.ids))  # the last one is read in any case, for its logits
        prefix = int((ids[:length] == self._cached.ids[:length]).cumprod(0).sum())
        if (ids[prefix:] == self.answerer.processor.video_token_id).any():
            return None
        return fork(self._cached.cache, prefix)


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Hide the weight-loading bar of Transformers, then restore the setting of the host program."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def _user_message(question: str, video: SampledFrames | None) -> dict[str, Any]:
    """Return a question; the first one of a conversation follows its video or image."""
    part = [] if video is None else [{"type": "image" if video.is_picture else "video"}]
    return {"role": "user", "content": [*part, {"type": "text", "text": question}]}


def _is_text(value: Any) -> bool:
    """Return whether this is a string without half surrogate pairs, which no tokenizer and no file system takes."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _inside(video: str, roots: Sequence[str]) -> str:
    """Return the path or URI of a row's video, with its links resolved.

    Raises:
        ValueError: it lies in none of the roots.
    """
    if not roots:
        raise ValueError(f"{video!a}: the model was loaded without roots")
    return map_files(resolve_video(video, roots), lambda name: storage.follow(name, roots))
