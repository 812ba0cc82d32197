"""The sections of a run's configuration: every setting with its type, unit, default and role.

A field's docstring is the text of `--help`. Its role (`Role`) says what may happen to the value after a run has begun.
"""

import re
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from crosslmm.config.schema import (
    COMPARED,
    FEATURES,
    FIXED,
    FREE,
    NOT_SEARCHED,
    Count,
    Labels,
    Limit,
    Rate,
    Section,
    Share,
    setting,
)


class ModelConfig(Section):
    """The model."""

    vision: dict[str, Any] | None = setting(None, FIXED, FEATURES)
    """Vision encoder: fields of Transformers' `SiglipVisionConfig` (hidden_size, image_size [px], patch_size [px],
    ...); null takes the configuration of `vision_weights`."""
    language: dict[str, Any] | None = setting(None, FIXED)
    """Language model: `model_type` (qwen2, llama, ...) and the fields of its Transformers configuration; null takes the
    configuration of `language_weights`."""
    vision_weights: str | None = setting(None, FIXED, FEATURES)
    """SigLIP checkpoint: hub name, local folder or s3:// folder; null starts from random weights."""
    vision_revision: str | None = setting(None, FIXED, FEATURES)
    """Commit of `vision_weights` on the hub."""
    language_weights: str | None = setting(None, FIXED)
    """Checkpoint of the language model: hub name, local folder, s3:// folder, or a GGUF file (path or s3:// URI); null
    starts from random weights."""
    language_revision: str | None = setting(None, FIXED)
    """Commit of `language_weights` and `tokenizer` on the hub."""
    init_from: str | None = setting(None, FIXED, FEATURES)
    """Exported CrossLMM to start from, such as the `model` folder of a stage-1 run (path or s3:// URI)."""
    tokenizer: str = setting("tiny", FIXED)
    """Tokenizer: hub name, folder or GGUF file; "tiny" is built without a download."""
    pool_stride: Count = setting(9, FIXED)
    """Pooling stride s: a frame of g x g patches becomes ceil(g/s)^2 tokens; 1 keeps all [patches]."""
    pooling: Literal["bilinear", "average", "max"] = setting("bilinear", FIXED)
    """How the patches of one cell become one token."""
    cross_attention_every: Annotated[int, Field(ge=0)] = setting(4, FIXED)
    """K: every K-th decoder layer has the dual cross-attention; 0 for none [layers]."""
    cross_attention_layers: list[int] | None = setting(None, FIXED)
    """Decoder layers with the dual cross-attention, counted from 0, instead of every K-th."""
    v2v: bool = setting(True, FIXED)
    """Visual-to-visual cross-attention: pooled tokens attend to the original visual tokens."""
    t2v: bool = setting(True, FIXED)
    """Text-to-visual cross-attention: text attends to the original visual tokens of the videos before it."""
    v2v_scope: Literal["video", "frame"] = setting("video", FIXED)
    """What a pooled token attends to: its whole video, or its own frame, whose cost is linear in frames."""
    cross_attention_rotary: bool = setting(False, FIXED)
    """Rotary positions over frames in the cross-attentions (the paper has none)."""
    encoder_chunk: Count = setting(4, FREE)
    """Frames that go through the vision encoder at once; more is faster and takes more memory [frames]."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = setting("sdpa", FREE)
    """Attention kernels. auto is the fastest that was measured, sdpa; flash_attention_2 needs the `flash` extra."""


class DataConfig(Section):
    """The data."""

    # The digests of manifests and features are fixed (preflight/resume.py), not their addresses.
    manifest: dict[str, Count] | str = setting("sample", FREE, FEATURES)
    """Training manifest (path or s3:// URI): a file, a folder, or a pattern of names, in any form of docs/data.md; or a
    folder of jobs/prepare.py. A mixture is {manifest: share, ...} with integer shares. "sample" generates a sample
    set."""
    validation_manifest: str | None = setting(None, FREE, FEATURES)
    """Held-out manifest; null skips validation (with "sample": the sample set's own)."""
    roots: list[str] = setting([], FREE, FEATURES)
    """Further folders that videos may lie in, besides the manifest's own (paths or s3:// URIs). A row that names
    anything else is malformed."""
    features: str | None = setting(None, FREE, FEATURES)
    """Folder that jobs/encode.py printed: features to read instead of videos. Needs a frozen vision encoder."""
    num_frames: Count = setting(64, FIXED, FEATURES)
    """Frames sampled from a video, at most [frames]."""
    sampling: Literal["uniform", "fps", "fps_then_uniform"] = setting("uniform", FIXED, FEATURES)
    """Which frames: uniform spreads num_frames evenly; fps takes one every 1/fps s, the first num_frames of them;
    fps_then_uniform does the same, but spreads num_frames evenly where there are more (LLaVA-Video's policy)."""
    fps: Annotated[float, Field(gt=0)] = setting(1.0, FIXED, FEATURES)
    """Frame rate of the two fps policies [1/s]."""
    timestamps: bool = setting(False, FIXED)
    """Write the time of each frame of a video before its tokens, as the text "<12.0 seconds>" (the paper does not).
    Images have none. The model keeps the setting: prompts in validation, evaluation and serving have the times, too."""
    decoder: Literal["auto", "pyav", "decord", "torchcodec"] = setting("auto", FIXED, FEATURES)
    """Decoding library; auto is pyav (measurements: docs/decisions.md)."""
    decode_timeout_s: Annotated[float, Field(gt=0)] = setting(60.0, FREE, FEATURES)
    """Deadline for one video; then its decoder is killed and the video counts as unreadable [s]."""
    decode_memory_gib: Annotated[float, Field(gt=0)] = setting(2.0, FREE, FEATURES)
    """Memory limit of a decoder process; a video that needs more is unreadable. Each decoder reserves it on its node
    [GiB]."""
    max_video_bytes: Count = setting(64 * 2**30, FIXED, FEATURES)
    """Largest video file that is opened [bytes]."""
    max_video_s: Annotated[float, Field(gt=0)] = setting(24 * 3600.0, FIXED, FEATURES)
    """Longest video that is decoded [s]."""
    max_frame_pixels: Count = setting(8192 * 4352, FIXED, FEATURES)
    """Largest frame that is decoded, width x height [px]."""
    max_bad_share: Share = setting(0.1, FREE, FEATURES)
    """Share of unreadable videos, per worker per manifest, beyond which the run stops."""
    bad_allowed: Annotated[int, Field(ge=0)] = setting(20, FREE, FEATURES)
    """Unreadable videos per worker per manifest that never stop a run, whatever their share [videos]."""

    @model_validator(mode="after")
    def _manifests_have_shares(self) -> "DataConfig":
        if not self.manifest or (isinstance(self.manifest, str) and self.manifest.startswith("{")):
            raise ValueError(
                f"manifest: {self.manifest} is neither a path nor a URI nor {{manifest: share, ...}} with integer "
                "shares of at least 1"
            )
        return self

    @property
    def manifests(self) -> dict[str, int]:
        """Share of each training manifest."""
        return {self.manifest: 1} if isinstance(self.manifest, str) else self.manifest


class LearningRates(Section):
    """Peak learning rate per component (paper, Table 3); 0 freezes it."""

    vision: Rate = setting(0.0, FIXED, FEATURES)
    """Vision encoder."""
    projector: Rate = setting(1e-3, FIXED)
    """Projector."""
    v2v: Rate = setting(1e-3, FIXED)
    """Visual-to-visual cross-attentions."""
    t2v: Rate = setting(0.0, FIXED)
    """Text-to-visual cross-attentions."""
    decoder: Rate = setting(0.0, FIXED)
    """Language model, with embeddings and output head."""

    @model_validator(mode="after")
    def _something_learns(self) -> "LearningRates":
        if not any(self.model_dump().values()):
            raise ValueError("every component is frozen; give at least one a rate")
        return self


class LoraConfig(Section):
    """Low-rank adapters (LoRA), trained in place of the encoder's, decoder's or cross-attentions' own weights."""

    rank: Count | None = setting(None, FIXED)
    """Rank of the adapters; null trains none."""
    alpha: Limit = setting(32.0, FIXED)
    """What an adapter adds is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = setting(0.0, FIXED)
    """Dropout probability of an adapter's inputs."""
    targets: list[Literal["vision", "v2v", "t2v", "decoder"]] = setting(["decoder"], FIXED)
    """Components whose linear layers get an adapter, which learns at the component's rate; their own weights are
    frozen. A projector, or a cross-attention that is not listed, trains all its weights if its rate is above 0."""


Recomputed = Literal["none", "selective", "full"]
"""What the backward pass recomputes of a layer: nothing; all but matrix products and attention, whose results are kept;
everything."""


class Checkpointing(NamedTuple):
    """What is recomputed, by part of the model."""

    encoder: Recomputed
    decoder: Recomputed
    """With its cross-attentions."""


class TrainConfig(Section):
    """Training."""

    epochs: Count = setting(1, FIXED)
    """Passes over the data [epochs]."""
    max_steps: Count | None = setting(None, FIXED)
    """Upper limit of optimizer steps, whatever `epochs` says; null for none [steps]."""
    global_batch_size: Count = setting(128, FIXED)
    """Samples per optimizer step, over all workers [samples]."""
    micro_batch_size: Count = setting(1, FREE)
    """Samples that one worker processes at once; gradients accumulate over the rest [samples]."""
    micro_batch_tokens: Count | None = setting(None, FREE)
    """Instead of `micro_batch_size`: tokens that one worker processes at once, visual tokens and padding included.
    Groups samples of similar length and balances tokens over workers [tokens]."""
    learning_rate: LearningRates = LearningRates()
    """Peak learning rate per component."""
    lora: LoraConfig = LoraConfig()
    """Adapters."""
    warmup_steps: Annotated[int, Field(ge=0)] = setting(100, FIXED)
    """Linear warm-up; a cosine to `final_learning_rate_share` at the last step follows [steps]."""
    final_learning_rate_share: Share = setting(0.0, FIXED)
    """Learning rate at the last step, as a share of its peak."""
    weight_decay: Annotated[float, Field(ge=0)] = setting(0.0, FIXED)
    """AdamW's decoupled weight decay, on matrices only."""
    max_grad_norm: Annotated[float, Field(gt=0)] = setting(1.0, FIXED)
    """Gradients are clipped to this global L2 norm."""
    not_finite: Literal["stop", "skip"] = setting("stop", FREE)
    """At a non-finite gradient: stop the run, or skip the step. Both list the step's samples in the run's `not_finite`
    folder."""
    precision: Literal["auto", "fp32", "bf16"] = setting("fp32", FIXED, FEATURES)
    """Compute precision. bf16 keeps float32 weights and reduces gradients in float32; auto is bf16 on GPUs that support
    it. A run keeps what was chosen when it began."""
    float8: bool = setting(False, FREE, COMPARED)
    """Matrix products of the linear layers in FP8, which needs precision bf16, the `fp8` extra and a GPU with FP8 (Ada,
    Hopper or newer; CPUs emulate it, slowly). Faster with `compile`. Weights, checkpoints and model are as without
    it."""
    activation_checkpointing: (
        bool | Literal["auto", "none", "selective", "full"] | dict[Literal["encoder", "decoder"], Recomputed]
    ) = setting(False, FREE)
    """What the backward pass recomputes instead of keeping it: none (false), selective (all but matrix products and
    attention, flash_attention_2 excepted), full (true), or {encoder: ..., decoder: ...}. auto chooses at each start
    what the GPU's memory allows; `python jobs/plan.py` says what that would be."""
    balance_frames: bool = setting(True, FREE)
    """Deal frames evenly to the workers for encoding, where their micro-batches have different numbers of frames.
    Results differ from those without it by rounding."""
    compile: bool = setting(False, FIXED)
    """Compile the model's blocks with torch.compile, which fuses their small kernels. It takes minutes at the start of
    each worker and, on CPUs, needs a C++ compiler. Results differ from those without it by rounding."""
    checkpoint_every: Count = setting(500, FREE)
    """Interval between checkpoints; one more comes at the end [steps]."""
    keep_checkpoints: Count = setting(2, FREE)
    """Newest checkpoints that are kept [checkpoints]."""
    keep_best: Annotated[str, Field(pattern=r"^validation/(loss|accuracy(/.+)?)$")] | None = setting(None, FREE)
    """Also keep the best checkpoint by this metric of the validation before it: `validation/accuracy`, that of a kind
    of question (`validation/accuracy/KIND`), or `validation/loss`."""
    validate_every: Count = setting(500, FREE, COMPARED)
    """Interval between validations; one more comes at the end [steps]."""
    max_new_tokens: Count | None = setting(None, FREE, COMPARED)
    """Length limit of a generated answer in validation; null takes it from the longest answer of the validation set. A
    limit shorter than one of these answers is refused [tokens]."""

    @model_validator(mode="after")
    def _float8_comes_with_bf16(self) -> "TrainConfig":
        if self.float8 and self.precision == "fp32":
            raise ValueError("float8: it needs train.precision bf16; set that, or train.float8 to false")
        return self

    @model_validator(mode="after")
    def _compiled_blocks_are_recomputed_whole(self) -> "TrainConfig":
        if self.compile and self.activation_checkpointing != "auto" and "selective" in self.checkpointing:
            raise ValueError(
                "activation_checkpointing selective, and compile: a compiled block is recomputed as a whole; use "
                "none, full or auto"
            )
        return self

    @property
    def checkpointing(self) -> Checkpointing:
        """What is recomputed, by part; `auto` has been replaced by then."""
        chosen = self.activation_checkpointing
        assert chosen != "auto", "crosslmm.preflight replaces it"
        if isinstance(chosen, dict):
            return Checkpointing(chosen.get("encoder", "none"), chosen.get("decoder", "none"))
        of_both: Recomputed = ("full" if chosen else "none") if isinstance(chosen, bool) else chosen
        return Checkpointing(of_both, of_both)

    @property
    def adapted(self) -> frozenset[str]:
        """Components that learn through adapters."""
        return frozenset(self.lora.targets if self.lora.rank else ())


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = setting(None, FREE, NOT_SEARCHED)
    """MLflow tracking URI; null takes MLFLOW_TRACKING_URI, else sqlite:///mlflow.db."""
    experiment: Annotated[str, Field(min_length=1, max_length=500)] = setting("crosslmm", FREE, NOT_SEARCHED)
    """MLflow experiment."""
    artifacts: str | None = setting(None, FREE, NOT_SEARCHED)
    """Artifact location of a new experiment (path or s3:// URI); null takes MLflow's default."""
    registered_model: Annotated[str, Field(pattern=r"^[^/:\s][^/:]*$", max_length=200)] = setting(
        "crosslmm", FREE, NOT_SEARCHED
    )
    """Name in the model registry; no slash and no colon."""
    alias: Annotated[str, Field(pattern=r"^[\w-]+$", max_length=200)] = setting("candidate", FREE, NOT_SEARCHED)
    """Alias of the newly registered version: letters, digits, _ and -; neither `latest` nor v and a number."""

    @model_validator(mode="after")
    def _alias_is_not_reserved(self) -> "TrackingConfig":
        if re.fullmatch(r"latest|v\d+", self.alias, re.IGNORECASE):
            raise ValueError(f"alias: {self.alias} is a name that MLflow reserves; take another")
        return self


class NodeType(Section):
    """Nodes that an autoscaler adds."""

    most: Count
    """Nodes of this type at a time, at most [nodes]."""
    resources: dict[str, Limit]
    """Resources of one node: CPU [cores], GPU [GPUs], memory and object_store_memory [bytes], and custom ones."""
    labels: Labels = Field({})
    """Labels of each node."""


class ScalingConfig(Section):
    """Hardware and placement. A cluster's own file, such as cluster/run.yaml, sets placement; a laptop needs none."""

    num_workers: Count | tuple[Count, Count] = setting(1, FREE)
    """Training workers, one FSDP rank each. [min, max] uses as many as there is room for, at each start and when nodes
    come or go; where their number does not divide the batch, some have fewer samples."""
    workers_per_replica: Count | None = setting(None, FREE)
    """Hybrid sharding: workers that hold one copy of the model between them, best as many as a node has GPUs, so that
    weights are gathered within a node and only gradients pass between nodes. Null takes all workers. Where it does not
    divide their number, the next larger number that does is taken, since fewer workers would need more memory each
    [workers]."""
    resize_every_s: Annotated[float, Field(ge=0)] = setting(60.0, FREE)
    """With [min, max]: interval at which a run looks for room to grow, which restarts it from its last checkpoint
    [s]."""
    use_gpu: bool = setting(True, FREE)
    """Train on GPUs with NCCL, one per worker; false trains on CPUs with gloo."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = setting(4, FREE)
    """CPUs that a training worker reserves; it computes with as many threads, at least one [cores]."""
    decode_workers: Count = setting(8, FREE)
    """Video decoders for training; validation, if there is any, gets as many more."""
    cpus_per_decode_worker: Annotated[float, Field(gt=0)] = setting(1, FREE)
    """CPUs that a decoder reserves [cores]."""
    max_failures: Annotated[int, Field(ge=0)] = setting(3, FREE)
    """Restarts in a row without a new checkpoint, after which the run gives up."""
    train_on: Labels = setting({}, FREE)
    """Labels of the nodes that train, such as {crosslmm.io/role: train}; empty: any node."""
    decode_on: Labels = setting({}, FREE)
    """Labels of the nodes that decode video; empty: any node."""
    drive_on: Labels = setting({}, FREE)
    """Labels of the driver's node, which must not be a spot node. `ray job submit` places a driver on the head; a
    driver on a node without these labels is refused."""
    worker_resources: dict[str, Limit] = setting({}, FREE)
    """Custom resources that a training worker reserves besides CPUs and GPU."""
    node_types: list[NodeType] = setting([], FREE)
    """Nodes that the cluster's autoscaler may add (Ray does not report them): [{most: 4, resources: {CPU: 48, GPU: 4},
    labels: {crosslmm.io/role: train}}, ...]; empty: none."""

    @model_validator(mode="after")
    def _minimum_comes_first(self) -> "ScalingConfig":
        if self.least_workers > self.most_workers:
            raise ValueError(f"num_workers is {self.num_workers}; give [min, max]")
        return self

    @property
    def least_workers(self) -> int:
        """Minimum number of training workers."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """Maximum number of training workers, for which room and memory are planned."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def planned_shards(self) -> int:
        """Number of shards of the model for which memory is planned: with `most_workers` workers."""
        return min(self.workers_per_replica or self.most_workers, self.most_workers)

    def shards(self, workers: int) -> int:
        """Return the number of shards of the model: the lowest that divides the number of workers there are and is not
        below `workers_per_replica`, since a worker's shard must not become larger than planned."""
        least = min(self.workers_per_replica or workers, workers)
        return next(shards for shards in range(least, workers + 1) if workers % shards == 0)


class WatchdogConfig(Section):
    """Time limits of a rank's phases. When one is exceeded, all ranks write their stacks to the run's `stacks` folder,
    and the workers restart from the last checkpoint. While one rank waits for data, the others wait for it in their
    step, so `step_s` should exceed `data_s`."""

    startup_s: Limit = setting(1800.0, FREE)
    """From a worker's start to its first step: weights, checkpoint, first samples [s]."""
    data_s: Limit = setting(900.0, FREE)
    """Waiting for the samples of one step [s]."""
    step_s: Limit = setting(1200.0, FREE)
    """One step [s]."""
    validation_s: Limit = setting(3600.0, FREE)
    """One validation [s]."""
    checkpoint_s: Limit = setting(1800.0, FREE)
    """Waiting for one checkpoint, or for the export at the end [s]."""
