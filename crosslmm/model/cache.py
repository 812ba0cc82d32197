"""What a cache remembers of the videos: T2V's keys and values, beside those of the decoder's self-attention.

Callers bring the cache, of any class of Transformers (dynamic, static, quantized, ...). The cache layer of every dual
layer is replaced by one of a subclass, so that whatever is done with a cache reaches the videos too.

Axis suffixes: B sample, H key-value head, S original visual token of a sample, C channel of one head.
"""

import copy
import functools
from dataclasses import dataclass, fields
from typing import Any, cast

from torch import Tensor
from transformers import Cache


@dataclass(frozen=True)
class CachedVideos:
    """The videos of a conversation as one T2V branch sees them."""

    key_BHSC: Tensor
    value_BHSC: Tensor
    mask_BS: Tensor | None
    """bool: False at padding; None if there is none."""
    num_frames_B: Tensor
    """int64: frames of each sample."""

    def select(self, samples: Tensor) -> "CachedVideos":
        """Return the videos of these samples (int64 indices), in this order."""
        tensors: list[Any] = [getattr(self, field.name) for field in fields(self)]
        selected: list[Any] = [x if x is None else x.index_select(0, samples.to(x.device)) for x in tensors]
        return CachedVideos(*selected)


class _RemembersVideos:
    """Mixin for a class of cache layers. Positions may be cropped: the videos are always before them."""

    videos: CachedVideos | None = None

    def reset(self) -> None:
        self.videos = None
        super().reset()  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)
        super().reorder_cache(beam_idx)  # type: ignore[misc]

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)
        super().batch_select_indices(indices)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.videos is not None:
            samples = self.videos.num_frames_B.new_ones(len(self.videos.num_frames_B)).cumsum(0) - 1
            self._select(samples.repeat_interleave(repeats))
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]

    def _select(self, samples: Tensor) -> None:
        if self.videos is not None:
            self.videos = self.videos.select(samples)


@functools.cache
def _remembering(layer_class: Any) -> type:
    # `_layer_type` would make Transformers create layers of this class for other models.
    return type(layer_class.__name__, (_RemembersVideos, layer_class), {"_layer_type": None})


def remember(cache: Cache, layer_idx: int, videos: CachedVideos | None) -> None:
    """Store the videos of a decoder layer; the layer's self-attention is in the cache already."""
    layer: Any = cache.layers[layer_idx]
    if not isinstance(layer, _RemembersVideos):
        layer_class: Any = type(layer)
        subclass = _remembering(layer_class)
        layer, attributes = object.__new__(subclass), vars(layer)
        vars(layer).update(attributes)
        cache.layers[layer_idx] = layer
    layer.videos = videos


def recall(cache: Cache | None, layer_idx: int) -> CachedVideos | None:
    """Return the videos that `remember` stored."""
    if cache is None or layer_idx >= len(cache.layers):
        return None
    return cast(CachedVideos | None, getattr(cache.layers[layer_idx], "videos", None))


def fork(cache: Cache, length: int) -> Cache:
    """Return a cache of the first `length` positions and of all videos; whatever happens to it, `cache` stays as it is.

    Args:
        cache: a `DynamicCache`. The two share memory: it appends by making new tensors.
        length: positions to keep, at most those in the cache.
    """
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    forked.crop(length - cache.get_seq_length())
    return forked
