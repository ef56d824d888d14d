"""The exponential moving average of the trained weights (EMA), which a stage exports in their stead."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerState
from transformers.utils import logging

from .models.sharding import reshard


logger = logging.get_logger(__name__)

FOLDER = "average"  # in a checkpoint


class WeightAverage(TrainerCallback):
    """Keeps the average; sharded weights have a sharded one.

    The first steps count more, so that the weights at the start are forgotten: after n steps the decay is at most
    (1 + n) / (10 + n).

    Args:
        decay: Share of the average that a step keeps.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.checkpoint: Path | None = None
        self._model: nn.Module
        self._weights: dict[str, torch.Tensor] = {}
        self._averages: dict[str, torch.Tensor] = {}

    def on_train_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        """Begin with the weights, or with the average in the checkpoint that the run goes on from."""
        self._model = model
        self._weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        self._averages = {name: weight.to(torch.float32, copy=True) for name, weight in self._weights.items()}
        if self.checkpoint is not None:
            self.load(self.checkpoint)

    @torch.no_grad()
    def on_step_end(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        """Take in the weights after a step."""
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        averages = [_local(average) for average in self._averages.values()]
        weights = [_local(weight).to(torch.float32) for weight in self._weights.values()]
        get_ema_multi_avg_fn(decay)(averages, weights, None)

    def load(self, checkpoint: Path) -> None:
        """Take the average in a checkpoint, in all processes."""
        if (checkpoint / FOLDER).is_dir():
            distributed_checkpoint.load(
                self._averages, checkpoint_id=checkpoint / FOLDER, no_dist=not dist.is_initialized()
            )
        else:
            logger.warning(f"{checkpoint} has no average of the weights, which begins with its weights.")

    def save(self, checkpoint: Path) -> None:
        """Write the average, in all processes."""
        distributed_checkpoint.save(
            self._averages, checkpoint_id=checkpoint / FOLDER, no_dist=not dist.is_initialized()
        )

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights and their average."""
        reshard(self._model)
        for name, weight in self._weights.items():
            here, average = _local(weight), _local(self._averages[name])
            current = here.to(torch.float32, copy=True)
            here.copy_(average)
            average.copy_(current)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside."""
        self.swap()
        try:
            yield
        finally:
            self.swap()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
