"""The one schema of a run: typed, validated, with units."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

USERINFO = re.compile(r"(?<=://)(?:[^/\s@]*|[^/\s:@]*:(?!\d+(?:/|$))[^\s@]*)@")
"""User and password in a URI; in place of a port, a password may hold slashes, as the keys of S3 do."""

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0)]
Limit = Annotated[float, Field(gt=0)]
# As Kubernetes and Ray have them; an optional domain, a slash, a name.
LabelKey = Annotated[
    str, Field(pattern=r"^([a-zA-Z0-9][a-zA-Z0-9.-]*/)?[a-zA-Z0-9]([\w.-]*[a-zA-Z0-9])?$", max_length=316)
]
LabelValue = Annotated[str, Field(pattern=r"^[a-zA-Z0-9]([\w.-]*[a-zA-Z0-9])?$", max_length=63)]
Labels = dict[LabelKey, LabelValue]
"""Of a node, and what a node must have."""


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values never change after the checks."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """What is trained."""

    vision: dict[str, Any] | None = None
    """Fields of Transformers' `SiglipVisionConfig`: hidden_size, image_size [px], patch_size [px], ...; null takes what
    the configuration of `vision_weights` says."""
    language: dict[str, Any] | None = None
    """`model_type` (qwen2, llama, ...) and the fields of that decoder's configuration; null takes what the
    configuration of `language_weights` says."""
    vision_weights: str | None = None
    """SigLIP checkpoint: hub name, local directory or s3:// folder; null starts from random weights."""
    vision_revision: str | None = None
    """Commit of `vision_weights` on the hub."""
    language_weights: str | None = None
    """Decoder checkpoint: hub name, local directory or s3:// folder, or a GGUF file (path or s3:// URI); null starts
    from random weights."""
    language_revision: str | None = None
    """Commit of `language_weights` and `tokenizer` on the hub."""
    init_from: str | None = None
    """Folder (path or s3:// URI) of a whole exported CrossLMM to start from, such as stage 1's `model`; null: none."""
    tokenizer: str = "tiny"
    """Fast tokenizer: whatever `language_weights` takes; "tiny" is built on the spot, without a download."""
    pool_stride: Count = 9
    """s: a frame of g x g patches sends ceil(g/s)^2 tokens through the decoder; 1 sends all [patches]."""
    pooling: Literal["bilinear", "average", "max"] = "bilinear"
    """How the patches of a cell become one token."""
    cross_attention_every: Annotated[int, Field(ge=0)] = 4
    """K: every K-th decoder layer carries the dual cross-attention; 0 for none [layers]."""
    cross_attention_layers: list[int] | None = None
    """These decoder layers instead, counted from 0; null for every K-th [layers]."""
    v2v: bool = True
    """Visual positions look back at all original visual tokens."""
    t2v: bool = True
    """Text positions look back at all original visual tokens of the videos before them."""
    v2v_scope: Literal["video", "frame"] = "video"
    """What a pooled token looks back at: its whole video, or its own frame alone, which costs linearly in frames."""
    cross_attention_rotary: bool = False
    """Rotary positions over frames in the cross-attentions; the paper has none."""
    encoder_chunk: Count = 4
    """Frames that the vision encoder holds intermediates of at a time [frames]."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernels; flash_attention_2 needs a GPU, bf16 and the `flash` extra. auto takes it where the nodes that
    train have all of these, and sdpa elsewhere."""


