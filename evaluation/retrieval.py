"""Image-text retrieval over held-out scenes, both ways: `python -m internvl.evaluation.retrieval MODEL_DIR`.

Pictures and captions are as many; each scene has one caption in each language, and captions that happen to be equal are
both right. InternVL-C and, where the model has queries, InternVL-G are measured, by R@1, R@5 and R@10.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ..synthetic.captions import LANGUAGES, PAIR_LAYOUTS, caption
from ..synthetic.scenes import Scene, draw_scene, sample_scene, scene_generator
from .embeddings import embed_pictures, embed_texts, modes_of, run_command


LAYOUTS_SEARCHED = ("few", "mixed", "crowd")
CUTS = (1, 5, 10)


def recalls(similarity: torch.Tensor, is_match: torch.Tensor, cuts: Sequence[int] = CUTS) -> dict[str, float]:
    """Share of queries with a match among the k most similar items.

    Args:
        similarity: (queries, items).
        is_match: (queries, items), booleans; every query has at least one match.
        cuts: Each k.

    Returns:
        "R@k" for each k. Items as similar as the best match count as ranked before it.

    Raises:
        ValueError: A query without a match.
    """
    if not bool(is_match.any(dim=1).all()):
        raise ValueError("Every query needs a match among the items, but a row of `is_match` has none.")
    best = similarity.masked_fill(~is_match, -torch.inf).amax(dim=1, keepdim=True)
    rank = ((similarity >= best) & ~is_match).sum(dim=1)
    return {f"R@{k}": (rank < k).float().mean().item() for k in cuts}


def recalls_both_ways(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, texts: Sequence[str], cuts: Sequence[int] = CUTS
) -> dict[str, dict[str, float]]:
    """Recalls of pairs.

    Args:
        image_embeds: (B, E), unit length.
        text_embeds: (B, E), unit length.
        texts: The B texts; equal ones match each other's pictures.
        cuts: Each k.

    Returns:
        "image_to_text" and "text_to_image", as from `recalls`.
    """
    number = {text: index for index, text in enumerate(texts)}
    index = torch.tensor([number[text] for text in texts])
    is_match = index[:, None] == index
    similarity = image_embeds @ text_embeds.T
    return {
        "image_to_text": recalls(similarity, is_match, cuts),
        "text_to_image": recalls(similarity.T, is_match, cuts),
    }


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Scenes of the layouts in turn, with digits of writers that training never saw."""
    return [
        sample_scene(
            scene_generator("held_out", seed, index),
            PAIR_LAYOUTS[LAYOUTS_SEARCHED[index % len(LAYOUTS_SEARCHED)]],
            "held_out",
        )
        for index in range(count)
    ]


def evaluate_retrieval(
    model: PreTrainedModel, processor: ProcessorMixin, pairs: int = 500, seed: int = 0, batch_size: int = 64
) -> dict[str, Any]:
    """Finds captions of pictures, and pictures of captions, in every language.

    Args:
        model: An `InternVLModel`.
        processor: Its processor.
        pairs: Scenes.
        seed: Of the held-out stream.
        batch_size: Pictures per call.

    Returns:
        "pairs", and "recall": by mode and language, as from `recalls_both_ways`.
    """
    scenes = held_out_scenes(pairs, seed)
    texts = {language: [caption(scene, language) for scene in scenes] for language in LANGUAGES}
    text_embeds = {language: embed_texts(model, processor, rows) for language, rows in texts.items()}
    pictures: list[Image.Image] = [draw_scene(scene) for scene in scenes]
    report: dict[str, Any] = {}
    for mode in modes_of(model):
        image_embeds = embed_pictures(model, processor, pictures, mode, batch_size)
        report[mode] = {
            language: recalls_both_ways(image_embeds, text_embeds[language], texts[language]) for language in LANGUAGES
        }
    return {"pairs": pairs, "recall": report}


def main() -> None:
    """Evaluate a checkpoint from the command line."""
    run_command("Image-text retrieval over held-out scenes in five languages.", evaluate_retrieval, pairs=500)


if __name__ == "__main__":
    main()
