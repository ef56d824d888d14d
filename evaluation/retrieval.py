"""Image-text retrieval, both ways: `python -m internvl.evaluation retrieval MODEL`.

InternVL-C and, where the model has queries, InternVL-G are measured, by R@1, R@5 and R@10.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ..synthetic.captions import LANGUAGES, caption
from ..synthetic.scenes import draw_scene
from .embeddings import embed_images_by_mode, embed_texts, modes_of
from .generated import held_out_scenes
from .metrics import CUTS, recalls_both_ways


def retrieve(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Iterable[Image.Image],
    captions: Mapping[str, Sequence[Sequence[str]]],
    cuts: Sequence[int] = CUTS,
    batch_size: int = 64,
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Measures recall of captions by images and of images by captions, by InternVL-C, and by -G if there are queries.

    `captions` holds those of every image, one or more, by the name of the set, such as a language. Equal captions
    match each other's images. `cuts` has each k of R@k.

    Returns:
        Recalls by mode and set of captions, as from `recalls_both_ways`.
    """
    texts = {name: [text for of_image in of_set for text in of_image] for name, of_set in captions.items()}
    owners = {
        name: [number for number, of_image in enumerate(of_set) for _ in of_image] for name, of_set in captions.items()
    }
    text_embeds = {name: embed_texts(model, processor, rows) for name, rows in texts.items()}
    image_embeds = embed_images_by_mode(model, processor, images, modes_of(model), batch_size)
    return {
        mode: {
            name: recalls_both_ways(embeds, text_embeds[name], texts[name], cuts, owners[name]) for name in captions
        }
        for mode, embeds in image_embeds.items()
    }


def evaluate_retrieval(
    model: PreTrainedModel, processor: ProcessorMixin, pairs: int = 500, seed: int = 0, batch_size: int = 64
) -> dict[str, Any]:
    """Searches so many held-out generated scenes, with one caption each, in every language.

    Returns:
        "pairs", and "recall": by mode and language, as from `recalls_both_ways`.
    """
    scenes = held_out_scenes(pairs, seed)
    captions = {language: [[caption(scene, language)] for scene in scenes] for language in LANGUAGES}
    images = (draw_scene(scene) for scene in scenes)
    return {"pairs": pairs, "recall": retrieve(model, processor, images, captions, batch_size=batch_size)}
