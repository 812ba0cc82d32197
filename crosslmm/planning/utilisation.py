"""MFU and HFU (model and hardware FLOPs utilisation) of a run while it trains, estimated from its speed."""

from dataclasses import dataclass
from typing import Self

from crosslmm.config import RunConfig
from crosslmm.planning.assumptions import Assumptions, find_gpu


@dataclass(frozen=True)
class Utilisation:
    """Turns the speed of a run into its utilisation of the GPUs."""

    model_flops: float
    """FLOPs of the model per frame, forward and backward, with its share of the sample's text."""
    hardware_flops: float
    """The same, recomputed FLOPs included."""
    peak: float
    """Dense FLOP/s of one GPU."""

    @classmethod
    def of(cls, config: RunConfig, gpu: str | None) -> Self | None:
        """Return the utilisation of a run; None on CPUs, and on a GPU whose peak is not known.

        FLOPs per frame are those of a sample with `data.num_frames` frames and as much text as plans assume. So this is
        an estimate where videos have fewer frames, and text alone counts as no work.

        Args:
            config: the run, without `auto`.
            gpu: name that the driver gives the GPU.

        Raises:
            BadConfig: the model cannot be built.
        """
        known = find_gpu(gpu) if gpu else None
        if known is None:
            return None
        from crosslmm.planning import cost, peak_memory  # a job is unpickled where no model is needed

        assumed = Assumptions()
        sample = cost.longest_sample(config, assumed.text_tokens, assumed.stamp_tokens)
        traced = peak_memory.training_trace(config, *sample)
        frames = sample[0] * config.train.micro_batch_size
        return cls(
            model_flops=(traced.flops - traced.recomputed_flops) / frames,
            hardware_flops=traced.flops / frames,
            peak=known.flops["bf16" if config.in_bf16 else "fp32"],
        )

    def at(self, frames_per_s: float, gpus: int) -> dict[str, float]:
        """Return `mfu` and `hfu`.

        Args:
            frames_per_s: speed of all GPUs together [frames/s].
            gpus: number of GPUs.
        """
        share = frames_per_s / (self.peak * gpus)
        return {"mfu": self.model_flops * share, "hfu": self.hardware_flops * share}
