"""The processor: converts chat messages and frames to the tensors that the model takes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, ProcessorMixin

from crosslmm.model.configuration import AUTO_MODULE, write_auto_module
from crosslmm.model.processing import media
from crosslmm.model.processing.chat import CHAT_TEMPLATE, VIDEO_TOKEN, ChatTokenizer
from crosslmm.model.processing.media import Sampling

IGNORED = -100
"""Label of a position without loss."""


class CrossLMMProcessor(ProcessorMixin):
    """Chat messages and frames (or their features) -> `input_ids`, `labels`, `pixel_values`, `num_frames`.

    There are three ways in: `apply_chat_template` takes messages that name their videos and images, in any form;
    a call with `text` takes a prompt that has been formatted, and its videos; a call with `messages` is that of
    training, with decoded frames. Messages are text: `<|im_end|>` in a question becomes the tokens of these characters
    and ends no message. In a prompt it is the special token.

    Args:
        tokenizer: any fast tokenizer; `<|video_pad|>`, `<|im_start|>` and `<|im_end|>` are added where missing.
        image_size: side of the square frames [pixels].
        tokens_per_frame: pooled tokens per frame, `CrossLMMConfig.tokens_per_frame`.
        max_length: context length of the decoder [tokens]; longer training conversations are truncated.
        num_frames: frames sampled from a video file, at most; those of training are best.
        sampling: which frames: "uniform", "fps" or "fps_then_uniform", see `data.sampling`.
        fps: frame rate of the two fps policies [1/s].
    """

    video_token = VIDEO_TOKEN

    def __init__(
        self,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_size: int = 384,
        tokens_per_frame: int = 9,
        max_length: int = 32768,
        num_frames: int = 64,
        sampling: str = "uniform",
        fps: float = 1.0,
    ) -> None:
        self.image_size = image_size
        self.tokens_per_frame = tokens_per_frame
        self.max_length = max_length
        self.num_frames = num_frames
        self.sampling = sampling
        self.fps = fps
        self.auto_map = {"AutoProcessor": f"{AUTO_MODULE}.{type(self).__name__}"}
        template = chat_template or CHAT_TEMPLATE
        self._chat = ChatTokenizer(tokenizer, template)
        self.video_token_id = self._chat.video_id
        super().__init__(tokenizer, chat_template=template)

    def __call__(
        self,
        messages: Sequence[list[dict[str, Any]]] | None = None,
        videos: Any = None,
        weights: Sequence[float] | None = None,
        answer: bool = False,
        features: tuple[int, int] | None = None,
        *,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        **options: Any,
    ) -> BatchFeature:
        """Convert conversations, or prompts that have been formatted, to one padded batch.

        Args:
            messages: one conversation per sample, with a `{"type": "video"}` or `{"type": "image"}` part per video.
            videos: with `messages`: videos of each sample in the order of these parts, each uint8 (frames, image_size,
                image_size, 3); an image is a video of one frame. With `text`: see `process_text`.
            weights: 0 masks all labels of a sample (padding of the batch); default 1 for each.
            answer: for `generate`: append the start of the assistant's turn and pad on the left.
            features: (patches, width): `videos` holds encoded features instead, each uint16 (frames, patches,
                width) with the bits of bfloat16.
            text: instead of `messages`: the arguments and the result are those of `process_text`.
            images: with `text`, as `videos`.
            options: with `text`, as in `process_text`.

        Returns:
            `input_ids`, `attention_mask` (B, L), `pixel_values` (F, 3, H, W) uint8 or else `features` (F, P, D)
            bfloat16, `num_frames` (B, M) with zeros where a sample has fewer than M videos, and, unless `answer`,
            `labels` (B, L) with -100 outside the assistant's answers.

        Raises:
            ValueError: the numbers of video parts and videos differ, a video has no frames, frames or features have
                another dtype or shape, or a conversation does not fit the decoder's context.
            TypeError: an option is unknown.
        """
        if text is not None:
            return self.process_text(text, videos=videos, images=images, **options)
        if options or images is not None:
            raise TypeError(f"{min([*options, 'images'])}: only with text=; messages have `apply_chat_template`")
        if messages is None or isinstance(videos, str):
            raise TypeError("give text=..., with videos= or images= as keywords; or a list of conversations and videos")
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
        batch = self._pad(ids, side) | self._visual(arrays, features) | {"num_frames": self._num_frames(videos)}
        if not answer:
            batch["labels"] = pad_sequence(labels, True, IGNORED, side)
        return BatchFeature(batch)

    def process_text(
        self,
        text: str | Sequence[str],
        videos: Any = None,
        images: Any = None,
        padding_side: str = "left",
        **options: Any,
    ) -> BatchFeature:
        """Convert prompts that have been formatted, for example by `apply_chat_template(tokenize=False)`.

        Args:
            text: one prompt or several. Special tokens in it are special; `<|video_pad|>` stands for a video or image.
            videos: all videos, in the order of their placeholders: one, a list, or a list of lists, one per prompt.
                A video is a path or s3:// URI, an array or tensor (frames, height, width, 3) or (frames, 3, height,
                width), uint8 or floats from 0 to 1, or a list of frames.
            images: the same for images, which have one frame; PIL images too. Not together with `videos`.
            padding_side: "left" for `generate`, "right" for training.
            options: `num_frames`, `sampling`, `fps` of video files; `return_tensors="pt"`, which is the default.

        Returns:
            `input_ids`, `attention_mask`; and if there are videos, `pixel_values` and `num_frames`, as for a call with
            `messages`.

        Raises:
            ValueError: there are other videos than placeholders, a video cannot be read, or the result is too long.
            TypeError: an option is unknown.
        """
        prompts = [text] if isinstance(text, str) else list(text)
        if videos is not None and images is not None:
            raise ValueError(
                "videos and images have the same placeholder in a prompt, so their order is unknown; give messages to "
                "apply_chat_template(..., tokenize=True, return_dict=True), where each part has its video or image"
            )
        sampling = self._sampling(options)
        kind: media.Kind = "image" if videos is None else "video"
        given = media.flat_list(images if videos is None else videos, kind)
        ids = [self.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        counts = [tokens.count(self.video_token_id) for tokens in ids]
        if sum(counts) != len(given):
            raise ValueError(
                f"the text has {sum(counts)} placeholders {VIDEO_TOKEN}, and there are {len(given)} {kind}s"
            )
        frames = iter([media.to_frames(one, kind, self.image_size, sampling) for one in given])
        videos_of = [[next(frames) for _ in range(count)] for count in counts]
        return self._prompts(ids, videos_of, padding_side)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Format one conversation or several; with `tokenize`, also read their videos and images.

        Args:
            conversation: messages; a video or image part has what `process_text` takes under its type, "url" or "path":
                `{"type": "video", "video": "clip.mp4"}`.
            chat_template: another template than that of the model, whose special tokens are then special in texts too.
            tokenize: return tensors, not text.
            return_dict: return all of `process_text`, not `input_ids` alone.
            add_generation_prompt: append the start of the assistant's turn.
            continue_final_message: leave the last message, which must be the assistant's, open.
            return_assistant_tokens_mask: add `assistant_masks` (B, L), 1 at the tokens of answers.
            processor_kwargs: `num_frames`, `sampling`, `fps`, `padding_side`; also accepted as `options`.
            options: variables of the template.

        Raises:
            ValueError: a part has no video, or one that cannot be read; the conversation is too long.
        """
        conversations, is_batched = self._normalize_conversations(conversation)
        conversations = [_with_joined_answers(messages) for messages in conversations]
        if not tokenize or chat_template is not None:
            return super().apply_chat_template(
                conversations if is_batched else conversations[0],
                chat_template=chat_template,
                tokenize=tokenize,
                return_dict=return_dict,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                return_assistant_tokens_mask=return_assistant_tokens_mask,
                processor_kwargs=processor_kwargs,
                **options,
            )
        options = {**options, **(processor_kwargs or {})}
        is_prompt = add_generation_prompt or continue_final_message
        side = options.pop("padding_side", None) or ("left" if is_prompt else "right")
        sampling = self._sampling(options)
        ids, masks, videos = [], [], []
        for messages in conversations:
            videos.append(
                [media.to_frames(*media.of_part(part), self.image_size, sampling) for part in _visual_parts(messages)]
            )
            tokens, mask = self._chat.encode(messages, add_generation_prompt)
            if continue_final_message:
                end = len(tokens) - 1 - tokens[::-1].index(self._chat.end_id)
                tokens, mask = tokens[:end], mask[:end]
            ids.append(tokens)
            masks.append(torch.tensor(self._expand(tokens, mask, [len(video) for video in videos[-1]])[1]))
        batch = self._prompts(ids, videos, side)
        if return_assistant_tokens_mask:
            batch["assistant_masks"] = pad_sequence(masks, True, 0, side)
        return batch if return_dict else batch["input_ids"]

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        """Return how video files are sampled; any other option is either without effect here or unknown."""
        for nested in ("videos_kwargs", "images_kwargs", "text_kwargs"):
            options |= options.pop(nested, None) or {}
        chosen = {name: options.pop(name, None) for name in ("num_frames", "sampling", "fps")}
        if options.pop("return_tensors", None) not in (None, "pt", "auto"):
            raise ValueError('return_tensors: this processor returns PyTorch tensors, "pt"')
        for name, value in options.items():
            if name not in ("padding", "do_sample_frames", "add_special_tokens") and value:
                raise TypeError(f"{name} is not an option of this processor; it has num_frames, sampling and fps")
        return Sampling(**{name: value if value is not None else getattr(self, name) for name, value in chosen.items()})

    def _prompts(self, ids: list[list[int]], videos: list[list[np.ndarray]], side: str) -> BatchFeature:
        """Return the batch of tokenised prompts, each with one placeholder per video."""
        expanded = [
            self._expand(tokens, tokens, [len(video) for video in sample])[0]
            for tokens, sample in zip(ids, videos, strict=True)
        ]
        for tokens in expanded:
            self._check_length(len(tokens))
        batch = self._pad([torch.tensor(tokens) for tokens in expanded], side)
        arrays = [torch.from_numpy(video) for sample in videos for video in sample]
        if arrays:
            batch |= self._visual(arrays, None) | {"num_frames": self._num_frames(videos)}
        return BatchFeature(batch)

    def _pad(self, ids: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
        return {
            "input_ids": pad_sequence(ids, True, self.tokenizer.pad_token_id, side),
            "attention_mask": pad_sequence([torch.ones_like(tokens) for tokens in ids], True, 0, side),
        }

    @staticmethod
    def _num_frames(videos: Sequence[Sequence[np.ndarray]]) -> torch.Tensor:
        return pad_sequence([torch.tensor([len(v) for v in sample], dtype=torch.int64) for sample in videos], True)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a call returns for the model."""
        return ["input_ids", "attention_mask", "pixel_values", "num_frames"]

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> Any:  # type: ignore[override]
        """Save the processor, and `AUTO_MODULE` for programs that do not import this package."""
        saved = super().save_pretrained(save_directory, **options)
        write_auto_module(save_directory)
        return saved

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
        return len(self._chat.encode_text(text)) + 1

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
        ids, targets = self._chat.encode(conversation, answer)
        placeholders = ids.count(self.video_token_id)
        if placeholders != len(num_frames):
            raise ValueError(
                f"the conversation has {placeholders} video or image parts, and there are {len(num_frames)} videos"
            )
        tokens, is_target = self._expand(ids, targets, num_frames)
        if not answer and self.video_token_id not in tokens[self.max_length :]:
            # Truncate long text rather than lose the row. Frames are never cut.
            tokens, is_target = tokens[: self.max_length], is_target[: self.max_length]
        return tokens, is_target

    def _expand(
        self, ids: Sequence[int], targets: Sequence[int], num_frames: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Repeat each placeholder, and its entry in `targets`, once per pooled token of its video."""
        remaining = iter(num_frames)
        tokens, is_target = [], []
        for token, target in zip(ids, targets, strict=True):
            repeats = next(remaining) * self.tokens_per_frame if token == self.video_token_id else 1
            tokens += [token] * repeats
            is_target += [target] * repeats
        return tokens, is_target

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


def _visual_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    return [part for part in parts if part["type"] != "text"]


def _with_joined_answers(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages; an answer that is a list of texts becomes one text, as the template expects."""
    joined = []
    for message in messages:
        content = message["content"]
        if message["role"] == "assistant" and not isinstance(content, str):
            message = message | {"content": "".join(part["text"] for part in content)}
        joined.append(message)
    return joined
