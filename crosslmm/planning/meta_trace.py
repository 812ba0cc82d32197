"""Trace memory and FLOPs of a forward or backward pass by running it on the meta device."""

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from crosslmm.model.vision_encoder import ChunkedEncoderLayer

aten = torch.ops.aten
FLASH = aten._scaled_dot_product_flash_attention_for_cpu
"""The flash-attention operator that replaces SDPA in a trace."""
FLASH_FLOPS = {
    FLASH: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


class MemorySnapshot(NamedTuple):
    """Memory in use at one moment, without parameters [bytes]."""

    kept: int
    """Tensors that outlive the pass: gradients after a backward pass, the cache after a forward pass with a cache."""
    logits: int
    """Tensors whose last axis is the vocabulary."""
    other: int
    """Activations, temporaries and inputs."""


class _Event(NamedTuple):
    storage: int
    nbytes: int  # negative if the storage is freed
    is_logits: bool


@dataclass(frozen=True)
class Trace:
    """All allocations and frees of a pass, in order."""

    inputs: int
    """Size of the inputs [bytes]."""
    events: list[_Event]
    kept: frozenset[int]
    """Numbers of the storages that outlive the pass."""
    flops: int
    """Floating-point operations of matrix products and convolutions; a multiply-accumulate counts as two."""
    recomputed_flops: int
    """Those among them that the backward pass computes again because their results were not kept."""

    @property
    def kept_bytes(self) -> int:
        """Size of the tensors that outlive the pass [bytes]."""
        return sum(event.nbytes for event in self.events if event.storage in self.kept)

    def peak(self, with_kept: bool) -> MemorySnapshot:
        """Return the moment of peak memory, with or without the tensors that outlive the pass.

        `logits` is the peak of the logits alone, even if they are freed by then and other tensors reuse their memory.
        """
        kept, logits, other = 0, 0, self.inputs
        highest, most_logits = MemorySnapshot(kept, logits, other), 0
        for event in self.events:
            if event.storage in self.kept:
                kept += event.nbytes if with_kept else 0
            elif event.is_logits:
                logits += event.nbytes
                most_logits = max(most_logits, logits)
            else:
                other += event.nbytes
            if kept + logits + other > sum(highest):
                highest = MemorySnapshot(kept, logits, other)
        freed = min(most_logits, highest.logits + highest.other) - highest.logits
        return highest._replace(logits=highest.logits + freed, other=highest.other - freed)


def trace(
    call: Callable[[], Any],
    parameters: list[Tensor],
    inputs: list[Tensor],
    vocabulary: int,
    fused_norm: bool,
    identical_layers: Sequence[ChunkedEncoderLayer] = (),
) -> Trace:
    """Run `call` and record what it allocates, frees and computes.

    Floating-point tensors are on the meta device: they have shapes but no values and no memory. Integers and booleans
    computed from real tensors stay real, so that lengths, masks and indices have their true values. SDPA is traced as
    flash attention, which CPU and GPU both have.

    Args:
        call: the pass. Its result and gradients outlive it; everything else must be freed when it returns.
        parameters: parameters and buffers, on the meta device; not counted.
        inputs: tensors on the meta device that live throughout; counted as `MemorySnapshot.other`.
        vocabulary: size of the last axis by which logits are recognised.
        fused_norm: trace RMSNorm as one kernel, as on CUDA; otherwise as five operators, as on CPUs.
        identical_layers: layers of one shape. Without gradients each call costs the same, so only one is run.
    """
    recorder = _Recorder([*parameters, *inputs], vocabulary)
    with _kernels(fused_norm), recorder, _run_once(recorder, identical_layers):
        result = call()
    kept = frozenset(number for number, _ in recorder.live.values())
    traced = Trace(
        sum(t.nbytes for t in inputs), list(recorder.events), kept, recorder.flops, recorder.recomputed_flops
    )
    del result
    return traced


@contextlib.contextmanager
def _kernels(fused_norm: bool) -> Iterator[None]:
    """Use the fused kernels of a real device; the meta device would decompose both operators."""

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        return FLASH(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]

    def rms_norm(x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        # The CUDA kernel has no meta implementation; layer norm stores the same: its input and one number per row.
        return aten.native_layer_norm(x, shape, weight, None, eps or torch.finfo(x.dtype).eps)[0]

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("scaled_dot_product_attention", attention, "AutogradMeta")
        if fused_norm:
            library.impl("rms_norm", rms_norm, "AutogradMeta")
        yield


@contextlib.contextmanager
def _run_once(recorder: "_Recorder", layers: Sequence[ChunkedEncoderLayer]) -> Iterator[None]:
    """Run the first call of each shape and repeat its record for the others: a long video has thousands of calls."""
    recorded: dict[torch.Size, tuple[list[_Event], int]] = {}

    def call(frames: Callable[[Tensor], Tensor], x_FPD: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return frames(x_FPD)
        if x_FPD.shape not in recorded:
            begin, flops = len(recorder.events), recorder.flops
            frames(x_FPD)  # its result and temporaries are freed at once
            recorded[x_FPD.shape] = recorder.events[begin:], recorder.flops - flops
        else:
            events, flops = recorded[x_FPD.shape]
            recorder.events += events
            recorder.flops += flops
        return torch.empty_like(x_FPD)

    for layer in layers:
        layer._frames = functools.partial(call, layer._frames)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["_frames"]


class _Recorder(TorchDispatchMode):
    """Records every storage that is allocated or freed, and the FLOPs of every operator."""

    def __init__(self, uncounted: list[Tensor], vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.events: list[_Event] = []
        self.live: dict[int, tuple[int, weakref.ref]] = {}  # number of each live storage, by its id
        self.flops = self.recomputed_flops = 0
        self._uncounted = {id(tensor.untyped_storage()): tensor for tensor in uncounted}
        self._count = itertools.count()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(t.is_meta for t in _tensors((args, kwargs))):
            args, kwargs = tree_map_only(Tensor, _to_meta, (_real_indices(func, args), kwargs))
            out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
            if any(t.is_meta and not t.is_floating_point() for t in _tensors(out)):
                out = func(*args, **{**kwargs, "device": torch.device("cpu")})
        flops = FLASH_FLOPS.get(func.overloadpacket) or flop_registry.get(func.overloadpacket)
        if flops is not None:
            count = flops(*args, **kwargs, out_val=out)
            self.flops += count
            # A backward pass has gradients disabled, except where it runs a part of the forward pass again.
            if torch._C._current_graph_task_id() >= 0 and torch.is_grad_enabled():
                self.recomputed_flops += count
        for tensor in _tensors(out):
            if tensor.is_meta:
                self._record_allocation(tensor)
        return out

    def _record_allocation(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, number = id(storage), next(self._count)
        if address in self._uncounted or address in self.live:
            return
        is_logits = tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary
        allocation = _Event(number, storage.nbytes(), is_logits)

        def freed(_: weakref.ref) -> None:
            del self.live[address]
            self.events.append(allocation._replace(nbytes=-allocation.nbytes))

        self.events.append(allocation)
        self.live[address] = (number, weakref.ref(storage, freed))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else torch.empty_like(tensor, device="meta")


def _real_indices(func: Any, args: Any) -> Any:
    """Replace boolean masks in an indexing operation by indices, while the masks still have values."""
    if func is not aten.index.Tensor:
        return args
    indices = [
        part for index in args[1]
        for part in (index.nonzero(as_tuple=True) if index is not None and index.dtype == torch.bool else (index,))
    ]  # fmt: skip
    return args[0], indices
