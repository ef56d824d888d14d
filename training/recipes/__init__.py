"""The stages as recipes: functions that return every number of a run.

"full" is the scale of the paper, "small" what one machine can train, "bundled" what the checkpoint of this repository
was trained by, on generated scenes; "v1.2" and "v2.5" of stage 3 are the scale of later InternVL-Chat models. What a
phase trains are the parts it has learning rates for (names of `parameter_groups.PARTS`); everything else is frozen. A
variant of a recipe is a `dataclasses.replace` of it.
"""

from collections.abc import Callable
from typing import Any

from .base import (
    Batch,
    CaptionRecipe,
    ContrastiveRecipe,
    DialogueRecipe,
    EmbeddingRecipe,
    GenerativeRecipe,
    Phase,
    Recipe,
    RecipeType,
    RetrievalRecipe,
    phase_named,
    with_steps,
)
from .bundled import stage1_bundled, stage2_bundled, stage3_bundled
from .full import RETRIEVAL_DATA, captions, retrieval, stage1, stage2, stage3
from .later import stage3_v1_2, stage3_v2_5
from .small import captions_small, retrieval_small, stage1_small, stage2_small, stage3_small


RECIPES: dict[str, dict[str, Callable[..., Any]]] = {
    "stage1": {"small": stage1_small, "full": stage1, "bundled": stage1_bundled},
    "stage2": {"small": stage2_small, "full": stage2, "bundled": stage2_bundled},
    "stage3": {
        "small": stage3_small,
        "full": stage3,
        "bundled": stage3_bundled,
        "v1.2": stage3_v1_2,
        "v2.5": stage3_v2_5,
    },
    "retrieval": {"small": retrieval_small, "full": retrieval},
    "captions": {"small": captions_small, "full": captions},
}


__all__ = [
    "RECIPES",
    "RETRIEVAL_DATA",
    "Batch",
    "CaptionRecipe",
    "ContrastiveRecipe",
    "DialogueRecipe",
    "EmbeddingRecipe",
    "GenerativeRecipe",
    "Phase",
    "Recipe",
    "RecipeType",
    "RetrievalRecipe",
    "captions",
    "captions_small",
    "phase_named",
    "retrieval",
    "retrieval_small",
    "stage1",
    "stage1_bundled",
    "stage1_small",
    "stage2",
    "stage2_bundled",
    "stage2_small",
    "stage3",
    "stage3_bundled",
    "stage3_small",
    "stage3_v1_2",
    "stage3_v2_5",
    "with_steps",
]
