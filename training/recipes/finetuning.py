"""Recipes for fine-tuning a finished model on one's own data: its head, adapters, or all that is worth training.

A recipe keeps what the model has, its image size, template, connector and tiles, unless told otherwise.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .base import CaptionRecipe, ContrastiveRecipe, DialogueRecipe, Phase, RetrievalRecipe


# What each method trains, by the task. Adapters sit on the parts below and leave everything else as it is.
PARTS_OF_TASK: dict[str, dict[str, tuple[str, ...]]] = {
    "dialogue": {"whole": ("projector", "language"), "lora": ("language",), "head": ("projector",)},
    "contrastive": {
        "whole": ("vision", "pooling", "qllama", "text_projection", "temperature"),
        "lora": ("vision", "qllama"),
        "head": ("pooling", "text_projection", "temperature"),
    },
    "retrieval": {
        "whole": ("vision", "pooling", "qllama", "text_projection", "temperature", "queries", "query_heads"),
        "lora": ("vision", "qllama"),
        "head": ("pooling", "text_projection", "temperature", "query_heads"),
    },
    "captions": {
        "whole": ("vision", "queries", "qllama", "language_head"),
        "lora": ("vision", "qllama"),
        "head": ("queries", "language_head"),
    },
}
# Parts that a task's loss reaches beside those of "whole"; queries and QLLaMA of a chat model where it has them.
_MORE_PARTS_OF_TASK = {"dialogue": ("vision",)}
_PARTS_OF_QUERIES = ("qllama", "queries")
# Peak learning rates: LLaVA's of dialogues, BLIP-2's of captions; the others lie between the paper's stage 1 (1e-3
# from nothing) and its retrieval fine-tuning (1e-6 for ten epochs).
LEARNING_RATES = {
    "dialogue": {"whole": 2e-5, "lora": 2e-4, "head": 1e-3},
    "contrastive": {"whole": 1e-5, "lora": 1e-4, "head": 1e-4},
    "retrieval": {"whole": 1e-6, "lora": 1e-4, "head": 1e-4},
    "captions": {"whole": 1e-5, "lora": 1e-4, "head": 1e-4},
}
WARMUP_SHARE = 0.03


def parts_that_learn(task: str, config: Any) -> tuple[str, ...]:
    """Return the parts of a model that the loss of a task reaches.

    Args:
        task: A key of `PARTS_OF_TASK`.
        config: Configuration of the model.
    """
    parts = (*PARTS_OF_TASK[task]["whole"], *_MORE_PARTS_OF_TASK.get(task, ()))
    return (*parts, *_PARTS_OF_QUERIES) if getattr(config, "connector", None) == "queries_and_patches" else parts


def has_fast_bf16() -> bool:
    """Whether this machine multiplies bfloat16 matrices faster than float32 ones: GPUs do, of CPUs only some."""
    if torch.cuda.is_available():
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@dataclass(frozen=True)
class FineTuning:
    """What a user chooses.

    Args:
        task: A key of `PARTS_OF_TASK`.
        method: "whole", "lora" (adapters), or "head" (the layers behind the towers, or the projector of a chat model).
        steps: Optimizer steps.
        batch_size: Samples of a step over all processes.
        parts: Parts that are trained, those with adapters among them.
        image_size: Side of the images, or of their tiles, in pixels; None keeps the model's.
        max_tiles: Most tiles of an image; None keeps the model's.
        max_length: Most tokens of a dialogue; of texts beside images, the model's own limit holds.
        pack: Pack the dialogues of a batch into one row.
        seed: Decides the order of the data and all random numbers.
    """

    task: str
    method: str
    steps: int
    batch_size: int
    parts: tuple[str, ...]
    image_size: int | None = None
    max_tiles: int | None = None
    max_length: int = 4096
    pack: bool = False
    seed: int = 0


def finetuning_recipe(choice: FineTuning, config: Any, max_text_length: int) -> Any:
    """Return the recipe of a fine-tuning.

    Args:
        choice: What is to be done.
        config: Configuration of the model that it starts from, an `InternVLChatConfig` or `InternVLConfig`.
        max_text_length: Tokens of a text beside images, as in the model's processor.

    Returns:
        A `DialogueRecipe`, `ContrastiveRecipe`, `RetrievalRecipe` or `CaptionRecipe`, by the task.
    """
    phase = Phase(
        "finetuning",
        choice.steps,
        dict.fromkeys(choice.parts, LEARNING_RATES[choice.task][choice.method]),
        choice.image_size or config.force_image_size or config.vision_config.image_size,
        warmup_steps=int(choice.steps * WARMUP_SHARE),
        batch_size=choice.batch_size,
    )
    shared: dict[str, Any] = {"phases": (phase,), "seed": choice.seed, "betas": (0.9, 0.999), "save_steps": 500}
    shared["use_bf16"] = has_fast_bf16()
    shared["logging_steps"] = max(1, min(10, choice.steps // 10))  # short runs show their loss too
    if choice.task == "dialogue":
        return DialogueRecipe(
            **shared,
            weight_decay=0.0,
            connector=config.connector,
            template=config.template,
            downsample_ratio=config.downsample_ratio,
            max_tiles=choice.max_tiles or (config.max_dynamic_patch if config.dynamic_image_size else 1),
            max_length=choice.max_length,
            pack=choice.pack,
            grad_cache_chunk_size=4 if choice.pack else 1,  # rows alone need no padding
        )
    kinds = {"contrastive": ContrastiveRecipe, "retrieval": RetrievalRecipe, "captions": CaptionRecipe}
    return kinds[choice.task](**shared, weight_decay=0.05, max_text_length=max_text_length, grad_cache_chunk_size=32)
