"""Recipes of semantic segmentation on ADE20K (paper tables 5 and 23, published segmentation/configs)."""

from dataclasses import dataclass, replace
from typing import Any


PUBLISHED_STEPS = 80_000
# Share of the images in few-shot training to its steps of warm-up; it takes the same share of the steps.
FEW_SHOT_WARMUPS = {1 / 16: 100, 1 / 8: 200, 1 / 4: 400, 1 / 2: 800, 1.0: 1500}


@dataclass(frozen=True, kw_only=True)
class SegmentationRecipe:
    """Every number of a run.

    Args:
        head: "linear" (batch norm and 1 x 1 convolution) or "upernet".
        trains_tower: Train InternViT; otherwise what is above it alone.
        steps: Optimizer steps.
        warmup_steps: Steps over which the learning rate rises; it falls to 0 over all steps (polynomial of power 1).
        learning_rate: Peak learning rate, of heads; see `layer_decay`.
        weight_decay: Weight decay of matrices, kernels and positions.
        layer_decay: Factor by which each layer of the tower learns slower than the layer above.
        drop_path_rate: Stochastic depth of the last block.
        betas: Betas of AdamW.
        batch_size: Images of a step over all processes.
        image_size: Side of the crops in pixels.
        fraction: Share of the images of the data, drawn by the seed.
        auxiliary_map: Which feature map, from 0, the auxiliary head of UperNet reads; it matters in training alone.
        seed: Decides the order of the data and all random numbers.
    """

    head: str
    trains_tower: bool
    steps: int = PUBLISHED_STEPS
    warmup_steps: int = 1500
    learning_rate: float = 4e-5
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    drop_path_rate: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    batch_size: int = 16
    image_size: int = 504
    fraction: float = 1.0
    auxiliary_map: int = 2
    seed: int = 0


def segmentation_recipe(method: str, fraction: float = 1.0) -> SegmentationRecipe:
    """Returns a published recipe.

    Args:
        method: "linear" (linear probing) and "head" (UperNet) with a frozen tower, "full" (UperNet and the tower), or
            "few-shot" (a linear head and the tower, on a share of the images).
        fraction: That share; other methods take it too, with all of their steps.

    Raises:
        ValueError: If the method is unknown.
    """
    tuned: dict[str, Any] = {"trains_tower": True, "layer_decay": 0.95, "drop_path_rate": 0.4}
    recipes = {
        "linear": SegmentationRecipe(head="linear", trains_tower=False, weight_decay=0.0),
        "head": SegmentationRecipe(head="upernet", trains_tower=False, auxiliary_map=1),
        "full": SegmentationRecipe(head="upernet", **tuned),
        "few-shot": SegmentationRecipe(head="linear", **tuned),
    }
    if method not in recipes:
        raise ValueError(f"`method` must be one of {', '.join(recipes)}, got {method!r}.")
    recipe = replace(recipes[method], fraction=fraction)
    if method != "few-shot":
        return recipe
    steps = max(1, round(PUBLISHED_STEPS * fraction))
    nearest = min(FEW_SHOT_WARMUPS, key=lambda share: abs(share - fraction))
    return replace(recipe, steps=steps, warmup_steps=FEW_SHOT_WARMUPS[nearest])


__all__ = ["SegmentationRecipe", "segmentation_recipe"]
