"""Fine-tunes a finished model from the command line: `python -m internvl.training finetune --model M --data F`."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging

from ..kinds import check_kind, kind_of
from ..processing_internvl import InternVLProcessor
from .arguments import apply_flags, batch_size_of, parse_flags
from .data.sources import num_rows
from .models.build import check_whole_patches
from .models.parameter_groups import LORA_PARTS
from .recipes.finetuning import PARTS_OF_TASK, FineTuning, finetuning_recipe, parts_that_learn
from .stage_command import run_of, with_matryoshka_dims, with_video_frames
from .stages import run_captions, run_retrieval, run_stage1, run_stage3
from .trainer import is_first_process


logger = logging.get_logger(__name__)

TASK_OF_KIND = {"chat": "dialogue", "InternVL-C": "contrastive", "InternVL-G": "retrieval"}
KINDS_OF_TASK = {
    "dialogue": ("chat",),
    "contrastive": ("InternVL-C", "InternVL-G"),
    "retrieval": ("InternVL-G",),
    "captions": ("InternVL-G",),
}
LARGE = 1_000_000_000  # parameters from which on LoRA is the default
BATCH_SIZE = 16
LORA_RANK = 16


def run(options: argparse.Namespace, print_fn: Callable[[str], None]) -> int:
    """Fine-tunes a model.

    Args:
        options: Arguments of the command line.
        print_fn: Takes the lines to show.

    Returns:
        Exit code 0.

    Raises:
        OSError: If the model or a file of the data is not there.
        ValueError: If the model, the task and the data do not go together.
    """
    flags = parse_flags(options.flags, "python -m internvl.training finetune")
    config = check_kind(options.model, *TASK_OF_KIND, door="`finetune`")
    task = options.task or TASK_OF_KIND[str(kind_of(config))]
    check_kind(options.model, *KINDS_OF_TASK[task], door=f"`--task {task}`")
    check_whole_patches(options.image_size, config)
    method = _method_of(options, config)
    parts, adapted = _parts_of(options, task, method)
    _check_parts(options, task, config)
    adapters = {"lora_rank": (options.lora_rank or LORA_RANK) if adapted else 0, "lora_parts": adapted}
    batch_size = batch_size_of(flags, options.batch_size) or BATCH_SIZE
    choice = FineTuning(
        task=task,
        method=method,
        steps=options.steps
        or options.epochs * -(-num_rows(options.data, task != "dialogue" or options.streaming) // batch_size),
        batch_size=batch_size,
        parts=parts,
        image_size=options.image_size,
        max_tiles=options.max_tiles,
        max_length=options.max_length or FineTuning.max_length,
        pack=options.pack,
        seed=options.seed,
    )
    max_text_length = _processor_of(options.model).max_text_length
    recipe = finetuning_recipe(choice, config, max_text_length)
    recipe = with_matryoshka_dims(with_video_frames(recipe, options), options)
    recipe, how = apply_flags(recipe, run_of(options, **adapters), flags, options.learning_rates)
    rates = ", ".join(f"{part} at {rate:g}" for part, rate in recipe.phases[0].learning_rates.items())
    logger.warning(f"{task}, {method}: {rates}; {recipe.phases[0].steps} steps of {recipe.phases[0].batch_size}.")
    if task == "dialogue":
        run_stage3(recipe, options.data, how, options.model)
    elif task == "contrastive":
        run_stage1(recipe, options.data, how, source=options.model)
    else:
        (run_retrieval if task == "retrieval" else run_captions)(recipe, options.data, how, options.model)
    if is_first_process():
        print_fn(f"The model is in {options.output}.")
    return 0


def _processor_of(model: str) -> InternVLProcessor:
    try:
        processor = AutoProcessor.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise OSError(f"`{model}` has no processor that can be read: {error}") from error
    if not isinstance(processor, InternVLProcessor):
        raise ValueError(f"`{model}` has no processor of an InternVL: files beside its weights are missing.")
    return processor


def _method_of(options: argparse.Namespace, config: Any) -> str:
    """What is trained of a model: one of `METHODS`."""
    wants_adapters = bool(options.lora_rank or options.lora_parts)
    if wants_adapters and options.method not in (None, "lora"):
        given = "--lora-rank" if options.lora_rank else "--lora-parts"
        raise ValueError(f"`{given}` belongs to `--method lora`, not to `--method {options.method}`: leave one out.")
    takes_adapters = not options.train or not set(options.train).isdisjoint(LORA_PARTS)
    is_large = takes_adapters and _num_parameters(config) >= LARGE
    return options.method or ("lora" if wants_adapters or is_large else "whole")


def _parts_of(options: argparse.Namespace, task: str, method: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The parts that are trained, and those of them that get adapters."""
    chosen = tuple(options.train or PARTS_OF_TASK[task][method])
    adapted: tuple[str, ...] = ()
    if method == "lora":
        adapted = tuple(options.lora_parts or (part for part in chosen if part in LORA_PARTS))
        if not adapted:
            raise ValueError(
                f"LoRA adapters go on {', '.join(LORA_PARTS)}, and `--train {' '.join(chosen)}` names none of them: "
                "name one, give `--lora-parts`, or take `--method whole`."
            )
        chosen = tuple(dict.fromkeys((*chosen, *adapted))) if options.train else adapted
    parts, left = (tuple(part for part in group if part not in options.freeze) for group in (chosen, adapted))
    if not parts or len(left) < bool(adapted):
        what = "nothing to train" if not parts else "no part left for LoRA adapters"
        raise ValueError(f"All of {', '.join(adapted or chosen)} are frozen: there is {what}.")
    return parts, left


def _check_parts(options: argparse.Namespace, task: str, config: Any) -> None:
    """Refuses parts that the loss of a task does not reach in a model, and options of dialogues for pairs."""
    of_dialogues = {"--pack": options.pack, "--max-tiles": options.max_tiles, "--max-length": options.max_length}
    if task != "dialogue" and (given := [flag for flag, value in of_dialogues.items() if value]):
        raise ValueError(f"`{given[0]}` is for chat models: image-text pairs have a tile and a short text.")
    learning = parts_that_learn(task, config)
    for name in ("train", "lora_parts", "freeze"):
        if idle := [part for part in getattr(options, name) if part not in learning]:
            raise ValueError(
                f"`--{name.replace('_', '-')} {' '.join(idle)}`: in this model and `--task {task}` there is no part "
                f"{', '.join(idle)} that learns, only {', '.join(learning)}."
            )


def _num_parameters(config: Any) -> int:
    with torch.device("meta"):
        return AutoModel.from_config(config).num_parameters()
