"""Runs a stage from the command line."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..kinds import check_kind
from .arguments import apply_flags, batch_size_of, parse_flags
from .models.build import check_whole_patches
from .recipes import RECIPES, EmbeddingRecipe, with_steps
from .stages import run_captions, run_retrieval, run_stage1, run_stage2, run_stage3
from .trainer import Run, is_first_process, with_lora


# Options that are arguments of the recipe functions of a stage.
CHOICES = {
    "stage3": ("connector", "freeze_language", "also_train"),
    "retrieval": ("image_size", "dataset", "heads_only"),
    "captions": ("image_size",),
}


def _recipe_of(options: argparse.Namespace) -> Any:
    choices = {name: getattr(options, name) for name in CHOICES.get(options.stage, ())}
    if choices.get("image_size", 0) is None:
        del choices["image_size"]  # the recipe's own
    recipe = replace(RECIPES[options.stage][options.scale](**choices), seed=options.seed)
    if getattr(options, "template", None):
        recipe = replace(recipe, template=options.template)
    if options.steps is not None:
        recipe = with_steps(recipe, options.steps)
    if options.batch_size is not None:
        phases = tuple(replace(phase, batch_size=options.batch_size) for phase in recipe.phases)
        recipe = replace(recipe, phases=phases)
    return with_lora(with_matryoshka_dims(with_video_frames(recipe, options), options), options.lora_parts)


def with_video_frames(recipe: Any, options: argparse.Namespace) -> Any:
    """Return the recipe with the numbers of frames that the command line names, if any."""
    frames = getattr(options, "video_frames", None)
    if frames is None:
        return recipe
    if not hasattr(recipe, "video_frames"):
        raise ValueError("`--video-frames` is for chat models: image-text pairs have no videos.")
    if len(frames) > 2:
        raise ValueError("`--video-frames` takes one number, or the fewest and the most.")
    return replace(recipe, video_frames=(frames[0], frames[-1]))


def with_matryoshka_dims(recipe: Any, options: argparse.Namespace) -> Any:
    """Return the recipe with the lengths of embeddings that the command line names, if any."""
    dims = getattr(options, "matryoshka_dims", None)
    if not dims:
        return recipe
    if not isinstance(recipe, EmbeddingRecipe):
        raise ValueError("`--matryoshka-dims` is for losses that compare embeddings, which this task has none of.")
    return replace(recipe, matryoshka_dims=tuple(sorted(set(dims), reverse=True)))


def run_of(options: argparse.Namespace, **settings: Any) -> Run:
    """Return how a stage is run, by its command line.

    Args:
        options: Arguments that every command of training has.
        **settings: Further fields of `Run`.
    """
    settings = {"lora_rank": options.lora_rank, "lora_parts": tuple(options.lora_parts), **settings}
    return Run(
        output=options.output,
        resume=options.resume,
        num_workers=options.workers,
        eval_data=tuple(options.eval_data),
        profile_steps=options.profile_steps,
        images=options.images,
        is_streamed=options.streaming,
        max_bad_rate=options.max_bad_rate,
        **settings,
    )


def run(options: argparse.Namespace, print_fn: Callable[[str], None]) -> int:
    """Runs a stage.

    Args:
        options: Arguments of the command line.
        print_fn: Takes the lines to show.

    Returns:
        Exit code 0.

    Raises:
        ValueError: If LoRA is asked for in part.
    """
    if bool(options.lora_rank) != bool(options.lora_parts):
        raise ValueError("`--lora-rank` and `--lora-parts` belong together: give both or none.")
    flags = parse_flags(options.flags, f"python -m internvl.training {options.stage}")
    batch_size_of(flags, options.batch_size)  # refuses those that contradict each other
    if getattr(options, "image_size", None) is not None and options.model:
        check_whole_patches(options.image_size, check_kind(options.model, "InternVL-G", door="`--model`"))
    how = run_of(options, funnel_stage=options.funnel)
    recipe, how = apply_flags(_recipe_of(options), how, flags, options.learning_rates)
    if options.stage == "stage1":
        run_stage1(recipe, options.data, how, options.tokenizer, options.model, options.llama)
    elif options.stage == "stage2":
        run_stage2(recipe, options.data, how, options.model, options.llama)
    elif options.stage == "retrieval":
        run_retrieval(recipe, options.data, how, options.model)
    elif options.stage == "captions":
        run_captions(recipe, options.data, how, options.model)
    else:
        run_stage3(recipe, options.data, how, options.model, options.decoder)
    if is_first_process():
        print_fn(f"The model is in {options.output}.")
    return 0
