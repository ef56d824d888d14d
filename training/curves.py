"""Learning curves on held-out generated scenes: what a stage measures as it trains."""

from typing import Any

import torch

from ..evaluation.embeddings import embed_pictures, embed_texts, modes_of
from ..evaluation.retrieval import held_out_scenes, recalls_both_ways
from ..evaluation.zero_shot import CLASSES, accuracy, class_embeddings, labelled_pictures
from ..processing_internvl import InternVLProcessor
from ..synthetic.captions import caption
from ..synthetic.scenes import draw_scene
from .models.losses import l2_normalize


SEED = 1  # the evaluations use 0


class ZeroShotCurve:
    """Accuracy of zero-shot classification with English prompts.

    Args:
        processor: The model's processor.
        num_images: Held-out images of each kind.
    """

    def __init__(self, processor: InternVLProcessor, num_images: int) -> None:
        self.processor = processor
        self.pixels, self.labels = {}, {}
        for kind in CLASSES:
            items = labelled_pictures(kind, num_images, seed=SEED)
            self.pixels[kind] = processor(images=[item.picture for item in items], return_tensors="pt")["pixel_values"]
            self.labels[kind] = [item.label for item in items]

    def __call__(self, model: Any) -> dict[str, float]:
        """Return `zero_shot_KIND` for each kind."""
        point = {}
        for kind, pixels in self.pixels.items():
            with torch.inference_mode():
                embeds = l2_normalize(model.get_image_features(pixels.to(model.device)).float())
            classes = class_embeddings(model, self.processor, kind, "en").to(embeds.device)
            point[f"zero_shot_{kind}"] = accuracy(embeds, classes, self.labels[kind])
        return point


class RetrievalCurve:
    """R@1 between images and their English captions, of InternVL-C and -G.

    Args:
        processor: The model's processor.
        num_pairs: Held-out pairs.
    """

    def __init__(self, processor: InternVLProcessor, num_pairs: int) -> None:
        self.processor = processor
        scenes = held_out_scenes(num_pairs, seed=SEED)
        self.images = [draw_scene(scene) for scene in scenes]
        self.texts = [caption(scene) for scene in scenes]

    def __call__(self, model: Any) -> dict[str, float]:
        """Return `recall_at_1_MODE` for each mode, the mean of both directions."""
        texts = embed_texts(model, self.processor, self.texts)
        point = {}
        for mode in modes_of(model):
            images = embed_pictures(model, self.processor, self.images, mode)
            found = recalls_both_ways(images, texts, self.texts)
            point[f"recall_at_1_{mode}"] = sum(part["R@1"] for part in found.values()) / len(found)
        return point


__all__ = ["RetrievalCurve", "ZeroShotCurve"]
