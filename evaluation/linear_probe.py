"""Linear probe of frozen InternViT features: `python -m internvl.evaluation linear_probe MODEL`.

scikit-learn's logistic regression is fitted on the class token and the mean of the patches. Any model with a
`vision_model` will do, and `InternVisionModel` itself.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ..extras import extra
from ..renaming_internvl import renamed_arguments
from .embeddings import batches, pixel_values_of
from .generated import CLASSES, labelled_images


def fit_and_score(
    features: np.ndarray, labels: Sequence[int], held_out_features: np.ndarray, held_out_labels: Sequence[int]
) -> float:
    """Fits a logistic regression on standardised features (B, F); returns its accuracy on held-out ones (C, F)."""
    with extra("evaluate"):
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    probe.fit(features, labels)
    return float(probe.score(held_out_features, held_out_labels))


@renamed_arguments(pictures="images")
@torch.inference_mode()
def vision_features(
    model: PreTrainedModel, processor: ProcessorMixin, images: Iterable[Image.Image], batch_size: int = 64
) -> np.ndarray:
    """Returns class token and mean of the patches (images, 2 D), of each image as one tile."""
    tower = getattr(model, "vision_model", model)
    rows = []
    for batch in batches(images, batch_size, "extracting features"):
        pixels = pixel_values_of(model, processor, batch)
        tokens = tower(pixels, return_dict=True).last_hidden_state.float()
        rows.append(torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1).cpu())
    return torch.cat(rows).numpy()


def linear_probe(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    train_images: Iterable[Image.Image],
    train_labels: Sequence[int],
    images: Iterable[Image.Image],
    labels: Sequence[int],
    batch_size: int = 64,
) -> float:
    """Fits a probe on the features of training images and measures its accuracy on others; labels are class indices.

    The model has a vision tower, or is one.
    """
    features, held_out = (vision_features(model, processor, part, batch_size) for part in (train_images, images))
    return fit_and_score(features, train_labels, held_out, labels)


@renamed_arguments(train_pictures="train_images", pictures="images")
def evaluate_linear_probe(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    train_images: int = 1500,
    images: int = 500,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Probes for digits, shapes and colours: `train_images` generated images of each kind fit it, `images` measure it.

    Returns:
        "train_images", "images", "chance" and "accuracy", the last two by kind.
    """
    report = {}
    for kind in CLASSES:
        fitted = labelled_images(kind, train_images, seed, "train")
        measured = labelled_images(kind, images, seed)
        report[kind] = linear_probe(
            model,
            processor,
            [item.image for item in fitted],
            [item.label for item in fitted],
            [item.image for item in measured],
            [item.label for item in measured],
            batch_size,
        )
    chance = {kind: 1 / len(values) for kind, values in CLASSES.items()}
    return {"train_images": train_images, "images": images, "chance": chance, "accuracy": report}
