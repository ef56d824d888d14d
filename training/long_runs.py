"""What long runs on many processes need of a trainer: figures in the log, averaged weights, weights gathered once."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .averaging import WeightAverage
from .checkpoints import WholeCheckpointTrainer
from .models.sharding import keep_gathered, reshard
from .recipes import Recipe
from .throughput import Throughput, peak_flops


class LongRunTrainer(WholeCheckpointTrainer):
    """`WholeCheckpointTrainer` that logs its throughput, averages weights and gathers sharded ones once a step.

    Args:
        recipe: Says whether weights are averaged and gathered once.
        **settings: As for `Trainer`.

    Raises:
        ValueError: If weights are to be averaged under DeepSpeed.
    """

    def __init__(self, recipe: Recipe, **settings: Any) -> None:
        super().__init__(**settings)
        peak = peak_flops() if self.args.bf16 or self.args.fp16 else None
        self.throughput = Throughput(peak, is_compiled=self.args.torch_compile)
        self._gathers_once = recipe.gather_once and recipe.grad_cache_chunk_size is not None
        self.average = None if recipe.ema_decay is None else WeightAverage(recipe.ema_decay)
        if self.average is not None:
            if self.is_deepspeed_enabled:
                raise ValueError(
                    "`ema_decay` is not possible under DeepSpeed: launch with `fsdp2.yaml` or `ddp.yaml`."
                )
            self.add_callback(self.average)

    def get_batch_samples(self, *arguments: Any, **settings: Any) -> Any:
        """As in `Trainer`; the log says how long it took."""
        with self.throughput.waiting():
            return super().get_batch_samples(*arguments, **settings)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *others: Any, **settings: Any) -> torch.Tensor:
        """As in `Trainer`; what it does is counted, and the chunks of gradient caching share gathered weights."""
        if self._gathers_once:
            keep_gathered(self.model)
        with self.throughput.step(inputs):
            loss = super().training_step(model, inputs, *others, **settings)
        if self._gathers_once:
            reshard(self.model)
        return loss

    def log(self, logs: dict[str, float], *arguments: Any, **settings: Any) -> None:
        """Log with the throughput since the entry before."""
        if "loss" in logs:
            logs |= self.throughput.entry(self.accelerator)
        super().log(logs, *arguments, **settings)

    def _evaluate(self, *arguments: Any, **settings: Any) -> Any:
        """Measures what would be exported now."""
        with self.throughput.paused(), nullcontext() if self.average is None else self.average.applied():
            return super()._evaluate(*arguments, **settings)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.average is not None:
            self.average.load(Path(self.state.best_model_checkpoint))

    def _find_place(self, checkpoint: Path) -> None:
        super()._find_place(checkpoint)
        if self.average is not None:
            self.average.checkpoint = checkpoint

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.throughput.paused():
            super()._save_checkpoint(model, trial)

    def _save_more(self, checkpoint: Path) -> None:
        super()._save_more(checkpoint)
        if self.average is not None:
            self.average.save(checkpoint)