class DataConfig(Section):
    """What it is trained on."""

    manifest: dict[str, Count] | str = "sample"
    """JSONL, JSON (LLaVA's) or Parquet manifest, a folder of videos with sidecars, or what jobs/prepare.py made of one;
    path or s3:// URI. Several as {manifest: share, ...}: of each sum-of-shares samples so many are its own.
    "sample" generates the sample set (with its held-out manifest) if missing."""
    validation_manifest: str | None = None
    """Held-out manifest, path or URI; null validates nothing (with "sample": the sample set's own)."""
    roots: list[str] = []
    """Folders (paths or s3:// URIs) that a manifest's videos may lie in, besides the manifest's own folder (a prepared
    one's is itself). A row that names anything else is malformed, a link that leads out is an unreadable video."""
    features: str | None = None
    """Folder (path or s3:// URI) that jobs/encode.py printed: its features are read instead of videos, and the vision
    encoder, which must be frozen, does not run; null reads videos."""
    num_frames: Count = 64
    """The most frames sampled from a video, fewer where it has fewer [frames]."""
    sampling: Literal["uniform", "fps", "fps_then_uniform"] = "uniform"
    """Which frames: num_frames spread evenly; one every 1/fps s, the first num_frames of them; or the same, spread
    evenly where they would be too many (LLaVA-Video's)."""
    fps: Annotated[float, Field(gt=0)] = 1.0
    """Frames per second of video that the two fps policies look at [1/s]."""
    decoder: Literal["auto", "pyav", "decord", "torchcodec"] = "auto"
    """Which library decodes; auto is pyav, by the measurements in docs/decisions.md."""
    decode_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Wall clock for one video, after which its decoder is killed and the row is counted as unreadable [s]."""
    decode_memory_gib: Annotated[float, Field(gt=0)] = 4.0
    """Memory that a decoding process may take for one video, which is unreadable beyond it [GiB]."""
    max_video_bytes: Count = 64 * 2**30
    """Largest video that is opened [bytes]."""
    max_video_s: Annotated[float, Field(gt=0)] = 24 * 3600.0
    """Longest video that is decoded [s]."""
    max_frame_pixels: Count = 8192 * 4352
    """Largest frame that is decoded, width x height [px]."""
    max_bad_share: Share = 0.1
    """Share of a worker's samples from one manifest whose videos may be unreadable; beyond it the run stops and says
    why."""
    bad_allowed: Annotated[int, Field(ge=0)] = 20
    """So many unreadable videos of a worker and manifest never stop a run, whatever their share [videos]."""

    @model_validator(mode="after")
    def _manifests_have_shares(self) -> "DataConfig":
        if not self.manifest or (isinstance(self.manifest, str) and self.manifest.startswith("{")):
            raise ValueError(
                f"manifest: {self.manifest} is neither a place nor {{place: share, ...}} with shares that are whole "
                "numbers from 1"
            )
        return self

    @property
    def manifests(self) -> dict[str, int]:
        """Share of each training manifest."""
        return {self.manifest: 1} if isinstance(self.manifest, str) else self.manifest


class LearningRates(Section):
    """Peak learning rate of each component (Table 3); 0 freezes it."""

    vision: Rate = 0.0
    """The vision encoder."""
    projector: Rate = 1e-3
    """The projector."""
    v2v: Rate = 1e-3
    """Visual-to-visual cross-attentions."""
    t2v: Rate = 0.0
    """Text-to-visual cross-attentions."""
    decoder: Rate = 0.0
    """The language model, embeddings and output head included."""

    @model_validator(mode="after")
    def _something_learns(self) -> "LearningRates":
        if not any(self.model_dump().values()):
            raise ValueError("every component is frozen; give at least one a rate")
        return self


class TrainConfig(Section):
    """How it is trained."""

    epochs: Count = 1
    """Passes over the manifest."""
    max_steps: Count | None = None
    """Stop after so many optimizer steps, whatever `epochs` says; null for all [steps]."""
    global_batch_size: Count = 128
    """Samples of one optimizer step, over all workers [samples]."""
    micro_batch_size: Count = 1
    """Samples that one worker holds at once; the rest is accumulated [samples]."""
    micro_batch_tokens: Count | None = None
    """Instead of it, in training: the most tokens that one worker holds at once, visual ones and padding included.
    Samples of like length go together, and each worker gets about as many tokens of a step [tokens]."""
    learning_rate: LearningRates = LearningRates()
    """Peak learning rates by component."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Linear warm-up [steps]; the cosine that follows ends at `final_learning_rate_share` with the last step."""
    final_learning_rate_share: Share = 0.0
    """Learning rate at the end, as a share of its peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled decay, on matrices only."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this global L2 norm."""
    not_finite: Literal["stop", "skip"] = "stop"
    """What becomes of a step whose gradient is not a number: the run stops, to be looked at, or goes on without it. Its
    samples are named in the run's `not_finite` folder in both."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """Arithmetic; bf16 keeps float32 weights and reduces gradients in float32. auto is bf16 on GPUs that have it, and
    fp32 elsewhere; the run keeps what was chosen when it began."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    checkpoint_every: Count = 500
    """Save a checkpoint every so many steps, and at the end [steps]."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept in storage [checkpoints]."""
    keep_best: str | None = None
    """Keep the best checkpoint too, by this metric of the validation before it, `validation/accuracy` (the highest) or
    `validation/loss` (the lowest); null keeps the newest alone."""
    validate_every: Count = 500
    """Validate every so many steps, and at the end [steps]."""
    max_new_tokens: Count = 16
    """Longest answer in validation [tokens]."""


class TrackingConfig(Section):
    """Where the record goes."""

    uri: str | None = None
    """MLflow tracking URI; null takes MLFLOW_TRACKING_URI, or else sqlite:///mlflow.db."""
    experiment: str = "crosslmm"
    """MLflow experiment."""
    artifacts: str | None = None
    """Root of the experiment's artifacts, path or s3:// URI, when it is created; null: MLflow's default."""
    registered_model: str = "crosslmm"
    """Name in the model registry."""
    alias: str = "candidate"
    """Alias that the newly registered version is given."""


