"""Flags of `TrainingArguments` on the command line of a stage: each has its own name and overrides the recipe.

Numbers that a recipe has are changed in the recipe, so that its record shows them and a resumed run is held to them;
everything else goes to `TrainingArguments` as it is. Flags that would break a stage are refused.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments

from .commands import LARGEST_RATE
from .recipes import Phase, RecipeType
from .trainer import Run, num_processes


PUBLISHING = "publish the finished folder by `python -m internvl.publishing`"
# Why a flag is refused, and what to do.
REFUSED = {
    **{field.name: PUBLISHING for field in fields(TrainingArguments) if field.name.startswith("hub_")},
    "auto_find_batch_size": "a smaller batch would be another recipe: give `--per-device-train-batch-size`",
    "do_eval": "give `--eval-data`",
    "do_predict": "use `python -m internvl.evaluation`",
    "do_train": "a stage trains without it",
    "label_names": "the models compute their losses themselves",
    "label_smoothing_factor": "the models compute their losses themselves",
    "local_rank": "use `accelerate launch`",
    "max_steps": "give `--steps`",
    "num_train_epochs": "a recipe counts steps: give `--steps` (`finetune` takes `--epochs`)",
    "output_dir": "give `--output`",
    "push_to_hub": PUBLISHING,
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
# What a value must be, as text and as a test; all numbers must be finite.
Range = tuple[str, Callable[[float], bool]]
FROM_0: Range = ("0 or more", lambda value: value >= 0)
ABOVE_0: Range = ("above 0", lambda value: value > 0)
RATE: Range = ("above 0 and at most 100", lambda value: 0 < value <= LARGEST_RATE)
FROM_1: Range = ("1 or more", lambda value: value >= 1)
BELOW_1: Range = ("from 0 to below 1", lambda value: 0 <= value < 1)
SEED: Range = ("from 0 to below 2**32", lambda value: 0 <= value < 2**32)
RANGES: dict[str, Range] = {
    "adam_beta1": BELOW_1,
    "adam_beta2": BELOW_1,
    "adam_epsilon": FROM_0,
    "data_seed": SEED,
    "dataloader_num_workers": FROM_0,
    "dataloader_prefetch_factor": FROM_1,
    "ddp_bucket_cap_mb": FROM_1,
    "ddp_timeout": FROM_1,
    "eval_accumulation_steps": FROM_1,
    "eval_delay": FROM_0,
    "eval_steps": ABOVE_0,
    "gradient_accumulation_steps": FROM_1,
    "learning_rate": RATE,
    "logging_steps": ABOVE_0,
    "max_grad_norm": FROM_0,
    "neftune_noise_alpha": FROM_0,
    "per_device_eval_batch_size": FROM_1,
    "per_device_train_batch_size": FROM_1,
    "save_steps": ABOVE_0,
    "save_total_limit": FROM_0,
    "seed": SEED,
    "torch_empty_cache_steps": FROM_1,
    "warmup_steps": FROM_0,
    "weight_decay": ("from 0 to 100", lambda value: 0 <= value <= LARGEST_RATE),
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
        ValueError: If one of them would break a stage, or its value is out of range.
    """
    usage = f"{prog} [options]; `--help` lists them, and every flag of TrainingArguments is taken as well"
    parser = HfArgumentParser(TrainingArguments, prog=prog, usage=usage, add_help=False, allow_abbrev=False)
    absent = argparse.Namespace(**{field.name: _ABSENT for field in fields(TrainingArguments)})
    given = {name: value for name, value in vars(parser.parse_args(words, absent)).items() if value is not _ABSENT}
    for name in given.keys() & REFUSED.keys():
        if given.pop(name) is not False:  # False is what holds anyway
            raise ValueError(f"`{_flag(name)}` is not for a stage: {REFUSED[name]}.")
    check_ranges(given)
    _check_optimizer_settings(given.get("optim_args"))
    return given


