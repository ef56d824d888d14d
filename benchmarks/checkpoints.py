"""Checkpoints with random weights, written without ever being held in memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from internvl.conversion.readers.tensors import LazyTensor
from internvl.conversion.repository.shards import write_shards


def write_random_weights(folder: Path, shapes: Mapping[str, tuple[int, ...]], max_shard_size: str) -> None:
    """Writes tensors of these shapes in bf16.

    Matrices have a standard deviation of 0.02; vectors lie around one, so that norms pass on what they get.
    """
    noise = torch.empty(2**20, dtype=torch.bfloat16).normal_(std=0.02, generator=torch.Generator().manual_seed(0))

    def tensor(shape: tuple[int, ...]) -> LazyTensor:
        numel = torch.Size(shape).numel()

        def values(_: Any) -> torch.Tensor:
            drawn = noise.repeat(numel // len(noise) + 1)[:numel].view(shape)
            return drawn + 1 if len(shape) == 1 else drawn

        return LazyTensor(shape, torch.bfloat16, folder, values)

    write_shards(folder, {name: tensor(shape) for name, shape in shapes.items()}, max_shard_size)