class NodeType(Section):
    """Nodes that an autoscaler adds."""

    most: Count
    """So many of them at a time [nodes]."""
    resources: dict[str, Limit]
    """Of one of them: CPU [cores], GPU [GPUs], object_store_memory [bytes], and what else it has."""
    labels: Labels = {}
    """Of each of them."""


class ScalingConfig(Section):
    """What it runs on, and where. A cluster's own file says where, such as cluster/run.yaml; a laptop needs none."""

    num_workers: Count | tuple[Count, Count] = 1
    """Training processes, one FSDP rank each. [min, max] trains on as many as there is room for, at the start, after a
    node has gone, and when one has come."""
    resize_every_s: Annotated[float, Field(ge=0)] = 60.0
    """With [min, max]: how often a running group looks for room to grow, which restarts it from its last checkpoint
    [s]."""
    use_gpu: bool = True
    """One GPU and NCCL for each worker; false trains on CPUs with gloo."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 4
    """CPUs that each training worker reserves; at least one thread computes [cores]."""
    decode_workers: Count = 8
    """Processes that decode video, for training and again for validation."""
    cpus_per_decode_worker: Annotated[float, Field(gt=0)] = 1
    """CPUs that each of them reserves [cores]."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts in a row that bring no new checkpoint, after which the run gives up."""
    train_on: Labels = {}
    """Labels of the nodes that train, {"crosslmm.io/role": "train"}; empty: any node."""
    decode_on: Labels = {}
    """Labels of the nodes that decode video."""
    drive_on: Labels = {}
    """Labels of the node of the driver, with which its board, Ray Train's controller and the drivers of a sweep's
    trials are: one that is not taken away. `ray job submit` takes the head; a driver that is elsewhere is refused."""
    worker_resources: dict[str, Limit] = {}
    """What each training worker reserves beside CPUs and GPU: resources that nodes were started with."""
    node_types: list[NodeType] = []
    """What the cluster's autoscaler may add, which Ray does not tell: [{most: 4, resources: {CPU: 48, GPU: 4}, labels:
    {crosslmm.io/role: train}}, ...]; empty: nothing, there are the nodes that there are."""

    @model_validator(mode="after")
    def _least_is_least(self) -> "ScalingConfig":
        if self.least_workers > self.most_workers:
            raise ValueError(f"num_workers is {self.num_workers}; give [min, max]")
        return self

    @property
    def least_workers(self) -> int:
        """The fewest that it trains on."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """The most that it trains on: what room and memory are planned for."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class WatchdogConfig(Section):
    """How long nothing may be heard. Then the stacks of all ranks go to the run's `stacks` folder, and the workers
    start again from the last checkpoint. While one rank waits for its data, the others wait for it in their step."""

    startup_s: Limit = 1800.0
    """From a worker's start to its first step: weights, checkpoint, first samples [s]."""
    data_s: Limit = 900.0
    """Waiting for the samples of one step [s]."""
    step_s: Limit = 1200.0
    """One step [s]."""
    validation_s: Limit = 3600.0
    """One validation [s]."""
    checkpoint_s: Limit = 1800.0
    """Waiting for one checkpoint, or for the export at the end [s]."""


