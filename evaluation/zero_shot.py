"""Zero-shot classification of digits, shapes and colours by prompts: `python -m internvl.evaluation.zero_shot MODEL_DIR`.

Every picture is a held-out scene with one object; its digits are of writers that training never saw. A class is the mean
of the embeddings of all its prompts (an ensemble, as in CLIP), in each of five languages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ..synthetic.captions import LANGUAGES, PAIR_LAYOUTS, prompts
from ..synthetic.digits import Split
from ..synthetic.scenes import COLOURS, SHAPES, draw_scene, sample_scene, scene_generator
from .embeddings import embed_pictures, embed_texts, modes_of, run_command


# Classes, and the layout whose only object has one.
CLASSES = {"digit": tuple("0123456789"), "shape": SHAPES, "colour": tuple(COLOURS)}
LAYOUT_OF = {"digit": "one_digit", "shape": "one_shape", "colour": "one_shape"}


@dataclass(frozen=True)
class LabelledPicture:
    """A picture and the index of its class in `CLASSES` of its kind."""

    picture: Image.Image
    label: int


def labelled_pictures(kind: str, count: int, seed: int = 0, split: Split = "held_out") -> list[LabelledPicture]:
    """Pictures of one object; those of a smaller `count` are the first of a larger one.

    Args:
        kind: One of `CLASSES`.
        count: How many.
        seed: Of the stream.
        split: "held_out" or "train".
    """
    found = []
    for index in range(count):
        rng = scene_generator(split, seed, index)
        scene = sample_scene(rng, PAIR_LAYOUTS[LAYOUT_OF[kind]], split)
        (item,) = scene.objects
        value = item.colour if kind == "colour" else item.value
        found.append(LabelledPicture(draw_scene(scene), CLASSES[kind].index(value)))
    return found


def ensemble(embeds: torch.Tensor, class_of: Sequence[int]) -> torch.Tensor:
    """One unit vector per class: the direction of the mean of its prompts.

    Args:
        embeds: (prompts, E), unit length.
        class_of: The class of each prompt; every class from 0 to the largest has at least one.

    Returns:
        (classes, E).
    """
    index = torch.tensor(class_of, device=embeds.device)
    sums = embeds.new_zeros(int(index.max()) + 1, embeds.shape[1]).index_add_(0, index, embeds)
    return F.normalize(sums, dim=-1)


def accuracy(image_embeds: torch.Tensor, class_embeds: torch.Tensor, labels: Sequence[int]) -> float:
    """Share of pictures that are most similar to their own class.

    Args:
        image_embeds: (B, E).
        class_embeds: (classes, E).
        labels: B class indices.
    """
    predicted = (image_embeds @ class_embeds.T).argmax(dim=1)
    return (predicted == torch.tensor(labels, device=predicted.device)).float().mean().item()


def class_embeddings(
    model: PreTrainedModel, processor: ProcessorMixin, kind: str, language: str, batch_size: int = 256
) -> torch.Tensor:
    """The ensembles (classes, E) of a kind's prompts in a language."""
    texts = [(text, label) for label, value in enumerate(CLASSES[kind]) for text in prompts(language, kind, value)]
    embeds = embed_texts(model, processor, [text for text, _ in texts], batch_size)
    return ensemble(embeds, [label for _, label in texts])


def evaluate_zero_shot(
    model: PreTrainedModel, processor: ProcessorMixin, pictures: int = 500, seed: int = 0, batch_size: int = 64
) -> dict[str, Any]:
    """Classifies held-out pictures with prompts in every language.

    Args:
        model: An `InternVLModel`; InternVL-C is measured, and -G too if it has queries.
        processor: Its processor.
        pictures: How many of each kind.
        seed: Of the held-out stream.
        batch_size: Pictures per call.

    Returns:
        "pictures", "chance" (by kind), and "accuracy": by mode, language and kind.
    """
    modes = modes_of(model)
    report: dict[str, Any] = {mode: {language: {} for language in LANGUAGES} for mode in modes}
    for kind in CLASSES:
        items = labelled_pictures(kind, pictures, seed)
        labels = [item.label for item in items]
        classes = {language: class_embeddings(model, processor, kind, language) for language in LANGUAGES}
        for mode in modes:
            embeds = embed_pictures(model, processor, [item.picture for item in items], mode, batch_size)
            for language, class_embeds in classes.items():
                report[mode][language][kind] = accuracy(embeds, class_embeds, labels)
    chance = {kind: 1 / len(values) for kind, values in CLASSES.items()}
    return {"pictures": pictures, "chance": chance, "accuracy": report}


def main() -> None:
    """Evaluate a checkpoint from the command line."""
    run_command("Zero-shot classification of held-out pictures in five languages.", evaluate_zero_shot, pictures=500)


if __name__ == "__main__":
    main()
