# Copyright 2026 The InternVL package authors
"""A cache of image features: a tile that was seen before is not encoded again, as long as the weights are the same."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from threading import Lock
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel


# What says which adapters act: of PEFT's layers.
ADAPTER_STATE = ("disable_adapters", "active_adapters", "merged_adapters", "scaling")
SAMPLES = 16  # values of a tensor by which changes are seen that leave its version as it is, such as those of `.data`


def tile_key(tile: torch.Tensor) -> tuple[Any, ...]:
    """What identifies a tile (3, height, width): shape, dtype, device and stream, and a hash of its bytes."""
    # What one stream computes, another may not read at once.
    stream = torch.cuda.current_stream(tile.device).cuda_stream if tile.is_cuda else None
    return tuple(tile.shape), tile.dtype, tile.device, stream, _digest(tile)


def _digest(tensor: torch.Tensor) -> bytes:
    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
    return hashlib.blake2b(data, digest_size=16).digest()


def weights_state(model: nn.Module, without: str | None = None) -> tuple[Any, ...]:
    """What changes whenever weights, adapters or hooks of a model do, and how it computes.

    A tensor's version rises with every change in place but those through `.data`, which some of its values show;
    weights that were replaced have another place.

    Args:
        model: The model.
        without: Name of a child that does not matter.
    """
    parts = [model, *(part for name, child in model.named_children() if name != without for part in child.modules())]
    found = (tensor for part in parts for tensor in (*part._parameters.values(), *part._buffers.values()))
    tensors = [tensor for tensor in found if tensor is not None]
    plain = [tensor for tensor in tensors if type(tensor) in (torch.Tensor, nn.Parameter)]
    devices = {tensor.device.type for tensor in plain if not tensor.is_meta}
    return (
        *(state for part in parts for state in _states(part)),
        *((id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors),
        *(tensor.data_ptr() for tensor in plain),
        *_samples(plain),
        *((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in sorted(devices)),
    )


def _states(part: nn.Module) -> Iterator[Any]:
    if isinstance(getattr(type(part), "active_adapters", None), property):  # a model of transformers has a method
        yield tuple(repr(getattr(part, name, None)) for name in ADAPTER_STATE)
    if part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__:
        yield tuple(part._forward_pre_hooks), tuple(part._forward_hooks), id(part.__dict__.get("forward"))
    if isinstance(part, PreTrainedModel):
        yield part.config._attn_implementation


def _samples(tensors: list[torch.Tensor]) -> Iterator[bytes]:
    """Digests of a few values of each tensor, those of each device and dtype together."""
    groups: dict[Any, list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() and not tensor.is_meta:
            count = min(SAMPLES, tensor.numel())
            flat = tensor.detach() if tensor.is_contiguous() else tensor.detach().flatten()
            some = flat.as_strided((count,), (tensor.numel() // count,), flat.storage_offset())
            groups.setdefault((tensor.device, tensor.dtype), []).append(some)
    for group in groups.values():
        yield _digest(torch.cat(group))


class ImageFeatureCache:
    """Features of tiles, those that were used last, in a number of bytes. Threads may share it.

    Args:
        max_bytes: The most that all features together take.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        self.num_bytes = 0
        self.state: Any = None
        self._rows: OrderedDict[Any, torch.Tensor] = OrderedDict()
        self._lock = Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model, or a pickled one, starts with an empty cache of the same size."""
        return type(self), (self.max_bytes,)

    def features(
        self, tiles: torch.Tensor, state: Any, encode: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """The features (tiles, ...) of tiles (tiles, 3, height, width).

        Args:
            tiles: Those that were not seen are encoded, together, and each once.
            state: Of the weights and settings; where it differs from the last one, everything is forgotten.
            encode: Gives the features of tiles.
        """
        keys = [tile_key(tile) for tile in tiles]
        with self._lock:
            self._forget_unless(state)
            rows = {key: self._rows[key] for key in keys if key in self._rows}
            for key in rows:
                self._rows.move_to_end(key)
            missing = {key: index for index, key in reversed(list(enumerate(keys))) if key not in rows}
            self.misses += len(missing)
            self.hits += len(keys) - len(missing)
        if missing:
            order = sorted(missing.values())
            encoded = encode(tiles if len(order) == len(tiles) else tiles[order])
            # A view would keep the features of the whole batch.
            new = {keys[index]: row.clone() for index, row in zip(order, encoded, strict=True)}
            self._store(new, state)
            if len(order) == len(tiles):
                return encoded
            rows |= new
        return torch.stack([rows[key] for key in keys])

    def clear(self) -> None:
        """Forgets all features."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        self._rows.clear()
        self.num_bytes = 0

    def _forget_unless(self, state: Any) -> None:
        if state != self.state:
            self.state = state
            self._forget()

    def _store(self, rows: dict[Any, torch.Tensor], state: Any) -> None:
        with self._lock:
            if state != self.state:  # weights changed while others were encoded
                return
            for key, row in rows.items():
                before = self._rows.pop(key, None)
                self.num_bytes += row.nbytes - (0 if before is None else before.nbytes)
                self._rows[key] = row
            while self.num_bytes > self.max_bytes:
                _, oldest = self._rows.popitem(last=False)
                self.num_bytes -= oldest.nbytes


class CachesImageFeatures:
    """What a model has that may keep the features of images.

    `image_feature_cache_bytes` is the one switch: 0, the default, keeps nothing. Nothing is kept or looked up where
    gradients are enabled, where any part is in training mode, in code that is compiled or traced, in replicas of
    `DataParallel`, on the meta device, and in a group of processes, all of which must call a tower whose weights they
    share. Features are those of the batch that a tile was first encoded in.
    """

    image_feature_cache: ImageFeatureCache | None = None

    @property
    def image_feature_cache_bytes(self) -> int:
        """The most that kept features take."""
        return 0 if self.image_feature_cache is None else self.image_feature_cache.max_bytes

    @image_feature_cache_bytes.setter
    def image_feature_cache_bytes(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"`image_feature_cache_bytes` must be a number of bytes, 0 for none, got {value!r}.")
        self.image_feature_cache = ImageFeatureCache(value) if value else None

    def _cached_features(
        self,
        tiles: torch.Tensor,
        encode: Callable[[torch.Tensor], torch.Tensor],
        *settings: Any,
        without: str | None = None,
    ) -> torch.Tensor:
        """Features of tiles, from the cache where it is on.

        Args:
            tiles: (tiles, 3, height, width).
            encode: Gives the features of tiles.
            *settings: What they depend on beside the weights.
            without: Name of the child on whose weights they do not depend.
        """
        if self.image_feature_cache is None or not tiles.shape[0] or self._cannot_cache(tiles):
            return encode(tiles)
        state = settings, weights_state(cast(nn.Module, self), without)
        return self.image_feature_cache.features(tiles, state, encode)

    def _cannot_cache(self, tiles: torch.Tensor) -> bool:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return True
        if torch.is_grad_enabled() or tiles.is_meta or type(tiles) is not torch.Tensor:
            return True
        model = cast(nn.Module, self)
        if getattr(model, "_is_replica", False) or any(part.training for part in model.modules()):
            return True
        if tiles.is_cuda and torch.cuda.is_current_stream_capturing():
            return True
        return torch.distributed.is_available() and torch.distributed.is_initialized()
