"""Plan a run before renting machines: the counts of `planning.cost`, combined with stated assumptions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from crosslmm.cli import preset_names, resolve_preset
from crosslmm.config import BadConfig, Checkpointing, LearningRates, RunConfig, validate_run
from crosslmm.data.feature_format import BF16_BYTES
from crosslmm.planning import checkpointing, cost, peak_memory
from crosslmm.planning.assumptions import GPUS, Assumptions, Range
from crosslmm.planning.hybrid import Hybrid, recommend
from crosslmm.planning.meta_trace import Trace

MAX_GPUS = 1024
"""Largest number of GPUs that the search for a fitting setting tries."""

HOURS_PER_MONTH = 730
READS_BESIDE_FRAMES = 6
"""Reads of a video's header and index, at most; each frame costs one read, at most."""


@dataclass(frozen=True)
class Fit:
    """The cheapest change of settings that makes the run fit."""

    change: str
    """The change, as command-line arguments."""
    peak_memory_bytes: int


@dataclass(frozen=True)
class Prices:
    """What a run costs [USD]."""

    gpus: Range
    """All GPUs while the run lasts."""
    reading: float
    """Reading the videos: traffic and requests."""
    storage_month: float
    """A month of `Row.storage_bytes`."""
    total: Range
    """GPUs, reading, and storage while the run lasts."""


@dataclass(frozen=True)
class Row:
    """The plan for one number of frames. Memory and speeds are those of one GPU, counts of operations those of one
    sample, storage and traffic those of the run. Ranges come from that of the utilisation."""

    frames: int
    positions: int
    """Length of one sample in the decoder [tokens]."""
    macs: dict[str, int]
    """Multiply-accumulates of the prefill of one sample, by part."""
    linear_macs: int
    """`macs` without the attention products."""
    memory_bytes: dict[str, int]
    """Peak of a training step, by part [bytes]."""
    peak_memory_bytes: int
    """Sum of `memory_bytes`."""
    answering_memory_bytes: dict[str, int]
    """Peak of answering a question about one video, by part [bytes]."""
    fits: bool
    nearest_fit: Fit | None
    hybrid: Hybrid | None
    """What a copy of the model in each node would change, if it is recommended."""
    checkpointing: dict[str, str]
    """What the backward pass recomputes, of the encoder and of the decoder: as configured, or chosen for `auto`."""
    training_flops_per_sample: int
    """FLOPs of the model, forward and backward."""
    recomputed_flops_per_sample: int
    """FLOPs of the activations that the backward pass recomputes."""
    hfu: Range
    """Hardware FLOPs utilisation, as assumed: FLOPs per second, recomputed ones included, over the GPU's peak."""
    mfu: Range
    """Model FLOPs utilisation: FLOPs per second of the model alone over the GPU's peak."""
    samples_per_s: Range
    decode_cores: Range
    """CPU cores needed to decode as fast as one GPU trains."""
    s3_bytes_per_s: Range
    """Storage bandwidth needed to read as fast as one GPU trains [bytes/s]."""
    epoch_samples: int
    epoch_traffic_bytes: int
    """Videos read and checkpoints written in an epoch, of all GPUs."""
    storage_bytes: int
    """Size of the videos, the retained checkpoints and the exported model."""
    features_bytes: int
    """Size of all videos' features in bf16, if jobs/encode.py stores them; not in `storage_bytes`."""
    run_hours: Range
    price: Prices


@dataclass(frozen=True)
class Parameters:
    """Parameter counts."""

    total: int
    components: dict[str, int]
    trainable: dict[str, int]
    """Trainable parameters for each stage preset, and for the given configuration."""


@dataclass(frozen=True)
class Plan:
    """The result of `plan`."""

    parameters: Parameters
    rows: list[Row]
    gpus: int
    price: float
    """Price of one GPU [USD/hour]."""
    float8: bool
    """Whether `train.float8` is set: memory, speed and utilisation are those of bf16 all the same."""
    assumptions: dict[str, Any]


def plan(config: RunConfig, frames: Sequence[int], assumptions: Assumptions) -> Plan:
    """Plan a run at several numbers of frames.

    Raises:
        BadConfig: the model cannot be built, or a sample exceeds its context.
    """
    model = cost.meta_model(config.model)
    for count in frames:
        cost.check_lengths(model, count, *_text(config, assumptions))
    components = cost.parameters(model)
    stages = {name: _rates(name) for name in preset_names() if name.startswith("stage-")}
    trainable = {stage: cost.trainable(components, rates) for stage, rates in stages.items()}
    return Plan(
        parameters=Parameters(
            total=sum(components.values()),
            components=components,
            trainable={**trainable, "as configured": cost.learning(config)},
        ),
        rows=[_row(config, count, assumptions) for count in frames],
        gpus=config.scaling.most_workers,
        price=_price(assumptions),
        float8=config.train.float8,
        assumptions=assumptions.model_dump(),
    )


