"""Configuration of the model: a vision encoder, a decoder, and how they are connected."""

from pathlib import Path
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig, SiglipVisionConfig

from crosslmm.model.pooling import pooled_grid

AUTO_MODEL_CLASSES = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
"""The classes of Transformers that load this model."""
AUTO_MODULE = "crosslmm_auto"
"""Module beside the weights that `auto_map` names: where this package is installed but not imported, Transformers says
that the folder needs code, and with trust_remote_code=True runs this module, which imports the package."""
AUTO_SOURCE = """\
# The classes of this model are those of the package crosslmm: `pip install crosslmm`, then `import crosslmm` before
# AutoModel or AutoProcessor. trust_remote_code=True, which runs this file, does the same.
from crosslmm.model import CrossLMMConfig, CrossLMMForConditionalGeneration, CrossLMMProcessor
"""


def write_auto_module(folder: str | Path) -> None:
    """Write `AUTO_MODULE` into the folder of a saved model or processor."""
    Path(folder, f"{AUTO_MODULE}.py").write_text(AUTO_SOURCE)


@strict
class CrossLMMConfig(PreTrainedConfig):
    """Configuration of `CrossLMMForConditionalGeneration`.

    Args:
        vision_config: any SigLIP vision configuration (or its dict).
        text_config: a decoder with Qwen2 or Llama layers (or its dict, with `model_type`).
        pool_stride: s: a frame of g x g patches becomes ceil(g/s)^2 pooled tokens.
        pooling: how the patches of a cell become one token: "bilinear" (as in the paper), "average" or "max".
        cross_attention_every: K. Layers 0, K, 2K, ... have the dual cross-attention; the paper's best is 4 (Table 2b);
            0 disables it. (Counting back from the last layer would waste that layer's V2V: no text reads its output.)
        cross_attention_layers: indices of these layers from 0; overrides `cross_attention_every`.
        v2v: whether pooled visual tokens attend to the original visual tokens (Table 2a).
        t2v: whether text tokens attend to the original visual tokens (Table 2a).
        v2v_scope: "video": a pooled token attends to its full video, as in the paper; "frame": to its own frame only,
            which makes the cost linear in the number of frames.
        cross_attention_rotary: rotate queries and keys of the cross-attentions by their frame index (RoPE). The paper
            uses no positions.
        encoder_chunk: frames that one encoder layer processes at a time; without gradients also the projections of the
            encoder's output. Limits the memory for intermediate tensors to this many frames, also in training with
            activation checkpointing; only one hidden state of all frames remains.
        video_token_id: id of the placeholder token; `input_ids` has one per pooled token.

    Raises:
        ValueError: a stride, layer index or interval does not fit the encoder or decoder.
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
        # The model reads patches; the attention-pooling head of SigLIP is not used.
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
        layers = self.cross_attention_layers or []
        if sorted(set(layers)) != layers or not all(0 <= layer < depth for layer in layers):
            raise ValueError(
                f"cross_attention_layers is {layers}; "
                f"a decoder of {depth} layers takes ascending numbers from 0 to {depth - 1}"
            )

        model = f"{AUTO_MODULE}.CrossLMMForConditionalGeneration"
        self.auto_map = {"AutoConfig": f"{AUTO_MODULE}.CrossLMMConfig"} | dict.fromkeys(AUTO_MODEL_CLASSES, model)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> Any:  # type: ignore[override]
        """Save the configuration, and `AUTO_MODULE` for programs that do not import this package."""
        saved = super().save_pretrained(save_directory, **options)
        write_auto_module(save_directory)
        return saved

    @property
    def grid_size(self) -> int:
        """Patches along one side of a frame (g)."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def patches_per_frame(self) -> int:
        """Original visual tokens of one frame (the paper's N)."""
        return self.grid_size**2

    @property
    def tokens_per_frame(self) -> int:
        """Pooled visual tokens of one frame, which go through the decoder."""
        return pooled_grid(self.grid_size, self.pool_stride) ** 2

    @property
    def dual_layers(self) -> list[int]:
        """Indices (from zero) of the decoder layers with the dual cross-attention."""
        if not (self.v2v or self.t2v):
            return []
        if self.cross_attention_layers is not None:
            return self.cross_attention_layers
        every = self.cross_attention_every
        return list(range(0, self.text_config.num_hidden_layers, every)) if every else []
