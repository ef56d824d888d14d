"""Linear probe of frozen InternViT features: `python -m internvl.evaluation.linear_probe MODEL_DIR`.

scikit-learn's logistic regression reads digits, shapes and colours off the class token and the mean of the patches. It is
fitted on pictures of the training stream and measured on held-out ones, of writers that training never saw. Any model with
a `vision_model` will do, and `InternVisionModel` itself.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ..synthetic.digits import Split
from .embeddings import batches, pixel_values_of, run_command
from .zero_shot import CLASSES, labelled_pictures


def fit_and_score(
    features: np.ndarray, labels: Sequence[int], held_out_features: np.ndarray, held_out_labels: Sequence[int]
) -> float:
    """Accuracy on held-out features of a logistic regression, fitted on standardised features.

    Args:
        features: (B, F).
        labels: B class indices.
        held_out_features: (C, F).
        held_out_labels: C class indices.
    """
    from sklearn.linear_model import LogisticRegression  # only training and evaluation need scikit-learn
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    probe.fit(features, labels)
    return float(probe.score(held_out_features, held_out_labels))


@torch.inference_mode()
def vision_features(
    model: PreTrainedModel, processor: ProcessorMixin, pictures: Sequence[Image.Image], batch_size: int = 64
) -> np.ndarray:
    """Class token and mean of the patches (pictures, 2 D), of each picture as one tile."""
    tower = getattr(model, "vision_model", model)
    rows = []
    for batch in batches(pictures, batch_size, "reading features"):
        pixels = pixel_values_of(model, processor, batch)
        tokens = tower(pixels, return_dict=True).last_hidden_state.float()
        rows.append(torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1).cpu())
    return torch.cat(rows).numpy()


def evaluate_linear_probe(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    train_pictures: int = 1500,
    pictures: int = 500,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Fits and measures a probe for each kind of class.

    Args:
        model: A model with a vision tower, or the tower.
        processor: Its processor.
        train_pictures: How many of each kind the probe is fitted on.
        pictures: How many of each kind it is measured on.
        seed: Of both streams.
        batch_size: Pictures per call.

    Returns:
        "train_pictures", "pictures", "chance" and "accuracy", the last two by kind.
    """
    counts: dict[Split, int] = {"train": train_pictures, "held_out": pictures}
    report = {}
    for kind in CLASSES:
        parts: list[Any] = []
        for split, count in counts.items():
            items = labelled_pictures(kind, count, seed, split)
            features = vision_features(model, processor, [item.picture for item in items], batch_size)
            parts += [features, [item.label for item in items]]
        report[kind] = fit_and_score(*parts)
    chance = {kind: 1 / len(values) for kind, values in CLASSES.items()}
    return {"train_pictures": train_pictures, "pictures": pictures, "chance": chance, "accuracy": report}


def main() -> None:
    """Evaluate a checkpoint from the command line."""
    run_command("Linear probe of frozen InternViT features.", evaluate_linear_probe, train_pictures=1500, pictures=500)


if __name__ == "__main__":
    main()
