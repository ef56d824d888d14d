"""Counts what a training step does on the meta device: floating-point operations, and the bytes of live tensors.

Nothing is computed and no memory is needed, so models of any size are counted in seconds.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as shape_settings
from torch.utils._pytree import tree_leaves
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..training.models.counting import FlopCounter


aten = torch.ops.aten


class OperationCounter(FlopCounter):
    """Counts FLOPs, and the most that tensors made inside take at one time.

    On the meta device every number that the host reads is 1, so checks of the data pass.

    Attributes:
        live_bytes: Of the tensors made inside that are alive now.
        peak_bytes: The most that they ever were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self.live_bytes = 0
        self._live: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is aten._local_scalar_dense.default and args[0].is_meta:
            return 1
        if function is aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            return torch.ones_like(args[0], device="cpu")
        output = super().__torch_dispatch__(function, types, args, kwargs)
        given = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(output):
            if id(storage) not in given and storage not in self._live:
                self._live.add(storage)
                self.live_bytes += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return output

    def _free(self, num_bytes: int) -> None:
        self.live_bytes -= num_bytes


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _efficient_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend by a kernel that keeps no attention weights, as GPUs do; on the meta device sdpa would keep them."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    if attention_mask is not None:
        attention_mask = attention_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    attend = aten._scaled_dot_product_efficient_attention
    output, *_ = attend(query, key, value, attention_mask, torch.is_grad_enabled(), dropout, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


@contextmanager
def counted_step() -> Iterator[OperationCounter]:
    """Count what is done inside, on the meta device. Where a mask selects elements, all are taken."""
    kernel = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _efficient_attention
    try:
        settings = shape_settings.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
        with settings, OperationCounter() as counter:
            yield counter
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = kernel
