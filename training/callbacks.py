"""What the log of a run holds beside Trainer's own entries: parts of a loss, and measurements as training goes on."""

from abc import ABC, abstractmethod
from collections import defaultdict
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class LossParts(TrainerCallback):
    """Adds to each of Trainer's entries the means of what the model returns as `loss_...`, since the entry before.

    Args:
        model: The model that Trainer trains.
    """

    def __init__(self, model: nn.Module) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)
        self._hook = model.register_forward_hook(self._collect)

    def _collect(self, model: nn.Module, inputs: Any, outputs: Any) -> None:
        if model.training:
            for name, value in outputs.items():
                if name.startswith("loss_"):
                    self._values[name].append(value)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Completes the entry."""
        means = {name: float(sum(values)) / len(values) for name, values in self._values.items()}
        state.log_history[-1].update(means)
        self._values.clear()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves the model as it was."""
        self._hook.remove()


class LearningCurve(TrainerCallback, ABC):
    """Adds a measurement to Trainer's log every so many steps, and after the last.

    Args:
        steps: Steps between two points.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    @abstractmethod
    def measure(self, model: Any) -> dict[str, float]:
        """The values of a point; the model is in evaluation mode."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Adds a point where one is due."""
        if state.global_step % self.steps and state.global_step != state.max_steps:
            return
        model.eval()
        state.log_history.append({"step": state.global_step, **self.measure(model)})
        model.train()


__all__ = ["LearningCurve", "LossParts"]
