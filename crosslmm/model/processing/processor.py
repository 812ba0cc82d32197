"""The processor: converts chat messages and frames to the tensors that the model takes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, ProcessorMixin

from crosslmm.model.attention_plan import IGNORED, plan_videos
from crosslmm.model.configuration import AUTO_MODULE, write_auto_module
from crosslmm.model.processing import media
from crosslmm.model.processing.batch import count_frames, pad_tokens, require_frames, stack_frames
from crosslmm.model.processing.chat import (
    CHAT_TEMPLATE,
    VIDEO_TOKEN,
    ChatTokenizer,
    visual_parts,
    with_joined_answers,
)
from crosslmm.model.processing.frame_tokens import FrameTokens, Times
from crosslmm.model.processing.media import Frames, Kind, Sampling


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
        timestamps: write the time of each frame of a video before its tokens, as in training: "<12.0 seconds>". Images
            have none. A call whose videos have no known times is then refused.
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
        timestamps: bool = False,
    ) -> None:
        self.image_size = image_size
        self.tokens_per_frame = tokens_per_frame
        self.max_length = max_length
        self.num_frames = num_frames
        self.sampling = sampling
        self.fps = fps
        self.timestamps = timestamps
        self.auto_map = {"AutoProcessor": f"{AUTO_MODULE}.{type(self).__name__}"}
        template = chat_template or CHAT_TEMPLATE
        self._chat = ChatTokenizer(tokenizer, template)
        self.video_token_id = self._chat.video_id
        write = self._chat.encode_text if timestamps else None
        self._frame_tokens = FrameTokens(self.video_token_id, tokens_per_frame, write)
        super().__init__(tokenizer, chat_template=template)

    def __call__(
        self,
        messages: Sequence[list[dict[str, Any]]] | None = None,
        videos: Any = None,
        weights: Sequence[float] | None = None,
        for_generation: bool = False,
        features: tuple[int, int] | None = None,
        *,
        times: Any = None,
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
            for_generation: for `generate`: append the start of the assistant's turn and pad on the left.
            features: (patches, width): `videos` holds encoded features instead, each uint16 (frames, patches,
                width) with the bits of bfloat16.
            times: with `messages`: when each frame of each video of each sample is shown [s]; needed with `timestamps`.
                With `text`: see `process_text`.
            text: instead of `messages`: the arguments and the result are those of `process_text`.
            images: with `text`, as `videos`.
            options: with `text`, as in `process_text`.

        Returns:
            `input_ids`, `attention_mask` (B, L), `pixel_values` (F, 3, H, W) uint8 or else `features` (F, P, D)
            bfloat16, `num_frames` (B, M) with zeros where a sample has fewer than M videos, `plan`, the indices of
            attention, which the model would otherwise compute from them while the GPU waits, and, unless
            `for_generation`, `labels` (B, L) with -100 outside the assistant's answers.

        Raises:
            ValueError: the numbers of video parts and videos differ, a video has no frames, or none of its times are
                known where they are needed, frames or features have another dtype or shape, or a conversation does not
                fit the decoder's context.
            TypeError: an option is unknown.
        """
        if text is not None:
            return self.process_text(text, videos=videos, images=images, times=times, **options)
        if options or images is not None:
            first = min(options, default="images")
            raise TypeError(f"{first}: only with text=; messages have `apply_chat_template`")
        if messages is None or isinstance(videos, str):
            raise TypeError("give text=..., with videos= or images= as keywords; or a list of conversations and videos")
        ids, labels = [], []
        for i, (conversation, sample_videos) in enumerate(zip(messages, videos, strict=True)):
            for video in sample_videos:
                require_frames(video, self.image_size, features)
            counts = [len(video) for video in sample_videos]
            tokens, is_target = self._tokenize(conversation, counts, for_generation, times[i] if times else None)
            self._check_length(len(tokens))
            dropped = weights is not None and weights[i] == 0
            ids.append(torch.tensor(tokens))
            labels.append(
                torch.tensor([t if m and not dropped else IGNORED for t, m in zip(tokens, is_target, strict=True)])
            )
        side = "left" if for_generation else "right"
        batch = pad_tokens(ids, self.tokenizer.pad_token_id, side) | stack_frames(videos, self.image_size, features)
        batch["num_frames"] = count_frames(videos)
        if not for_generation:
            batch["labels"] = pad_sequence(labels, True, IGNORED, side)
        is_video_BL = batch["input_ids"] == self.video_token_id
        plan = plan_videos(is_video_BL, batch["num_frames"], self.tokens_per_frame, batch["attention_mask"])
        return BatchFeature({**batch, "plan": plan})

    def process_text(
        self,
        text: str | Sequence[str],
        videos: Any = None,
        images: Any = None,
        times: Any = None,
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
            times: when the frames of each video are shown, a list of seconds for each; needed with `timestamps` for
                arrays, tensors and lists. Files have times of their own.
            padding_side: "left" for `generate`, "right" for training.
            options: `num_frames`, `sampling`, `fps` of video files; `return_tensors="pt"`, which is the default.

        Returns:
            `input_ids`, `attention_mask`; and if there are videos, `pixel_values` and `num_frames`, as for a call with
            `messages`.

        Raises:
            ValueError: there are other videos than placeholders, a video cannot be read, times are unknown, or the
                result is too long.
            TypeError: an option is unknown.
        """
        prompts = [text] if isinstance(text, str) else list(text)
        if videos is not None and images is not None:
            raise ValueError(
                "videos and images have the same placeholder in a prompt, so their order is unknown; give messages to "
                "apply_chat_template(..., tokenize=True, return_dict=True), where each part has its video or image"
            )
        sampling = media.take_sampling(options, self)
        kind: media.Kind = "image" if videos is None else "video"
        given = media.flat_list(images if videos is None else videos, kind)
        ids = [self.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        counts = [tokens.count(self.video_token_id) for tokens in ids]
        if sum(counts) != len(given):
            raise ValueError(
                f"the text has {sum(counts)} placeholders {VIDEO_TOKEN}, and there are {len(given)} {kind}s"
            )
        read = [media.to_frames(one, kind, self.image_size, sampling) for one in given]
        stated = media.times_of_videos(times, [len(video) for video in read])
        frames = iter([media.with_times(video, of_video) for video, of_video in zip(read, stated, strict=True)])
        videos_of = [[(kind, next(frames)) for _ in range(count)] for count in counts]
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
                `{"type": "video", "video": "clip.mp4"}`. With frames in place of a file, it may say when they are
                shown: "times", a list of seconds, or "fps".
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
        conversations = [with_joined_answers(messages) for messages in conversations]
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
        sampling = media.take_sampling(options, self)
        ids, masks = [], []
        videos: list[list[tuple[Kind, Frames]]] = []
        for messages in conversations:
            videos.append([self._read_part(part, sampling) for part in visual_parts(messages)])
            tokens, mask = self._chat.encode(messages, add_generation_prompt)
            if continue_final_message:
                end = len(tokens) - 1 - tokens[::-1].index(self._chat.end_id)
                tokens, mask = tokens[:end], mask[:end]
            ids.append(tokens)
            masks.append(torch.tensor(self._expand(tokens, mask, videos[-1])[1]))
        batch = self._prompts(ids, videos, side)
        if return_assistant_tokens_mask:
            batch["assistant_masks"] = pad_sequence(masks, True, 0, side)
        return batch if return_dict else batch["input_ids"]

    def _read_part(self, part: dict[str, Any], sampling: Sampling) -> tuple[Kind, Frames]:
        """Return the kind and the frames of a message's part."""
        given, kind = media.visual_of_part(part)
        video = media.to_frames(given, kind, self.image_size, sampling)
        return kind, media.with_times(video, media.times_of_part(part, len(video)))

    def _prompts(self, ids: list[list[int]], videos: list[list[tuple[Kind, Frames]]], side: str) -> BatchFeature:
        """Return the batch of tokenised prompts, each with one placeholder per video."""
        expanded = [self._expand(tokens, tokens, sample)[0] for tokens, sample in zip(ids, videos, strict=True)]
        for tokens in expanded:
            self._check_length(len(tokens))
        batch = pad_tokens([torch.tensor(tokens) for tokens in expanded], self.tokenizer.pad_token_id, side)
        images = [[video.images for _, video in sample] for sample in videos]
        if any(images):
            batch |= stack_frames(images, self.image_size, None) | {"num_frames": count_frames(images)}
        return BatchFeature(batch)

    def _expand(
        self, ids: Sequence[int], targets: Sequence[int], videos: Sequence[tuple[Kind, Frames]]
    ) -> tuple[list[int], list[int]]:
        counts = [len(video) for _, video in videos]
        known = [video.times for _, video in videos]
        times = self._frame_tokens.require_times([kind for kind, _ in videos], counts, known)
        return self._frame_tokens.expand(ids, targets, counts, times)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a call returns for the model."""
        return ["input_ids", "attention_mask", "pixel_values", "num_frames", "plan"]

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> Any:  # type: ignore[override]
        """Save the processor, and `AUTO_MODULE` for programs that do not import this package."""
        saved = super().save_pretrained(save_directory, **options)
        write_auto_module(save_directory)
        return saved

    def length(
        self,
        conversation: list[dict[str, Any]],
        num_frames: Sequence[int],
        for_generation: bool = False,
        times: Sequence[Times] | None = None,
    ) -> int:
        """Return the number of tokens of a conversation whose videos have `num_frames` frames each.

        Args:
            conversation: messages.
            num_frames: frames of each of its videos and images.
            for_generation: as for a call.
            times: when each frame is shown [s]; needed with `timestamps`.
        """
        return len(self._tokenize(conversation, num_frames, for_generation, times)[0])

    def stamp_length(self, seconds: float) -> int:
        """Return the number of tokens of the time of a frame; 0 without `timestamps`."""
        return len(self._frame_tokens.expand([self.video_token_id], [0], [1], [[seconds]])[0]) - self.tokens_per_frame

    def answer_length(self, text: str) -> int:
        """Return the number of tokens of an answer, its end token included."""
        return len(self._chat.encode_text(text)) + 1

    def require_room(
        self,
        prompt: list[dict[str, Any]],
        num_frames: Sequence[int],
        reference: str,
        new_tokens: int,
        times: Sequence[Times] | None = None,
    ) -> None:
        """Raise ValueError if an answer as long as the reference could not be generated to its end.

        Args:
            prompt: conversation up to the answer.
            num_frames: frames of each of its videos.
            reference: the answer that the generated one will be compared with.
            new_tokens: how many tokens will be generated at most.
            times: when each frame is shown [s]; needed with `timestamps`.
        """
        if (length := self.answer_length(reference)) > new_tokens:
            raise ValueError(f"an answer takes {length} tokens, and at most {new_tokens} are generated")
        # The last new token is not fed back.
        self._check_length(self.length(prompt, num_frames, True, times) + new_tokens - 1)

    def _tokenize(
        self,
        conversation: list[dict[str, Any]],
        num_frames: Sequence[int],
        for_generation: bool,
        times: Sequence[Times] | None = None,
    ) -> tuple[list[int], list[int]]:
        """Return token ids and loss mask of one conversation, with the tokens of its frames in place of its videos."""
        ids, targets = self._chat.encode(conversation, for_generation)
        kinds: list[Kind] = [part["type"] for part in visual_parts(conversation)]
        if len(kinds) != len(num_frames):
            raise ValueError(
                f"the conversation has {len(kinds)} video or image parts, and there are {len(num_frames)} videos"
            )
        written = self._frame_tokens.require_times(kinds, num_frames, times)
        tokens, is_target = self._frame_tokens.expand(ids, targets, num_frames, written)
        if not for_generation and self.video_token_id not in tokens[self.max_length :]:
            # Truncate long text rather than lose the row. Frames are never cut.
            tokens, is_target = tokens[: self.max_length], is_target[: self.max_length]
        return tokens, is_target

    def _check_length(self, length: int) -> None:
        if length > self.max_length:
            raise ValueError(
                f"the conversation takes {length} positions, and the decoder has {self.max_length}: use less text, "
                f"fewer frames or a larger pool_stride (now {self.tokens_per_frame} tokens/frame)"
            )
