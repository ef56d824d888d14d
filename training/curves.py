"""Learning curves on held-out generated scenes: what a stage measures as it trains."""

from typing import Any

from ..evaluation.generated import CLASSES, class_prompts, held_out_scenes, labelled_images
from ..evaluation.retrieval import retrieve
from ..evaluation.zero_shot import classify
from ..processing_internvl import InternVLProcessor
from ..synthetic.captions import caption
from ..synthetic.scenes import draw_scene


SEED = 1  # the evaluations use 0


class ZeroShotCurve:
    """Accuracy of zero-shot classification by InternVL-C with English prompts.

    Args:
        processor: The model's processor.
        num_images: Held-out images of each kind.
    """

    def __init__(self, processor: InternVLProcessor, num_images: int) -> None:
        self.processor = processor
        self.images = {kind: labelled_images(kind, num_images, seed=SEED) for kind in CLASSES}

    def __call__(self, model: Any) -> dict[str, float]:
        """Return `zero_shot_KIND` for each kind."""
        point = {}
        for kind, items in self.images.items():
            images, labels = [item.image for item in items], [item.label for item in items]
            found = classify(model, self.processor, images, labels, {"en": class_prompts(kind, "en")})
            point[f"zero_shot_{kind}"] = found["InternVL-C"]["en"]
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
        self.captions = {"en": [[caption(scene)] for scene in scenes]}

    def __call__(self, model: Any) -> dict[str, float]:
        """Return `recall_at_1_MODE` for each mode, the mean of both directions."""
        found = retrieve(model, self.processor, self.images, self.captions)
        return {
            f"recall_at_1_{mode}": sum(part["R@1"] for part in captions["en"].values()) / len(captions["en"])
            for mode, captions in found.items()
        }