def _rates(preset: str) -> LearningRates:
    values = yaml.safe_load(Path(resolve_preset(preset)).read_text())
    return LearningRates.model_validate(values["train"]["learning_rate"])


def _price(assumptions: Assumptions) -> float:
    return GPUS[assumptions.gpu].price if assumptions.price is None else assumptions.price


def _text(config: RunConfig, assumptions: Assumptions) -> tuple[int, int]:
    """Return the text of a sample, and that of the time of each of its frames [tokens]."""
    return assumptions.text_tokens, assumptions.stamp_tokens if config.data.timestamps else 0


def _row(config: RunConfig, frames: int, assumptions: Assumptions) -> Row:
    model, text = cost.meta_model(config.model), _text(config, assumptions)
    positions = cost.positions_of(model, frames, *text)
    available = usable_memory(assumptions)
    if config.train.activation_checkpointing == "auto":
        data = config.data.model_copy(update={"num_frames": frames})
        config = checkpointing.choose(config.model_copy(update={"data": data}), available).config
    config = checkpointing.in_samples(config, positions)
    traced = peak_memory.training_trace(config, frames, *text)
    memory = peak_memory.training_memory(config, traced)
    gpu, gpus, train = GPUS[assumptions.gpu], config.scaling.most_workers, config.train
    macs = cost.macs(model, frames, *text)
    fits = memory.total <= available

    model_flops, recomputed_flops = (
        count // train.micro_batch_size for count in (traced.flops - traced.recomputed_flops, traced.recomputed_flops)
    )
    all_flops = model_flops + recomputed_flops
    peak = gpu.flops["bf16" if config.in_bf16 else "fp32"]
    samples_per_s = Range(*(peak * hfu / all_flops for hfu in assumptions.hfus))
    video_bytes = assumptions.video_seconds * assumptions.bitrate / 8
    weights = peak_memory.FLOAT32 * sum(cost.parameters(model).values())
    learning = peak_memory.FLOAT32 * cost.learning(config)
    # With adapters, the weights that do not learn are stored once.
    checkpoint = (learning if train.adapted else weights) + peak_memory.MOMENTS * learning

    epoch_samples = assumptions.samples
    run_samples = train.epochs * epoch_samples
    if train.max_steps is not None:
        run_samples = min(run_samples, train.max_steps * train.global_batch_size)
    checkpoints = max(1, epoch_samples // (train.global_batch_size * train.checkpoint_every))
    hours = Range(*(run_samples / (speed * gpus) / 3600 for speed in reversed(samples_per_s)))
    storage_bytes = round(epoch_samples * video_bytes) + train.keep_checkpoints * checkpoint + weights
    frame_features = model.config.patches_per_frame * model.config.vision_config.hidden_size * BF16_BYTES
    return Row(
        frames=frames,
        positions=positions,
        macs=vars(macs),
        linear_macs=macs.linear,
        memory_bytes=vars(memory),
        peak_memory_bytes=memory.total,
        answering_memory_bytes=vars(peak_memory.answering_memory(config, frames, *text)),
        fits=fits,
        nearest_fit=None if fits else _nearest_fit(config, frames, assumptions, traced),
        hybrid=recommend(config, assumptions, traced, available),
        checkpointing=train.checkpointing._asdict(),
        training_flops_per_sample=model_flops,
        recomputed_flops_per_sample=recomputed_flops,
        hfu=assumptions.hfus,
        mfu=Range(*(hfu * model_flops / all_flops for hfu in assumptions.hfus)),
        samples_per_s=samples_per_s,
        decode_cores=Range(*(s * assumptions.video_seconds / assumptions.decode_speed for s in samples_per_s)),
        s3_bytes_per_s=Range(*(s * video_bytes for s in samples_per_s)),
        epoch_samples=epoch_samples,
        epoch_traffic_bytes=round(epoch_samples * video_bytes) + checkpoints * checkpoint,
        storage_bytes=storage_bytes,
        features_bytes=epoch_samples * frames * frame_features,
        run_hours=hours,
        price=_prices(assumptions, Range(*(h * gpus for h in hours)), hours, run_samples, frames, storage_bytes),
    )


def _prices(
    assumptions: Assumptions, gpu_hours: Range, hours: Range, run_samples: int, frames: int, storage_bytes: int
) -> Prices:
    """Price a run.

    Args:
        assumptions: prices.
        gpu_hours: hours of all GPUs together.
        hours: how long the run lasts [h].
        run_samples: videos that are read.
        frames: frames of each.
        storage_bytes: what is stored while it runs [bytes].
    """
    gpus = Range(*(h * _price(assumptions) for h in gpu_hours))
    read_bytes = run_samples * assumptions.video_seconds * assumptions.bitrate / 8
    reads = run_samples * (frames + READS_BESIDE_FRAMES)
    reading = read_bytes / 1e9 * assumptions.traffic_price + reads / 1000 * assumptions.request_price
    month = storage_bytes / 1e9 * assumptions.storage_price
    total = Range(*(g + reading + month * h / HOURS_PER_MONTH for g, h in zip(gpus, hours, strict=True)))
    return Prices(gpus=gpus, reading=reading, storage_month=month, total=total)


def usable_memory(assumptions: Assumptions) -> float:
    """Return the memory of the GPU without the reserve [bytes]."""
    return GPUS[assumptions.gpu].memory_bytes * (1 - assumptions.reserve)


def _nearest_fit(config: RunConfig, frames: int, assumptions: Assumptions, traced: Trace) -> Fit | None:
    """Return the first change that fits, tried in order of rising cost."""
    traces = {_trace_key(config, frames): traced}
    for change, changed, fewer, gpu in _changes(config, frames, assumptions.gpu):
        key = _trace_key(changed, fewer)
        if key not in traces:
            traces[key] = peak_memory.training_trace(changed, fewer, *_text(changed, assumptions))
        total = peak_memory.training_memory(changed, traces[key]).total
        if total <= usable_memory(assumptions.model_copy(update={"gpu": gpu})):
            return Fit(change, total)
    return None


def _trace_key(config: RunConfig, frames: int) -> tuple[int, Checkpointing, int]:
    return config.train.micro_batch_size, config.train.checkpointing, frames


def _changes(config: RunConfig, frames: int, gpu: str) -> Iterator[tuple[str, RunConfig, int, str]]:
    """Yield changes: (1) no hybrid sharding; besides it, (2) smaller micro-batches, (3) full recomputation, (4) both;
    besides these, (5) more GPUs, (6) larger GPUs, (7) fewer frames."""
    micro, workers = config.train.micro_batch_size, config.scaling.most_workers
    tokens = config.train.micro_batch_tokens
    sharded: dict[str, object] = {"scaling.workers_per_replica": None} if config.scaling.workers_per_replica else {}
    settings = sharded
    if sharded:
        yield from _changed(config, settings, frames, gpu)
    while micro > 1:
        micro //= 2
        settings = sharded | {"train.micro_batch_size": micro} | ({"train.micro_batch_tokens": None} if tokens else {})
        yield from _changed(config, settings, frames, gpu)
    if config.train.checkpointing != ("full", "full"):
        yield from _changed(config, {**sharded, "train.activation_checkpointing": "full"}, frames, gpu)
        settings = {**settings, "train.activation_checkpointing": "full"}
        yield from _changed(config, settings, frames, gpu)
    while (workers := workers * 2) <= MAX_GPUS:
        yield from _changed(config, {**settings, "scaling.num_workers": workers}, frames, gpu)
    for larger in sorted(GPUS, key=lambda name: GPUS[name].memory_bytes):
        if GPUS[larger].memory_bytes > GPUS[gpu].memory_bytes:
            yield from _changed(config, settings, frames, larger, f"--gpu {larger}")
    while frames > 1:
        frames //= 2
        yield from _changed(config, settings, frames, gpu, f"--frames {frames}")


def _changed(
    config: RunConfig, settings: dict[str, object], frames: int, gpu: str, more: str = ""
) -> Iterator[tuple[str, RunConfig, int, str]]:
    """Yield the configuration with `settings` changed, or nothing if that is not valid."""
    values = config.model_dump()
    for key, value in settings.items():
        section, name = key.split(".")
        values[section][name] = value
    try:
        changed = validate_run(values)
    except BadConfig:
        return
    arguments = [
        *(f"--{key} {'null' if value is None else str(value).lower()}" for key, value in settings.items()),
        *([more] if more else []),
    ]
    yield " ".join(arguments), changed, frames, gpu