def _check_optimizer_settings(text: str | None) -> None:
    """Check `--optim-args` before a model is loaded; the trainer reads it when it makes the optimizer."""
    parts = [part.partition("=") for part in text.split(",")] if text else []
    if bad := [name for name, _, value in parts if not name.strip().isidentifier() or not value.strip()]:
        raise ValueError(f"`--optim-args` must be NAME=VALUE, or several by commas, got {bad[0]!r} in {text!r}.")


def check_ranges(flags: Mapping[str, Any]) -> None:
    """Check that numbers are finite and in the ranges of `RANGES`.

    Raises:
        ValueError: If one is not.
    """
    for name, value in flags.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        text, is_in = RANGES.get(name, ("finite", math.isfinite))
        if not (math.isfinite(value) and is_in(value)):
            raise ValueError(f"`{_flag(name)}` must be a number {text}, got {value}.")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def batch_size_of(flags: dict[str, Any], batch_size: int | None = None) -> int | None:
    """Return the samples of a step over all processes that a command line asks for; None where it leaves them open.

    Args:
        flags: Arguments as from `parse_flags`.
        batch_size: What `--batch-size` says.

    Raises:
        ValueError: If the flags and `batch_size` contradict each other.
    """
    if "per_device_train_batch_size" not in flags:
        return batch_size
    rows, steps = flags["per_device_train_batch_size"], flags.get("gradient_accumulation_steps", 1)
    found = rows * steps * num_processes()
    if batch_size not in (None, found):
        raise ValueError(
            f"`--batch-size {batch_size}` contradicts `--per-device-train-batch-size {rows}`: {steps} such batches in "
            f"each of {num_processes()} processes make {found}. Leave one out, or give "
            "`--gradient-accumulation-steps` as well."
        )
    return found


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
        ValueError: If no phase trains one of the parts, or flags do not go together.
    """
    flags, rates = dict(flags), dict(learning_rates)
    _check_precision(flags)
    _set_evaluation(flags, has_data=bool(run.eval_data), has_curve=recipe.eval_steps is not None)
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


def _check_precision(flags: Mapping[str, Any]) -> None:
    if not flags.get("fp16"):
        return
    if flags.get("bf16"):
        raise ValueError("`--fp16` and `--bf16` exclude each other: give one of them.")
    if flags.get("use_cpu") or not torch.cuda.is_available():
        raise ValueError("`--fp16` needs a GPU: leave it out, or give `--bf16 False` for float32.")


def _set_evaluation(flags: dict[str, Any], *, has_data: bool, has_curve: bool) -> None:
    """Checks that what flags ask for can be measured; `--eval-steps` alone asks for an evaluation at those steps."""
    if has_data:
        if "eval_steps" in flags and not has_curve:
            flags.setdefault("eval_strategy", "steps")
        return
    needs = {
        "eval_strategy": flags.get("eval_strategy", "no") != "no",
        "eval_steps": "eval_steps" in flags and not has_curve,
        "eval_on_start": flags.get("eval_on_start") and not has_curve,
        "load_best_model_at_end": flags.get("load_best_model_at_end"),
        "metric_for_best_model": "metric_for_best_model" in flags,
        "save_strategy": flags.get("save_strategy") == "best",
    }
    if missing := [_flag(name) for name, is_needed in needs.items() if is_needed]:
        raise ValueError(f"`{missing[0]}` needs held-out data: give files by `--eval-data`.")


def _changed_phase(phase: Phase, flags: dict[str, Any], rates: dict[str, float]) -> Phase:
    factor = flags["learning_rate"] / max(phase.learning_rates.values()) if "learning_rate" in flags else 1
    changes: dict[str, Any] = {
        "learning_rates": {part: rates.get(part, rate * factor) for part, rate in phase.learning_rates.items()}
    }
    if not any(rate > 0 for rate in changes["learning_rates"].values()):
        raise ValueError(f"All learning rates of phase {phase.name} are 0: there is nothing to train.")
    if "warmup_steps" in flags:
        warmup = flags["warmup_steps"]  # below 1 it is a share, as in `TrainingArguments`
        changes["warmup_steps"] = int(warmup if warmup >= 1 else warmup * phase.steps)
    if (batch_size := batch_size_of(flags)) is not None:
        changes["batch_size"] = batch_size
    return replace(phase, **changes)
