"""Asks a model about videos. Each video is encoded once for all questions about it, and where that saves enough, the
decoder reads its tokens once as well."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, Cache, DynamicCache

from crosslmm.data.collate import Sample
from crosslmm.evaluate.questions.question import Messages, Question, conversation
from crosslmm.evaluate.scores.judging import Reply
from crosslmm.inference.answerer import Answerer
from crosslmm.model.cache import fork
from crosslmm.model.generation import as_text, greedy_tokens

BATCH_TOKENS = 16_384
"""Tokens of a batch of questions, padding included, unless a single one has more [tokens]."""
BATCH_FRAMES = 1_024
"""Frames of a batch of questions, unless a single one has more [frames]."""
SHARED_TOKENS = 1_024
"""Smallest saving for which a common prefix is prefilled once [tokens]. Questions about one video share the prefix to
the end of the video, and so its cache. Below this saving, batching questions about several videos is faster."""


@dataclass(frozen=True)
class DecodedVideos:
    """The videos of some questions."""

    videos: Sequence[np.ndarray]
    """Frames of each, uint8 (frames, side, side, 3)."""
    times: Sequence[np.ndarray]
    """When each frame of each appears [s]."""
    shortfalls: Sequence[str] = ()
    """Which videos gave fewer frames than asked, and why."""

    @classmethod
    def of(cls, sample: Sample) -> "DecodedVideos":
        """Return the videos of a sample."""
        return cls(sample.videos, [np.array(times) for times in sample.times], sample.shortfalls)


@dataclass
class _Prepared:
    """A question that is ready to be asked."""

    number: int
    """Place among the questions of the call."""
    question: Question
    messages: Messages
    runs: list[list[int]]
    """Frames of each video part, as numbers of the frames in `features`."""
    times: list[list[float]]
    """When each frame of each part appears [s]."""
    features: Tensor
    """(frames, patches, width) of all its videos."""
    reply: Reply
    """With all that is known before the answer."""


@dataclass(frozen=True)
class _Prefix:
    """The tokens with which several prompts begin, a video among them, once the decoder has read them."""

    ids: Tensor
    """int64 (1, length)."""
    cache: Cache


class BatchAnswerer:
    """Asks an exported model.

    Args:
        answerer: the model.
        max_new_tokens: length limit of an answer [tokens].
        likelihood: compare the likelihoods of the choices instead of generating an answer.
    """

    def __init__(self, answerer: Answerer, max_new_tokens: int, likelihood: bool = False) -> None:
        self.answerer, self.max_new_tokens, self.likelihood = answerer, max_new_tokens, likelihood
        self.model, self.processor = answerer.model, answerer.processor
        ends = self.model.generation_config.eos_token_id or []
        ends = [*(ends if isinstance(ends, list) else [ends]), self.processor.tokenizer.eos_token_id]
        self._end_ids = torch.tensor(ends, device=answerer.device)

    @torch.no_grad()
    def __call__(self, asked: Sequence[tuple[DecodedVideos, Sequence[Question]]]) -> list[list[Reply]]:
        """Return the replies to the questions about each of some videos.

        Batches are made of all questions by length, and depend on nothing else: the same call gives the same replies.
        """
        prepared: list[_Prepared] = []
        replies: list[list[Reply]] = []
        for watched, questions in asked:
            features, seconds = self._timed(self._encode, watched)
            replies.append([])
            for question in questions:
                outcome = self._prepare(len(prepared), question, watched, features, seconds / len(questions))
                if isinstance(outcome, _Prepared):
                    prepared.append(outcome)
                replies[-1].append(outcome if isinstance(outcome, Reply) else outcome.reply)
        answered: dict[int, Reply] = {}
        for prefix, questions_of_prefix in self._by_prefix(prepared):
            for batch in _batches(questions_of_prefix):
                answered |= zip((item.number for item in batch), self._ask(batch, prefix), strict=True)
        left = iter(range(len(prepared)))
        return [[reply if reply.error else answered[next(left)] for reply in of_video] for of_video in replies]

    def _encode(self, watched: DecodedVideos) -> Tensor:
        """Encode videos: (frames of all of them, patches, width)."""
        config = self.model.config
        if not watched.videos:
            shape = (0, config.patches_per_frame, config.vision_config.hidden_size)
            return torch.zeros(shape, dtype=self.model.dtype, device=self.answerer.device)
        pixels = torch.from_numpy(np.concatenate(watched.videos)).permute(0, 3, 1, 2).contiguous()
        return self.model.encode(pixels.to(self.answerer.device))

    def _prepare(
        self, number: int, question: Question, watched: DecodedVideos, features: Tensor, seconds: float
    ) -> _Prepared | Reply:
        """Make the prompt of a question; return a reply with the error if it cannot be asked."""
        times = [[round(float(time), 3) for time in of_video] for of_video in watched.times]
        reply = Reply(times=times, shortfalls=list(watched.shortfalls), seconds=seconds)
        try:
            messages, runs = conversation(question, watched.times)
            shown = [time for of_video in watched.times for time in of_video.tolist()]
            of_parts = [[shown[frame] for frame in run] for run in runs]
            tokens = self.processor.length(messages, [len(run) for run in runs], True, of_parts)
            if tokens + self.max_new_tokens - 1 > self.processor.max_length:  # the last new token is not fed back
                raise ValueError(
                    f"it takes {tokens} tokens and its answer up to {self.max_new_tokens}, and the decoder has "
                    f"{self.processor.max_length}"
                )
            if self.likelihood:
                self._choice_tokens(question)
        except ValueError as error:
            return replace(reply, error=str(error))
        return _Prepared(number, question, messages, runs, of_parts, features, replace(reply, prompt_tokens=tokens))

    def _by_prefix(self, prepared: Sequence[_Prepared]) -> Iterator[tuple[_Prefix | None, list[_Prepared]]]:
        """Yield, for each video whose prefix the decoder reads once, this prefix and the questions about the video; at
        the end, None and all other questions."""
        of_video: dict[tuple[int, str], list[_Prepared]] = {}
        for item in prepared:
            of_video.setdefault((id(item.features), str(item.runs)), []).append(item)
        others = []
        for items in of_video.values():
            ids = self._common_ids(items)
            if ids is None:
                others += items
            else:
                prefix, seconds = self._timed(self._read, ids, items[0])
                for item in items:
                    item.reply = replace(item.reply, seconds=item.reply.seconds + seconds / len(items))
                yield prefix, items
        yield None, sorted(others, key=lambda item: item.number)

    def _common_ids(self, items: list[_Prepared]) -> Tensor | None:
        """Return the tokens with which the prompts of all questions about a video begin, int64 (length,). None if these
        lack a part of the video, or save too little."""
        if (len(items) - 1) * min(item.reply.prompt_tokens for item in items) < SHARED_TOKENS:
            return None
        rows = _without_padding(self._prompts(items))
        shortest = min(map(len, rows)) - 1  # the last token is read with the question, for its logits
        first = rows[0][:shortest]
        same = torch.stack([row[:shortest] == first for row in rows]).all(dim=0)
        length = int(same.cumprod(0).sum())
        video_follows = any((row[length:] == self.processor.video_token_id).any() for row in rows)
        return None if video_follows or (len(items) - 1) * length < SHARED_TOKENS else first[:length]

    def _read(self, ids: Tensor, item: _Prepared) -> _Prefix:
        """Let the decoder read the tokens, int64 (length,), and the videos of a question."""
        device, cache = self.answerer.device, DynamicCache(config=self.model.config.text_config)
        frames = torch.tensor([[len(run) for run in item.runs]])
        self.model(
            input_ids=ids[None].to(device), features=_features(item), num_frames=frames.to(device),
            past_key_values=cache, logits_to_keep=1,
        )  # fmt: skip
        return _Prefix(ids[None].to(device), cache)

    def _ask(self, batch: list[_Prepared], prefix: _Prefix | None) -> list[Reply]:
        """Ask a batch; if it does not fit the GPU's memory, halves of it."""
        try:
            replies, seconds = self._timed(self._choose if self.likelihood else self._generate, batch, prefix)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            torch.cuda.empty_cache()
            middle = len(batch) // 2
            return self._ask(batch[:middle], prefix) + self._ask(batch[middle:], prefix)
        share = seconds / len(batch)
        return [replace(reply, seconds=reply.seconds + share) for reply in replies]

    def _inputs(self, batch: list[_Prepared], prefix: _Prefix | None) -> tuple[BatchFeature, dict[str, Any]]:
        """Return the prompts of a batch, and further arguments of `generate`. With a prefix, these are a cache of it,
        repeated for each prompt; without one, the prompts bring the features of their videos in place of frames."""
        prompts = self._prompts(batch)
        if prefix is None:
            prompts["features"] = torch.cat([_features(item) for item in batch])
            return prompts.to(self.answerer.device), {}
        length = prefix.ids.shape[1]
        cache = fork(prefix.cache, length)
        cache.batch_repeat_interleave(len(batch))
        ends = [row[length:] for row in _without_padding(prompts)]
        # Shorter prompts are padded between the prefix and their own tokens, not before the prefix.
        ids, mask = (
            pad_sequence(rows, batch_first=True, padding_side="left").to(self.answerer.device)
            for rows in (ends, [torch.ones_like(end) for end in ends])
        )
        begin = prefix.ids.expand(len(batch), -1)
        padded = {"input_ids": [begin, ids], "attention_mask": [torch.ones_like(begin), mask]}
        return BatchFeature({name: torch.cat(parts, dim=1) for name, parts in padded.items()}), {
            "past_key_values": cache
        }

    def _prompts(self, batch: list[_Prepared]) -> BatchFeature:
        """Return the prompts of a batch without its videos."""
        # The processor counts the frames of these arrays, which have no content.
        videos = [[np.zeros((len(run), 1, 1), np.uint16) for run in item.runs] for item in batch]
        times = [item.times for item in batch]
        return self.processor([item.messages for item in batch], videos, None, True, (1, 1), times=times)

    def _generate(self, batch: list[_Prepared], prefix: _Prefix | None) -> list[Reply]:
        """Return the greedy answers."""
        prompts, cached = self._inputs(batch, prefix)
        tokens = greedy_tokens(self.model, prompts, self.max_new_tokens, **cached)
        # An answer ends at the first end token, and what follows is padding.
        ended = torch.isin(tokens, self._end_ids).cumsum(dim=1)
        counts = ((ended == 0).sum(dim=1) + (ended > 0).any(dim=1).int()).tolist()
        return [
            replace(item.reply, text=text, new_tokens=count)
            for item, text, count in zip(batch, as_text(self.processor, tokens), counts, strict=True)
        ]

    def _choose(self, batch: list[_Prepared], prefix: _Prefix | None) -> list[Reply]:
        """Return the choices whose first token is most likely to begin the answer."""
        options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        prompts, cached = self._inputs(batch, prefix)
        out = self.model.generate(**prompts, **cached, **options)
        log_probabilities = out.logits[0].float().log_softmax(dim=-1).cpu()
        replies = []
        for item, row in zip(batch, log_probabilities, strict=True):
            log_likelihoods = {
                choice: float(row[token]) for choice, token in self._choice_tokens(item.question).items()
            }
            best = max(log_likelihoods, key=log_likelihoods.__getitem__)
            replies.append(
                replace(item.reply, text=best, likelihoods={k: round(v, 4) for k, v in log_likelihoods.items()})
            )
        return replies

    def _choice_tokens(self, question: Question) -> dict[str, int]:
        """Return the first token of each choice.

        Raises:
            ValueError: there are no choices, or two begin with the same token.
        """
        encode = self.processor.tokenizer.encode
        tokens = {choice: encode(choice, add_special_tokens=False)[0] for choice in question.choices}
        if len(set(tokens.values())) < max(2, len(question.choices)):
            raise ValueError("it has no choices whose likelihoods can be compared by their first tokens")
        return tokens

    def _timed(self, function: Any, *arguments: Any) -> tuple[Any, float]:
        """Return the result of a call, and the time that it takes [s]."""
        began = time.perf_counter()
        result = function(*arguments)
        if self.answerer.device.startswith("cuda"):
            torch.cuda.synchronize()
        return result, time.perf_counter() - began


def _features(item: _Prepared) -> Tensor:
    """Return the features of the frames that a question shows, in its order."""
    return item.features[[frame for run in item.runs for frame in run]]


def _without_padding(prompts: BatchFeature) -> list[Tensor]:
    """Return the tokens of each prompt, int64 (length,)."""
    return [row[seen.bool()] for row, seen in zip(prompts["input_ids"], prompts["attention_mask"], strict=True)]


def _batches(prepared: Sequence[_Prepared]) -> Iterator[list[_Prepared]]:
    """Yield batches of questions of similar length, the longest first."""
    batch: list[_Prepared] = []
    longest = frames = 0
    for item in sorted(prepared, key=lambda item: (-item.reply.prompt_tokens, item.number)):
        of_item = sum(map(len, item.runs))
        longest = longest if batch else item.reply.prompt_tokens
        if batch and ((len(batch) + 1) * longest > BATCH_TOKENS or frames + of_item > BATCH_FRAMES):
            yield batch
            batch, longest, frames = [], item.reply.prompt_tokens, 0
        batch.append(item)
        frames += of_item
    if batch:
        yield batch
