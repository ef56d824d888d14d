"""Callbacks of the stages."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback, WandbCallback


SAMPLES_FILE = "samples.jsonl"


class KeepFrozenPartsWithoutGradient(TrainerCallback):
    """Removes hooks that would run a frozen vision tower backward.

    Where transformers checkpoints activations, it makes the embeddings of every part require gradients. Only reentrant
    checkpoints need that, and the recipes use none.
    """

    def on_train_begin(self, *_: Any, model: PreTrainedModel, **__: Any) -> None:
        """Remove the hooks, which `Trainer` adds just before."""
        if isinstance(model, PreTrainedModel):
            model.disable_input_require_grads()


class SeedRanksDifferently(TrainerCallback):
    """Gives each process different random numbers: kept patches, stochastic depth, hard negatives.

    `Trainer` seeds all processes alike, which the weights and the order of the data need. The first process keeps that
    seed.
    """

    def on_train_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        """Seed this process unless it is the first; a checkpoint restores each process's state afterwards."""
        if args.process_index:
            set_seed((args.seed + args.process_index) % 2**32)  # NumPy takes no larger one


class EvaluateEvery(TrainerCallback):
    """Evaluates every so many steps and after the last one.

    Args:
        steps: Steps between two evaluations.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Ask for an evaluation where one is due."""
        if state.global_step % self.steps == 0 or state.global_step == state.max_steps:
            control.should_evaluate = True
        return control


class Profile(TrainerCallback):
    """Records some steps by torch's profiler, after two that it leaves out, as a trace for TensorBoard or Perfetto.

    Args:
        steps: Number of steps.
        folder: Folder of the traces, one of each process.
    """

    def __init__(self, steps: int, folder: Path) -> None:
        schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
        self.profiler = torch.profiler.profile(
            schedule=schedule,
            on_trace_ready=torch.profiler.tensorboard_trace_handler(str(folder)),
            profile_memory=True,
        )

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        self.profiler.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Go on to the next step."""
        self.profiler.step()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stop, and write what there is."""
        self.profiler.stop()


def log_samples(
    samples: Sequence[dict[str, str]], step: int, folder: str, trackers: Iterable[TrainerCallback]
) -> None:
    """Append texts to `samples.jsonl`, and show them in the trackers that take texts: TensorBoard, Weights & Biases.

    Args:
        samples: Texts by their names, the same names in each.
        step: Step at which they were generated.
        folder: Folder of the file.
        trackers: Callbacks of the trainer.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with Path(folder, SAMPLES_FILE).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"step": step, **sample}, ensure_ascii=False) + "\n" for sample in samples)
    names = list(samples[0])
    rows = [[" ".join(sample[name].split()).replace("|", "\\|") for name in names] for sample in samples]
    for tracker in trackers:
        if isinstance(tracker, TensorBoardCallback) and tracker.tb_writer is not None:
            table = "\n".join(f"| {' | '.join(row)} |" for row in [names, ["---"] * len(names), *rows])
            tracker.tb_writer.add_text("samples", table, step)
        elif isinstance(tracker, WandbCallback) and tracker._wandb is not None:
            tracker._wandb.log({"samples": tracker._wandb.Table(columns=names, data=rows)})
