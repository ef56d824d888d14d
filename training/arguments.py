"""Flags of `TrainingArguments` on the command line of a stage: each has its own name and overrides the recipe.

Numbers that a recipe has are changed in the recipe, so that its record shows them and a resumed run is held to them;
everything else goes to `TrainingArguments` as it is. Flags that would break a stage are refused.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from .recipes import Phase, RecipeType
from .trainer import Run, num_processes


# Why a flag is refused, and what to do.
REFUSED = {
    "auto_find_batch_size": "a smaller batch would be another recipe: give `--per-device-train-batch-size`",
    "do_eval": "give `--eval-data`",
    "do_predict": "use `python -m internvl.evaluation`",
    "do_train": "a stage trains without it",
    "hub_always_push": "publish the finished folder by `python -m internvl.publishing`",
    "label_names": "the models compute their losses themselves",
    "label_smoothing_factor": "the models compute their losses themselves",
    "local_rank": "use `accelerate launch`",
    "max_steps": "give `--steps`",
    "num_train_epochs": "a recipe counts steps: give `--steps` (`finetune` takes `--epochs`)",
    "output_dir": "give `--output`",
    "push_to_hub": "publish the finished folder by `python -m internvl.publishing`",
    "remove_unused_columns": "the collators need every column",
    "resume_from_checkpoint": "give `--resume`",
    "save_only_model": "a stopped run is resumed with its optimizer",
}
# Fields of a recipe by the flags that set them.
RECIPE_FIELDS = {
    "activation_checkpointing": "gradient_checkpointing",
    "bf16": "use_bf16",
    "gradient_checkpointing": "gradient_checkpointing",
    "logging_steps": "logging_steps",
    "max_grad_norm": "max_grad_norm",
    "save_steps": "save_steps",
    "weight_decay": "weight_decay",
}
_ABSENT = object()


def parse_flags(words: Sequence[str], prog: str) -> dict[str, Any]:
    """Parse flags of `TrainingArguments`, `--learning-rate 1e-5` and `--learning_rate 1e-5` alike.

    Args:
        words: What the stage's own parser has left of the command line.
        prog: The command, for messages.

    Returns:
        The arguments that are given, by their names. A flag that is unknown ends the process, as in argparse.

    Raises:
        ValueError: If one of them would break a stage.
    """
    parser = HfArgumentParser(TrainingArguments, prog=prog, add_help=False, allow_abbrev=False)
    absent = argparse.Namespace(**{field.name: _ABSENT for field in fields(TrainingArguments)})
    given = {name: value for name, value in vars(parser.parse_args(words, absent)).items() if value is not _ABSENT}
    for name in given.keys() & REFUSED.keys():
        raise ValueError(f"`--{name.replace('_', '-')}` is not for a stage: {REFUSED[name]}.")
    return given


def apply_flags(
    recipe: RecipeType, run: Run, flags: dict[str, Any], learning_rates: Iterable[tuple[str, float]] = ()
) -> tuple[RecipeType, Run]:
    """Change a recipe and a run by flags of `TrainingArguments`.

    A learning rate is the largest one: those of the parts keep their ratios. A batch size per device, with
    accumulation steps, makes the batch of all processes.

    Args:
        recipe: The recipe.
        run: How to run it.
        flags: Arguments as from `parse_flags`.
        learning_rates: Parts with their learning rates, in every phase that trains the part.

    Returns:
        The recipe and the run with everything that the flags change.

    Raises:
        ValueError: If no phase trains one of the parts.
    """
    flags, rates = dict(flags), dict(learning_rates)
    trained = dict.fromkeys(part for phase in recipe.phases for part in phase.learning_rates)
    if absent := [part for part in rates if part not in trained]:
        raise ValueError(f"No phase trains {', '.join(absent)}, only {', '.join(trained)}.")
    changes: dict[str, Any] = {"phases": tuple(_changed_phase(phase, flags, rates) for phase in recipe.phases)}
    for name in ("learning_rate", "warmup_steps"):
        flags.pop(name, None)
    changes |= {field: flags.pop(name) for name, field in RECIPE_FIELDS.items() if name in flags}
    if recipe.eval_steps is not None and "eval_steps" in flags:  # of the learning curve
        changes["eval_steps"] = flags.pop("eval_steps")
    changes["betas"] = tuple(flags.pop(f"adam_beta{i + 1}", beta) for i, beta in enumerate(recipe.betas))
    if flags.get("fp16"):
        changes["use_bf16"] = False
    if "dataloader_num_workers" in flags:
        run = replace(run, num_workers=flags.pop("dataloader_num_workers"))
    return replace(recipe, **changes), replace(run, arguments={**run.arguments, **flags})


def _changed_phase(phase: Phase, flags: dict[str, Any], rates: dict[str, float]) -> Phase:
    factor = flags["learning_rate"] / max(phase.learning_rates.values()) if "learning_rate" in flags else 1
    changes: dict[str, Any] = {
        "learning_rates": {part: rates.get(part, rate * factor) for part, rate in phase.learning_rates.items()}
    }
    if "warmup_steps" in flags:
        warmup = flags["warmup_steps"]  # below 1 it is a share, as in `TrainingArguments`
        changes["warmup_steps"] = int(warmup if warmup >= 1 else warmup * phase.steps)
    if "per_device_train_batch_size" in flags:
        rows = flags["per_device_train_batch_size"] * flags.get("gradient_accumulation_steps", 1)
        changes["batch_size"] = rows * num_processes()
    return replace(phase, **changes)
