"""What a pass through a model would hold and compute, found by running it on the meta device."""

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
# Flash attention's own operator, and what its two directions cost in the counter that comes with torch.
FLASH = aten._scaled_dot_product_flash_attention_for_cpu
FLASH_FLOPS = {
    FLASH: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


class Moment(NamedTuple):
    """Bytes that are held at one time, parameters not among them."""

    kept: int
    """What outlives the pass: a backward pass leaves gradients, a forward pass with a cache the cache."""
    logits: int
    """Tensors with one column for each word of the vocabulary."""
    other: int
    """Activations, temporaries, inputs."""


class _Event(NamedTuple):
    storage: int
    nbytes: int  # negative where it is given back
    is_logits: bool


@dataclass(frozen=True)
class Trace:
    """Everything that a pass allocated and freed, in order."""

    inputs: int
    """Bytes of what the pass was handed."""
    events: list[_Event]
    kept: frozenset[int]
    flops: int
    """Floating-point operations of products and convolutions; a multiply-accumulate is two."""

    @property
    def kept_bytes(self) -> int:
        """Bytes that outlive the pass."""
        return sum(event.nbytes for event in self.events if event.storage in self.kept)

    def peak(self, with_kept: bool) -> Moment:
        """The moment at which most is held, counting what outlives the pass or not.

        Logits are given the most that they ever took: where they are gone again, others have filled their room.
        """
        kept, logits, other = 0, 0, self.inputs
        highest, most_logits = Moment(kept, logits, other), 0
        for event in self.events:
            if event.storage in self.kept:
                kept += event.nbytes if with_kept else 0
            elif event.is_logits:
                logits += event.nbytes
                most_logits = max(most_logits, logits)
            else:
                other += event.nbytes
            if kept + logits + other > sum(highest):
                highest = Moment(kept, logits, other)
        freed = min(most_logits, highest.logits + highest.other) - highest.logits
        return highest._replace(logits=highest.logits + freed, other=highest.other - freed)


def trace(
    call: Callable[[], Any],
    parameters: list[Tensor],
    inputs: list[Tensor],
    vocabulary: int,
    fused_norm: bool,
    alike: Sequence[ChunkedEncoderLayer] = (),
) -> Trace:
    """Run `call` and write down what it holds and computes.

    Floating-point tensors live on the meta device: they have shapes and no numbers, and no memory is taken. Integers
    and booleans made from real ones stay real, so that lengths, masks and indices lead where they would lead.
    Attention is flash attention wherever the model asks for SDPA, as both devices have it.

    Args:
        call: the pass. What it returns is kept; all else has to be free when it ends.
        parameters: and buffers, on the meta device; they are not counted.
        inputs: tensors on the meta device that are held all the while, as `Moment.other`.
        vocabulary: the width by which logits are known.
        fused_norm: RMSNorm as CUDA computes it, in one kernel; else in five, as CPUs do.
        alike: layers of one shape. Without gradients they hold the same at every call, so one call is run for all.
    """
    book = _Book([*parameters, *inputs], vocabulary)
    with _kernels(fused_norm), book, _run_once(book, alike):
        result = call()
    kept = frozenset(number for number, _ in book.live.values())
    traced = Trace(sum(t.nbytes for t in inputs), list(book.events), kept, book.flops)
    del result
    return traced


@contextlib.contextmanager
def _kernels(fused_norm: bool) -> Iterator[None]:
    """The kernels that a real device would take; the meta device by itself spells both operators out."""

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        return FLASH(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]

    def rms_norm(x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        # CUDA's kernel has no meta twin; the layer norm's keeps the same: its input and a number a row.
        return aten.native_layer_norm(x, shape, weight, None, eps or torch.finfo(x.dtype).eps)[0]

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("scaled_dot_product_attention", attention, "AutogradMeta")
        if fused_norm:
            library.impl("rms_norm", rms_norm, "AutogradMeta")
        yield


@contextlib.contextmanager
def _run_once(book: "_Book", layers: Sequence[ChunkedEncoderLayer]) -> Iterator[None]:
    """Run the first call of each shape, and write the others down as that one was: a long video has thousands."""
    written: dict[torch.Size, tuple[list[_Event], int]] = {}

    def call(frames: Callable[[Tensor], Tensor], x_FPD: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return frames(x_FPD)
        if x_FPD.shape not in written:
            begin, flops = len(book.events), book.flops
            frames(x_FPD)  # its result is given back at once, like all else that it made
            written[x_FPD.shape] = book.events[begin:], book.flops - flops
        else:
            events, flops = written[x_FPD.shape]
            book.events += events
            book.flops += flops
        return torch.empty_like(x_FPD)

    for layer in layers:
        layer._frames = functools.partial(call, layer._frames)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["_frames"]


class _Book(TorchDispatchMode):
    """Writes down every storage that begins or ceases to be, and every product."""

    def __init__(self, held: list[Tensor], vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.events: list[_Event] = []
        self.live: dict[int, tuple[int, weakref.ref]] = {}  # by the storage's address while it lives: its number
        self.flops = 0
        self._held = {id(tensor.untyped_storage()): tensor for tensor in held}
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
            self.flops += flops(*args, **kwargs, out_val=out)
        for tensor in _tensors(out):
            if tensor.is_meta:
                self._enter(tensor)
        return out

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, number = id(storage), next(self._count)
        if address in self._held or address in self.live:
            return
        is_logits = tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary
        begins = _Event(number, storage.nbytes(), is_logits)

        def gone(_: weakref.ref) -> None:
            del self.live[address]
            self.events.append(begins._replace(nbytes=-begins.nbytes))

        self.events.append(begins)
        self.live[address] = (number, weakref.ref(storage, gone))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else torch.empty_like(tensor, device="meta")


def _real_indices(func: Any, args: Any) -> Any:
    """A mask that picks elements becomes their numbers while it still has values."""
    if func is not aten.index.Tensor:
        return args
    indices = [
        part for index in args[1]
        for part in (index.nonzero(as_tuple=True) if index is not None and index.dtype == torch.bool else (index,))
    ]  # fmt: skip
    return args[0], indices
