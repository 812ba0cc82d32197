"""What a CrossLMM model is made of: one vision encoder, one decoder, and how the two are joined."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig, SiglipVisionConfig

from crosslmm.model.pooling import pooled_grid


@strict
class CrossLMMConfig(PreTrainedConfig):
    """Configuration of `CrossLMMForConditionalGeneration`.

    Args:
        vision_config: any SigLIP vision configuration (or its dict).
        text_config: a decoder whose layers look like Qwen2's or Llama's (or its dict, with `model_type`).
        pool_stride: s in ceil(g/s)^2, the pooled tokens that one frame of g x g patches sends through the decoder.
        pooling: how a cell's patches become one token: bilinear (the paper's), average or max.
        cross_attention_every: K. Layers 0, K, 2K, ... carry the dual cross-attention; the paper's best is 4 (Table 2b).
            0 gives none. (Counted from the other end, the last layer would carry a V2V that no answer ever reads.)
        cross_attention_layers: these layers instead, counted from 0.
        v2v: whether visual positions look back at the original visual tokens (Table 2a).
        t2v: whether text positions do (Table 2a).
        v2v_scope: "video": a pooled token looks at its whole video, as in the paper; "frame": at its own frame, which
            makes the cost linear in frames.
        cross_attention_rotary: give queries and keys of the cross-attentions rotary positions over frames; the paper's
            have none.
        encoder_chunk: frames that go through one encoder layer, and without gradients through the projections of
            what it says, at a time. Beyond one hidden state of all frames they need memory for so many frames'
            intermediates only; the encoder in training with activation checkpointing too.
        video_token_id: the placeholder that stands in `input_ids` once for every pooled token.

    Raises:
        ValueError: a stride or depth outside of what the two backbones allow.
    """

    model_type = "crosslmm"
    sub_configs = {"vision_config": SiglipVisionConfig, "text_config": AutoConfig}  # noqa: RUF012

    vision_config: Any = None
    text_config: Any = None
    pool_stride: int = 9
    pooling: Literal["bilinear", "average", "max"] = "bilinear"
    cross_attention_every: int = 4
    cross_attention_layers: list[int] | None = None
    v2v: bool = True
    t2v: bool = True
    v2v_scope: Literal["video", "frame"] = "video"
    cross_attention_rotary: bool = False
    encoder_chunk: int = 4
    video_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = SiglipVisionConfig(**(self.vision_config or {}))
        # The attention-pooling head of SigLIP is never asked: the model reads patches.
        self.vision_config.vision_use_head = False
        if not isinstance(self.text_config, PreTrainedConfig):
            fields = dict(self.text_config or {"model_type": "qwen2"})
            self.text_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        super().__post_init__(**kwargs)

        if self.vision_config.image_size < self.vision_config.patch_size:
            raise ValueError(
                f"image_size is {self.vision_config.image_size} px, "
                f"smaller than one patch of {self.vision_config.patch_size} px"
            )
        if not 1 <= self.pool_stride <= self.grid_size:
            raise ValueError(
                f"pool_stride is {self.pool_stride}; "
                f"a {self.grid_size} x {self.grid_size} grid takes 1 to {self.grid_size}"
            )
        if self.encoder_chunk < 1:
            raise ValueError(f"encoder_chunk is {self.encoder_chunk}; it takes at least 1 frame")
        depth = self.text_config.num_hidden_layers
        if not 0 <= self.cross_attention_every <= depth:
            raise ValueError(
                f"cross_attention_every is {self.cross_attention_every}; "
                f"a decoder of {depth} layers takes 1 to {depth}, or 0 for none"
            )
        listed = self.cross_attention_layers or []
        if sorted(set(listed)) != listed or not all(0 <= layer < depth for layer in listed):
            raise ValueError(
                f"cross_attention_layers is {listed}; "
                f"a decoder of {depth} layers takes ascending numbers from 0 to {depth - 1}"
            )

    @property
    def grid_size(self) -> int:
        """g: patches along one side of a frame."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def patches_per_frame(self) -> int:
        """N: the original visual tokens of one frame."""
        return self.grid_size**2

    @property
    def tokens_per_frame(self) -> int:
        """Pooled tokens of one frame: what goes through the decoder."""
        return pooled_grid(self.grid_size, self.pool_stride) ** 2

    @property
    def dual_layers(self) -> list[int]:
        """Indices (from zero) of the decoder layers that carry the dual cross-attention."""
        if not (self.v2v or self.t2v):
            return []
        if self.cross_attention_layers is not None:
            return self.cross_attention_layers
        every = self.cross_attention_every
        return list(range(0, self.text_config.num_hidden_layers, every)) if every else []
