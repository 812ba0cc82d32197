"""The processor: converts chat messages and frames to the tensors that the model takes."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

VIDEO_TOKEN, START_TOKEN, END_TOKEN = "<|video_pad|>", "<|im_start|>", "<|im_end|>"
IGNORED = -100

# ChatML, as in Qwen2.5. The loss covers what is between `generation` and `endgeneration`: the assistant's answer and
# the token that ends it.
CHAT_TEMPLATE = """
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
    {%- elif message['content'] is string -%}
        {{- message['content'] + '<|im_end|>' -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {{- '<|video_pad|>' if part['type'] in ('video', 'image') else part['text'] -}}
        {%- endfor -%}
        {{- '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""


class CrossLMMProcessor(ProcessorMixin):
    """Chat messages and decoded frames (or their features) -> `input_ids`, `labels`, `pixel_values`, `num_frames`.

    Messages are text: `<|im_end|>` in a question becomes the tokens of these characters and ends no message.

    Args:
        tokenizer: any fast tokenizer; `<|video_pad|>`, `<|im_start|>` and `<|im_end|>` are added where missing.
        image_size: side of the square frames [pixels].
        tokens_per_frame: pooled tokens per frame, `CrossLMMConfig.tokens_per_frame`.
        max_length: context length of the decoder [tokens]; longer training conversations are truncated.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_size: int = 384,
        tokens_per_frame: int = 9,
        max_length: int = 32768,
    ) -> None:
        self.image_size = image_size
        self.tokens_per_frame = tokens_per_frame
        self.max_length = max_length
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [VIDEO_TOKEN, START_TOKEN, END_TOKEN], "eos_token": END_TOKEN},
            replace_extra_special_tokens=False,
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.video_token_id, self._start_id, self._end_id = tokenizer.convert_tokens_to_ids(
            [VIDEO_TOKEN, START_TOKEN, END_TOKEN]
        )
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = special | set(tokenizer.all_special_ids)
        super().__init__(tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    def __call__(
        self,
        messages: Sequence[list[dict[str, Any]]],
        videos: Sequence[Sequence[np.ndarray]],
        weights: Sequence[float] | None = None,
        answer: bool = False,
        features: tuple[int, int] | None = None,
    ) -> BatchFeature:
        """Convert conversations to one padded batch.

        Args:
            messages: one conversation per sample, with a `{"type": "video"}` or `{"type": "image"}` part per video.
            videos: videos of each sample in the order of these parts, each uint8 (frames, image_size, image_size, 3);
                an image is a video of one frame.
            weights: 0 masks all labels of a sample (padding of the batch); default 1 for each.
            answer: for `generate`: append the start of the assistant's turn and pad on the left.
            features: (patches, width): `videos` holds encoded features instead, each uint16 (frames, patches,
                width) with the bits of bfloat16.

        Returns:
            `input_ids`, `attention_mask` (B, L), `pixel_values` (F, 3, H, W) uint8 or else `features` (F, P, D)
            bfloat16, `num_frames` (B, M) with zeros where a sample has fewer than M videos, and, unless `answer`,
            `labels` (B, L) with -100 outside the assistant's answers.

        Raises:
            ValueError: the numbers of video parts and videos differ, a video has no frames, frames or features have
                another dtype or shape, or a conversation does not fit the decoder's context.
        """
        ids, labels, arrays = [], [], []
        for i, (conversation, sample_videos) in enumerate(zip(messages, videos, strict=True)):
            for video in sample_videos:
                self._check(video, features)
            tokens, is_target = self._tokenize(conversation, [len(video) for video in sample_videos], answer)
            self._check_length(len(tokens))
            dropped = weights is not None and weights[i] == 0
            ids.append(torch.tensor(tokens))
            labels.append(
                torch.tensor([t if m and not dropped else IGNORED for t, m in zip(tokens, is_target, strict=True)])
            )
            arrays += [torch.from_numpy(video) for video in sample_videos]
        side = "left" if answer else "right"
        batch = {
            "input_ids": pad_sequence(ids, True, self.tokenizer.pad_token_id, side),
            "attention_mask": pad_sequence([torch.ones_like(t) for t in ids], True, 0, side),
            **self._visual(arrays, features),
            "num_frames": pad_sequence(
                [torch.tensor([len(v) for v in sample_videos], dtype=torch.int64) for sample_videos in videos], True
            ),
        }
        if not answer:
            batch["labels"] = pad_sequence(labels, True, IGNORED, side)
        return BatchFeature(batch)

    def _visual(self, arrays: list[torch.Tensor], features: tuple[int, int] | None) -> dict[str, torch.Tensor]:
        """Return `pixel_values` or `features`; empty if there are no videos, so that all ranks run the same modules."""
        if features is None:
            none = torch.empty(0, self.image_size, self.image_size, 3, dtype=torch.uint8)
            return {"pixel_values": torch.cat([*arrays, none]).permute(0, 3, 1, 2).contiguous()}
        none = torch.empty(0, *features, dtype=torch.bfloat16)
        return {"features": torch.cat([*(bits.view(torch.bfloat16) for bits in arrays), none])}

    def length(self, conversation: list[dict[str, Any]], num_frames: Sequence[int], answer: bool = False) -> int:
        """Return the tokens of a conversation whose videos have `num_frames` frames each; `answer` as for a call."""
        return len(self._tokenize(conversation, num_frames, answer)[0])

    def answer_length(self, text: str) -> int:
        """Return the tokens of an answer, its end token included."""
        return len(self._encode_text(text)) + 1

    def require_room(
        self, prompt: list[dict[str, Any]], num_frames: Sequence[int], reference: str, new_tokens: int
    ) -> None:
        """Raise ValueError if an answer as long as the reference could not be generated to its end.

        Args:
            prompt: conversation up to the answer.
            num_frames: frames of each of its videos.
            reference: the answer that the generated one will be compared with.
            new_tokens: how many tokens will be generated at most.
        """
        if (length := self.answer_length(reference)) > new_tokens:
            raise ValueError(f"an answer takes {length} tokens, and at most {new_tokens} are generated")
        # The last new token is not fed back.
        self._check_length(self.length(prompt, num_frames, answer=True) + new_tokens - 1)

    def _tokenize(
        self, conversation: list[dict[str, Any]], num_frames: Sequence[int], answer: bool
    ) -> tuple[list[int], list[int]]:
        """Return token ids and loss mask of one conversation, with each video part repeated once per pooled token."""
        ids, targets = self._encode(conversation, answer)
        placeholders = ids.count(self.video_token_id)
        if placeholders != len(num_frames):
            raise ValueError(
                f"the conversation has {placeholders} video or image parts, and there are {len(num_frames)} videos"
            )
        remaining = iter(num_frames)
        tokens, is_target = [], []
        for token, target in zip(ids, targets, strict=True):
            repeats = next(remaining) * self.tokens_per_frame if token == self.video_token_id else 1
            tokens += [token] * repeats
            is_target += [target] * repeats
        if not answer and self.video_token_id not in tokens[self.max_length :]:
            # Truncate long text rather than lose the row. Frames are never cut.
            tokens, is_target = tokens[: self.max_length], is_target[: self.max_length]
        return tokens, is_target

    def _encode(self, conversation: list[dict[str, Any]], answer: bool) -> tuple[list[int], list[int]]:
        """Return token ids and loss mask of one conversation, with one token per video part."""
        out = self.tokenizer.apply_chat_template(
            conversation,
            chat_template=self.chat_template,
            add_generation_prompt=answer,
            return_assistant_tokens_mask=True,
            return_dict=True,
        )
        ids, targets = out["input_ids"], out["assistant_masks"]
        pieces = list(self._pieces(conversation, answer))
        expected = [piece for piece, _ in pieces if isinstance(piece, int)]
        if [token for token in ids if token in self._special_ids] != expected:
            # The text, once joined, spells special tokens, or has characters that the tokenizer does not know.
            ids, targets = self._encode_apart(pieces)
            special = self._special_ids - {self.tokenizer.unk_token_id}
            if [token for token in ids if token in special] != expected:
                raise ValueError("the text contains a special token, which this tokenizer cannot write as text")
        return ids, targets

    def _pieces(self, conversation: list[dict[str, Any]], answer: bool) -> Iterator[tuple[str | int, int]]:
        """Yield what `CHAT_TEMPLATE` makes of a conversation: (text or id of a special token, 1 if it is a target)."""
        for message in conversation:
            target, content = int(message["role"] == "assistant"), message["content"]
            yield self._start_id, 0
            yield f"{message['role']}\n", 0
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                yield (self.video_token_id if part["type"] in ("video", "image") else part["text"]), target
            yield self._end_id, target
            yield "\n", 0
        if answer:
            yield self._start_id, 0
            yield "assistant\n", 0

    def _encode_apart(self, pieces: list[tuple[str | int, int]]) -> tuple[list[int], list[int]]:
        """Return token ids and loss mask of pieces; text between special tokens is joined, and taken for text alone."""
        ids: list[int] = []
        targets: list[int] = []
        for (is_text, target), run in groupby(pieces, key=lambda piece: (isinstance(piece[0], str), piece[1])):
            values: list[Any] = [value for value, _ in run]
            ids += self._encode_text("".join(values)) if is_text else values
            targets += [target] * (len(ids) - len(targets))
        return ids, targets

    def _encode_text(self, text: str) -> list[int]:
        """Return the token ids of text without looking for special tokens: the tokenizer's steps after that search."""
        backend = self.tokenizer.backend_tokenizer
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words = [text]
        if backend.pre_tokenizer is not None:
            words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in backend.model.tokenize(word)]

    def _check_length(self, length: int) -> None:
        if length > self.max_length:
            raise ValueError(
                f"the conversation takes {length} positions, and the decoder has {self.max_length}: use less text, "
                f"fewer frames or a larger pool_stride (now {self.tokens_per_frame} tokens/frame)"
            )

    def _check(self, video: np.ndarray, features: tuple[int, int] | None) -> None:
        side = self.image_size
        if features is not None:
            if video.dtype != np.uint16 or video.shape[1:] != features:
                raise ValueError(
                    f"features are {video.dtype} {video.shape}; expected uint16 (frames, {features[0]}, "
                    f"{features[1]}), the bits of bfloat16"
                )
        elif video.dtype != np.uint8 or video.shape[1:] != (side, side, 3):
            raise ValueError(
                f"frames are {video.dtype} {video.shape}; the encoder takes uint8 (frames, {side}, {side}, 3)"
            )
        if not len(video):
            raise ValueError("a video has no frames; remove its part from the conversation, or pass at least one frame")


# Text from which the BPE of the tiny preset learns the words of the sample set; other text needs more tokens.
TINY_CORPUS = """
What colour is the shape? Which shape is it? Which way does it move? Which colour came first? What happens in the video?
red green blue yellow cyan magenta white black circle square triangle cross left right up down first second then
user assistant system the a an is are does do it in on of to and or which what who where when how
"""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `TINY_CORPUS`: deterministic, encodes any text, needs no download."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", VIDEO_TOKEN]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Repeat each word with and without a leading space, so that it becomes one token.
    words = TINY_CORPUS.split()
    tokenizer.train_from_iterator([f"{word} {word} {word}\n" for word in words] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
