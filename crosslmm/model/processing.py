"""Messages and frames -> the tensors that the model takes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

VIDEO_TOKEN = "<|video_pad|>"
IGNORED = -100

# ChatML, as Qwen2.5 speaks it. What stands between `generation` and `endgeneration` is what the loss is taken of:
# the assistant's words and the token that ends them.
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

    Args:
        tokenizer: any fast tokenizer; `<|video_pad|>`, `<|im_start|>` and `<|im_end|>` are added where missing.
        image_size: side of the square frames that the encoder takes, in pixels.
        tokens_per_frame: pooled tokens a frame, `CrossLMMConfig.tokens_per_frame`.
        max_length: positions of the decoder; words of a training conversation beyond them are cut off.
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
            {"additional_special_tokens": [VIDEO_TOKEN, "<|im_start|>", "<|im_end|>"], "eos_token": "<|im_end|>"},
            replace_extra_special_tokens=False,
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.video_token_id = tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
        super().__init__(tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    def __call__(
        self,
        messages: Sequence[list[dict[str, Any]]],
        videos: Sequence[Sequence[np.ndarray]],
        weights: Sequence[float] | None = None,
        answer: bool = False,
        features: tuple[int, int] | None = None,
    ) -> BatchFeature:
        """Turn conversations into one padded batch.

        Args:
            messages: one conversation a sample; a `{"type": "video"}` or `{"type": "image"}` part for each one.
            videos: each sample's videos in the order of these parts, uint8 (frames, image_size, image_size, 3) each; an
                image is a video of one frame.
            weights: 0 drops a sample's labels (it fills a place but teaches nothing); default all 1.
            answer: end with the assistant's turn begun and pad on the left, as `generate` wants it.
            features: (patches, width): the videos are features instead, the bits of bfloat16, uint16 (frames, patches,
                width) each.

        Returns:
            `input_ids`, `attention_mask` (B, L), `pixel_values` (F, 3, H, W) uint8 or else `features` (F, P, D)
            bfloat16, `num_frames` (B, M) with zeros where a sample has fewer than M videos, and, unless `answer`,
            `labels` (B, L) with -100 outside of the assistant's words.

        Raises:
            ValueError: a conversation with another number of video parts than videos, a video without frames, or frames
                or features of another size.
        """
        ids, labels, shown = [], [], []
        for i, (conversation, own) in enumerate(zip(messages, videos, strict=True)):
            for video in own:
                self._check(video, features)
            tokens, is_target = self._tokenize(conversation, [len(video) for video in own], answer)
            dropped = weights is not None and weights[i] == 0
            ids.append(torch.tensor(tokens))
            labels.append(
                torch.tensor([t if m and not dropped else IGNORED for t, m in zip(tokens, is_target, strict=True)])
            )
            shown += [torch.from_numpy(video) for video in own]
        side = "left" if answer else "right"
        batch = {
            "input_ids": pad_sequence(ids, True, self.tokenizer.pad_token_id, side),
            "attention_mask": pad_sequence([torch.ones_like(t) for t in ids], True, 0, side),
            **self._visual(shown, features),
            "num_frames": pad_sequence(
                [torch.tensor([len(video) for video in own], dtype=torch.int64) for own in videos], True
            ),
        }
        if not answer:
            batch["labels"] = pad_sequence(labels, True, IGNORED, side)
        return BatchFeature(batch)

    def _visual(self, shown: list[torch.Tensor], features: tuple[int, int] | None) -> dict[str, torch.Tensor]:
        """What the model is shown; a batch of text alone is of one kind too, for all ranks run the same modules."""
        if features is None:
            none = torch.empty(0, self.image_size, self.image_size, 3, dtype=torch.uint8)
            return {"pixel_values": torch.cat([*shown, none]).permute(0, 3, 1, 2).contiguous()}
        none = torch.empty(0, *features, dtype=torch.bfloat16)
        return {"features": torch.cat([*(bits.view(torch.bfloat16) for bits in shown), none])}

    def length(self, conversation: list[dict[str, Any]], num_frames: Sequence[int]) -> int:
        """Tokens of a conversation in training, with so many frames of each of its videos."""
        return len(self._tokenize(conversation, num_frames, answer=False)[0])

    def _tokenize(
        self, conversation: list[dict[str, Any]], num_frames: Sequence[int], answer: bool
    ) -> tuple[list[int], list[int]]:
        """One conversation -> token ids and the mask of what the loss is taken of; each video part drawn out."""
        out = self.tokenizer.apply_chat_template(
            conversation,
            chat_template=self.chat_template,
            add_generation_prompt=answer,
            return_assistant_tokens_mask=True,
            return_dict=True,
        )
        places = out["input_ids"].count(self.video_token_id)
        if places != len(num_frames):
            raise ValueError(
                f"the conversation has {places} video or image parts (or {VIDEO_TOKEN} in its text), "
                f"and {len(num_frames)} videos"
            )
        remaining = iter(num_frames)
        tokens, is_target = [], []
        for token, target in zip(out["input_ids"], out["assistant_masks"], strict=True):
            times = next(remaining) * self.tokens_per_frame if token == self.video_token_id else 1
            tokens += [token] * times
            is_target += [target] * times
        if not answer and self.video_token_id not in tokens[self.max_length :]:
            # One long text must not end a run; frames that do not fit are a matter of the configuration.
            tokens, is_target = tokens[: self.max_length], is_target[: self.max_length]
        return tokens, is_target

    def _check(self, video: np.ndarray, features: tuple[int, int] | None) -> None:
        side = self.image_size
        if features is not None:
            if video.dtype != np.uint16 or video.shape[1:] != features:
                raise ValueError(
                    f"features are {video.dtype} {video.shape}; they have to be uint16 (frames, {features[0]}, "
                    f"{features[1]}), the bits of bfloat16"
                )
        elif video.dtype != np.uint8 or video.shape[1:] != (side, side, 3):
            raise ValueError(
                f"frames are {video.dtype} {video.shape}; the encoder takes uint8 (frames, {side}, {side}, 3)"
            )
        if not len(video):
            raise ValueError("a video has no frames; leave its part out of the conversation, or give it one at least")


# Enough English for the tiny preset's BPE to learn the sample set's words; other text costs more tokens.
TINY_CORPUS = """
What colour is the shape? Which shape is it? Which way does it move? Which colour came first? What happens in the video?
red green blue yellow cyan magenta white black circle square triangle cross left right up down first second then
user assistant system the a an is are does do it in on of to and or which what who where when how
"""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE built from `TINY_CORPUS`, always the same: it spells any text, and nothing is downloaded."""
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
    # Each word with and without the space before it, several times over, so that it becomes one token.
    words = TINY_CORPUS.split()
    tokenizer.train_from_iterator([f"{word} {word} {word}\n" for word in words] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
