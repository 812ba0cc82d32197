"""A device that computes on the CPU and counts what a GPU would wait for, copy and launch.

Its tensors hold CPU tensors, and report another device; every operator is seen by `Counts` on its way to the CPU. What
depends on values is done with real values, so a whole training step or `generate` runs as it would on a GPU:

- a synchronisation: the host needs a value that the GPU has (`.item()`, `int()`, `.tolist()`, a copy to the host), or
  the shape of a result depends on values (`nonzero`, boolean masks, `unique`); or it copies from pageable memory;
- a copy: from the host to the GPU;
- a launch: any other operator that computes. Views and allocations launch nothing.

Not counted: what differs between the kernels of a CPU and of CUDA, such as several kernels for one operator.
"""

import contextlib
import functools
from collections import Counter
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
NAME = "emulated"
DEVICE = NAME + ":0"

VALUE_SHAPED = {
    aten.nonzero, aten.masked_select, aten.unique_consecutive, aten._unique2, aten.unique_dim, aten.bincount, aten.equal
}  # fmt: skip
"""Operators whose result, or its shape, the host must wait for."""
LAUNCHES_NOTHING = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.detach, aten.alias,
    aten.lift_fresh, aten._unsafe_view, aten._reshape_alias, aten._local_scalar_dense, aten._to_copy, aten.set_,
    aten.is_same_size, aten.record_stream, aten._fused_sdp_choice, aten.is_pinned,
}  # fmt: skip
"""Beside the views, which their schemas name."""


_LIBRARY = torch.library.Library("aten", "IMPL")


class Counts:
    """What was counted, by the names of the operators."""

    def __init__(self) -> None:
        self.syncs: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    def take(self) -> dict[str, Counter[str]]:
        """Return the counts since the last call, and start again from zero."""
        taken = {name: Counter(counter) for name, counter in vars(self).items()}
        for counter in vars(self).values():
            counter.clear()
        return taken


COUNTS = Counts()


class OnGpu(Tensor):
    """A tensor of the emulated device."""

    inner: Any

    @staticmethod
    def __new__(cls: type[Self], inner: Tensor) -> Self:
        """Hold `inner`, a CPU tensor."""
        tensor = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(DEVICE),
        )
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return plain lists, which the dispatcher does not see."""
        if func is Tensor.tolist:
            COUNTS.syncs["tolist"] += 1
            return args[0].inner.tolist()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Compute on the CPU."""
        return _run(func, args, kwargs or {})


class Emulation(TorchDispatchMode):
    """Within it, tensors can be made on `DEVICE` and copied to it."""

    def __enter__(self) -> Self:
        _register()
        # Otherwise torch.tensor(..., device=...) would fill memory of the device without an operator.
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on the CPU."""
        return _run(func, args, kwargs or {})


class _Module:
    """What torch asks the module of a device (`torch.cuda` of a GPU); random numbers are the CPU's."""

    def is_initialized(self) -> bool:
        return True

    is_available = is_initialized

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: int = 0) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: int = 0) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def device(self, index: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


@functools.cache
def _register() -> None:
    _setup_privateuseone_for_python_backend(NAME, _Module())
    # Optimizers and clipping treat lists of parameters by one operator, as on CUDA.
    supported: list[Any] = torch.utils._foreach_utils._foreach_supported_types
    supported.append(OnGpu)
    _LIBRARY.impl("scaled_dot_product_attention", attention, "AutogradPrivateUse1")


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    on_gpu = {id(t.inner): t for t in tree_leaves((args, kwargs)) if isinstance(t, OnGpu)}
    target = kwargs.get("device")
    to_gpu = bool(on_gpu) if target is None else torch.device(target).type == NAME
    _count(func, args, kwargs, bool(on_gpu), to_gpu)
    inner_args, inner_kwargs = tree_map_only(OnGpu, lambda t: t.inner, (args, kwargs))
    if to_gpu and target is not None:
        inner_kwargs["device"] = torch.device("cpu")
    if "pin_memory" in inner_kwargs:
        inner_kwargs["pin_memory"] = False
    out = func(*inner_args, **inner_kwargs)
    if not to_gpu:
        return out
    return tree_map_only(Tensor, lambda x: on_gpu[id(x)] if id(x) in on_gpu else OnGpu(x), out)


def _count(func: Any, args: Any, kwargs: dict[str, Any], from_gpu: bool, to_gpu: bool) -> None:
    packet, name = func.overloadpacket, str(func)
    copied = _copied(func, args)
    if copied is not None:
        source, target_on_gpu = copied, to_gpu if packet is aten._to_copy else isinstance(args[0], OnGpu)
        if isinstance(source, OnGpu) != target_on_gpu:
            blocking = not (kwargs.get("non_blocking") or (packet is aten.copy_ and len(args) > 2 and args[2]))
            if target_on_gpu:
                COUNTS.copies[name] += 1
            if blocking or not target_on_gpu:
                COUNTS.syncs[name + (" to the GPU" if target_on_gpu else " to the host")] += 1
            return
    if not (from_gpu or to_gpu):
        return
    if _waits(func, args, kwargs):
        COUNTS.syncs[name] += 1
    if packet is aten._to_copy or (packet not in LAUNCHES_NOTHING and not func.is_view):
        COUNTS.launches[name] += 1


def _copied(func: Any, args: Any) -> Any:
    """Return the tensor that an operator copies."""
    return args[0] if func.overloadpacket is aten._to_copy else args[1] if func is aten.copy_.default else None


def _waits(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    packet = func.overloadpacket
    if packet is aten._local_scalar_dense or packet in VALUE_SHAPED:
        return True
    if packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None


class _Attention(torch.autograd.Function):
    """Attention as one kernel, forward and backward, as flash attention is on a GPU."""

    @staticmethod
    def forward(ctx: Any, query: OnGpu, key: OnGpu, value: OnGpu, options: dict[str, Any]) -> Tensor:
        """Run SDPA on the CPU; (..., heads, positions, channels) each."""
        COUNTS.launches["attention"] += 1
        ctx.save_for_backward(query, key, value)
        ctx.options = {name: x.inner if isinstance(x, OnGpu) else x for name, x in options.items()}
        return OnGpu(_sdpa(query.inner, key.inner, value.inner, **ctx.options))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Run its backward pass."""
        COUNTS.launches["attention backward"] += 1
        inputs = [x.inner.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = _sdpa(*inputs, **ctx.options)
        return *(OnGpu(x) for x in torch.autograd.grad(out, inputs, gradients[0].inner)), None


_sdpa: Any = torch.nn.functional.scaled_dot_product_attention


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """Return SDPA of tensors on the emulated device; the arguments are those of SDPA."""
    options = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    return _Attention.apply(query, key, value, options)
