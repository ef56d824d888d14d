"""Large batches in small memory (gradient caching, GradCache): a batch passes through a model chunk by chunk.

The first pass keeps only what a chunk gives (features of a contrastive loss, say), not the activations inside; the
loss then sees the features of the whole batch, of all processes if they are gathered; in the backward pass one chunk
after the other is computed again, with the same random numbers, and only its activations are in memory. That is
activation checkpointing around the whole model, so it needs nothing of the training loop: plain `Trainer`, one
backward pass, and the gradients of the uncached batch.

Not covered: layers that mix the rows of a batch (batch norm), which would see a chunk for the batch.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def in_chunks(function: Callable[..., Any], chunk_size: int | None, *inputs: Any) -> Any:
    """What `function` gives for a batch, computed a few rows at a time.

    Args:
        function: Takes the inputs, gives one tensor or a tuple of tensors whose first dimension is joined again.
            Tensors it finds elsewhere, parameters above all, get their gradients too.
        chunk_size: Rows at a time; None, or a smaller batch, calls `function` once and keeps its activations.
        *inputs: Tensors (B, ...), other things with rows that a slice takes (`Texts`), or None, which is passed on.

    Raises:
        ValueError: If `chunk_size` is not positive, or the inputs differ in length.
    """
    lengths = {len(x) for x in inputs if x is not None}
    if len(lengths) != 1:
        raise ValueError(f"`inputs` must have one length, got {sorted(lengths)}.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"`chunk_size` must be at least 1, got {chunk_size}; None takes the batch as a whole.")
    length = lengths.pop()
    if chunk_size is None or chunk_size >= length:
        return function(*inputs)
    run = partial(checkpoint, function, use_reentrant=False) if torch.is_grad_enabled() else function
    outputs = []
    for start in range(0, length, chunk_size):
        chunk = [None if x is None else x[start : start + chunk_size] for x in inputs]
        outputs.append(run(*chunk))
    if isinstance(outputs[0], torch.Tensor):
        return torch.cat(outputs)
    return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))
