"""Zero-shot classification by prompts: `python -m internvl.evaluation zero_shot MODEL`.

A class is the mean of the embeddings of all its prompts (an ensemble, as in CLIP).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ..renaming_internvl import renamed_arguments, renamed_names
from ..synthetic.captions import LANGUAGES
from .data.prompts import prompts_of
from .embeddings import embed_frames, embed_images_by_mode, embed_texts, modes_of
from .generated import CLASSES, class_prompts, labelled_images
from .metrics import accuracy, mean_per_class, ranks_of_matches
from .runs import TaskRun


TOP = 5


def ensemble(embeds: torch.Tensor, class_of: Sequence[int]) -> torch.Tensor:
    """Averages the prompts of each class.

    Args:
        embeds: (prompts, E), unit length.
        class_of: The class of each prompt; every class from 0 to the largest has at least one.

    Returns:
        Unit vectors (classes, E).
    """
    index = torch.tensor(class_of, device=embeds.device)
    sums = embeds.new_zeros(int(index.max()) + 1, embeds.shape[1]).index_add_(0, index, embeds)
    return F.normalize(sums, dim=-1)


def embed_classes(
    model: PreTrainedModel, processor: ProcessorMixin, prompts: Sequence[Sequence[str]], batch_size: int = 256
) -> torch.Tensor:
    """Embeds classes, given the prompts of each; returns unit vectors (classes, E), the same for the same prompts."""
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    texts = [(text, number) for number, of_class in enumerate(distinct) for text in of_class]
    embeds = embed_texts(model, processor, [text for text, _ in texts], batch_size)
    number_of = {of_class: number for number, of_class in enumerate(distinct)}
    return ensemble(embeds, [number for _, number in texts])[[number_of[tuple(of_class)] for of_class in prompts]]


def class_embeddings(
    model: PreTrainedModel, processor: ProcessorMixin, kind: str, language: str, batch_size: int = 256
) -> torch.Tensor:
    """Embeds the classes of generated images, see `class_prompts`; returns unit vectors (classes, E)."""
    return embed_classes(model, processor, class_prompts(kind, language), batch_size)


def classify(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Iterable[Image.Image],
    labels: Sequence[int],
    prompts: Mapping[str, Sequence[Sequence[str]]],
    batch_size: int = 64,
) -> dict[str, dict[str, float]]:
    """Measures zero-shot accuracy of InternVL-C, and of InternVL-G too if the model has queries.

    `labels` are class indices; `prompts` holds those of every class by the name of the set, such as a language.

    Returns:
        Accuracy by mode and set of prompts.
    """
    classes = {name: embed_classes(model, processor, of_set) for name, of_set in prompts.items()}
    embeds = embed_images_by_mode(model, processor, images, modes_of(model), batch_size)
    return {
        mode: {name: accuracy(of_mode, of_set, labels) for name, of_set in classes.items()}
        for mode, of_mode in embeds.items()
    }


def measure_zero_shot(run: TaskRun) -> dict[str, dict[str, Any]]:
    """Classifies the images or videos of a data set, in the modes of the protocol.

    Every sample has the scores "MODE/top-1", "MODE/top-5" and their mean, which is what Kinetics reports.

    Classes of one name have the same prompts, as `sunglasses` of ImageNet: the first of them is the answer, as where
    the published code sorts, so that images of the others are wrong.

    Returns:
        "MODE/mean per class", which is no mean of samples.
    """
    classes = run.data.classes
    run.log.check_done(metrics=[f"{mode}/top-1" for mode in run.modes])
    if any(item.name not in run.log.done for item in run.data.items):
        embeds = embed_classes(run.model, run.processor, prompts_of(classes, run.data.templates))
    for batch in run.items_left("classifying"):
        frames = [item.read(run.protocol.frames) for item in batch]
        found = embed_frames(run.model, run.processor, frames, run.modes)
        similarity = {mode: of_mode @ embeds.T for mode, of_mode in found.items()}
        for row, item in enumerate(batch):
            of_item = {mode: of_mode[row] for mode, of_mode in similarity.items()}
            run.log.add({"id": item.name, **_classified(of_item, item.labels, classes)})
    samples = [run.log.done[item.name] for item in run.data.items]
    labels = [item.labels for item in run.data.items]
    return {
        f"{mode}/mean per class": {
            "value": mean_per_class([sample["scores"][f"{mode}/top-1"] for sample in samples], labels),
            "samples": len(samples),
        }
        for mode in run.modes
    }


def _classified(
    similarity: Mapping[str, torch.Tensor], labels: Sequence[int], classes: Sequence[str]
) -> dict[str, Any]:
    """What is kept of an image with similarities (classes,) by mode."""
    scores: dict[str, float] = {}
    answers: dict[str, str] = {}
    is_match = torch.zeros(1, len(classes), dtype=torch.bool)
    is_match[0, list(labels)] = True
    first = {classes[label]: label for label in sorted(labels, reverse=True)}  # right, of the classes of a name
    twins = [place for place, name in enumerate(classes) if first.get(name, place) < place and place not in labels]
    behind = torch.tensor(twins, dtype=torch.long)
    for mode, row in similarity.items():
        row = row.index_fill(0, behind, float(row.min()) - 1)
        rank = int(ranks_of_matches(row[None], is_match))
        top_1, top_5 = float(rank < 1), float(rank < TOP)
        scores |= {
            f"{mode}/top-1": top_1,
            f"{mode}/top-5": top_5,
            f"{mode}/mean of top-1 and top-5": (top_1 + top_5) / 2,
        }
        answers[mode] = classes[int(row.argmax())]
    expected = " or ".join(classes[label] for label in labels)
    return {"scores": scores, "expected": expected, "answer": next(iter(answers.values())), "answers": answers}


@renamed_arguments(pictures="images")
def evaluate_zero_shot(
    model: PreTrainedModel, processor: ProcessorMixin, images: int = 500, seed: int = 0, batch_size: int = 64
) -> dict[str, Any]:
    """Classifies held-out generated images, so many of each kind, with prompts in every language.

    Returns:
        "images", "chance" (by kind), and "accuracy": by mode, language and kind.
    """
    report: dict[str, Any] = {mode: {language: {} for language in LANGUAGES} for mode in modes_of(model)}
    for kind in CLASSES:
        items = labelled_images(kind, images, seed)
        prompts = {language: class_prompts(kind, language) for language in LANGUAGES}
        labels = [item.label for item in items]
        found = classify(model, processor, [item.image for item in items], labels, prompts, batch_size)
        for mode, languages in found.items():
            for language, share in languages.items():
                report[mode][language][kind] = share
    chance = {kind: 1 / len(values) for kind, values in CLASSES.items()}
    return {"images": images, "chance": chance, "accuracy": report}


__getattr__ = renamed_names(globals(), labelled_pictures="labelled_images")