class RunConfig(Section):
    """One training run, from manifest to registered model."""

    model: ModelConfig
    """What is trained."""
    data: DataConfig = DataConfig()
    """What it is trained on."""
    train: TrainConfig = TrainConfig()
    """How it is trained."""
    tracking: TrackingConfig = TrackingConfig()
    """Where the record goes."""
    scaling: ScalingConfig = ScalingConfig()
    """What it runs on."""
    watchdog: WatchdogConfig = WatchdogConfig()
    """How long nothing may be heard."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    """Name of the run; the same name resumes it. Null makes one from the time."""
    storage: str = "runs"
    """Folder of all runs, path or s3:// URI; every node must reach it."""
    seed: int = 0
    """Fixes random weights and the order of samples."""
    accept_changes: bool = False
    """Go on with a run although its configuration is not the one that it was begun with; without it a resume names the
    keys that differ, and what only says where and how fast it runs may differ anyway."""

    @property
    def accumulation(self) -> int:
        """Micro-batches of each worker in one optimizer step, where they are counted in samples."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.scaling.most_workers)

    @property
    def in_bf16(self) -> bool:
        """Whether it computes in bf16; while that is open, whether it would on a GPU of today."""
        return self.train.precision == "bf16" or (self.train.precision == "auto" and self.scaling.use_gpu)

    @model_validator(mode="after")
    def _holds_no_credentials(self) -> "RunConfig":
        values = self.model_dump()
        values["data"]["manifest"] = list(self.data.manifests)
        for key, value in flatten(values).items():
            for text in value if isinstance(value, list) else [value]:
                if USERINFO.search(str(text)):
                    raise ValueError(
                        f"{key}: holds credentials, which belong in the environment: MLFLOW_TRACKING_USERNAME and "
                        "MLFLOW_TRACKING_PASSWORD (of a database, its whole URI in MLFLOW_TRACKING_URI), or AWS_*"
                    )
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> "RunConfig":
        for workers in range(self.scaling.least_workers, self.scaling.most_workers + 1):
            if self.train.micro_batch_tokens and self.train.global_batch_size % workers:
                raise ValueError(
                    f"train.global_batch_size is {self.train.global_batch_size}; it must be a multiple of "
                    f"scaling.num_workers {workers}"
                )
            at_once = workers * self.train.micro_batch_size
            if not self.train.micro_batch_tokens and self.train.global_batch_size % at_once:
                raise ValueError(
                    f"train.global_batch_size is {self.train.global_batch_size}; with {workers} workers "
                    f"of micro_batch_size {self.train.micro_batch_size} it must be a multiple of {at_once}"
                )
        if self.name in ("sample", "features"):
            raise ValueError(f"name: {self.name} is a folder that runs have in common; take another")
        if self.data.features and self.train.learning_rate.vision:
            raise ValueError(
                f"data.features: features are those of a frozen encoder, and train.learning_rate.vision is "
                f"{self.train.learning_rate.vision:g}; make it 0, or train from videos without data.features"
            )
        if self.model.attention == "flash_attention_2" and not (self.scaling.use_gpu and self.in_bf16):
            raise ValueError(
                "model.attention is flash_attention_2, which needs scaling.use_gpu true and train.precision bf16"
            )
        for branch in ("v2v", "t2v"):
            listed = self.model.cross_attention_layers
            anywhere = self.model.cross_attention_every > 0 if listed is None else bool(listed)
            present = getattr(self.model, branch) and anywhere
            if getattr(self.train.learning_rate, branch) and not present:
                raise ValueError(
                    f"train.learning_rate.{branch} is given, but the model has no {branch.upper()}; make it 0, "
                    f"or model.{branch} true and model.cross_attention_every at least 1"
                )
        for part in ("vision", "language"):
            if getattr(self.model, part) is None and not getattr(self.model, f"{part}_weights"):
                raise ValueError(f"model.{part}: give its fields, or model.{part}_weights to take them from")
        return self


class BadConfig(Exception):
    """A configuration that cannot be run; the message is one line: the key, and what it would accept."""


def validate_run(values: dict[str, Any]) -> RunConfig:
    """Nested plain values -> RunConfig.

    Raises:
        BadConfig: naming the first key that does not fit, and how many more there are.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        first, *more = error.errors()
        where = ".".join(str(part) for part in first["loc"] if part != "function-after")
        message = first["msg"].removeprefix("Value error, ")
        found = "" if first["type"] in ("value_error", "missing") else f" (found {first['input']!r})"
        others = f"; and {len(more)} more" if more else ""
        raise BadConfig(one_line(f"{where}: {message}{found}{others}".removeprefix(": "))) from error


def to_yaml(config: RunConfig) -> str:
    """The full configuration, as `--config` reads it."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def redacted(text: str) -> str:
    """Without the user and password of any URI in it."""
    return USERINFO.sub("***@", text)


def tracking_uri(config: TrackingConfig) -> str:
    """Where the record goes: the configuration, else MLFLOW_TRACKING_URI, else sqlite in the working directory."""
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    return uri


def without_password(uri: str) -> str:
    """A URI that may be written down."""
    scheme, separator, rest = uri.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


# What jsonargparse says where a key takes a value of some type or null.
OPTIONAL = re.compile(
    r"Does not validate against any of the Union subtypes\s+Subtypes: .*Errors:\s+- (.*?)"
    r"\s+- Expected a <class 'NoneType'>\s+Given value type: \S+ \S+\s+Given value: (.*)",
    re.DOTALL,
)


def one_line(text: str) -> str:
    """Without line breaks, and without what pydantic and jsonargparse say about themselves."""
    text = re.sub(r"\d+ validation errors? for \S+|\[type=[^]]*\]|For further information visit \S+", "", text)
    text = OPTIONAL.sub(r"\1; got: \2", text).replace("a typing.Literal", "one of ")
    return (
        " ".join(text.replace("Parser key ", "").replace(" Got value", "; got").split())
        .replace(".;", ";")
        .replace(" ;", ";")
    )
