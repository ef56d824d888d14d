"""What a stage measures as it trains: learning curves on generated scenes, recall and answers on held-out data."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from ..evaluation.captioning import generate_captions
from ..evaluation.embeddings import modes_of
from ..evaluation.generated import CLASSES, class_prompts, held_out_scenes, labelled_images
from ..evaluation.metrics import cider, is_correct
from ..evaluation.retrieval import retrieve
from ..evaluation.zero_shot import classify
from ..layers_internvl import IGNORE_INDEX
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
    """R@1 between images and captions, of InternVL-C and, where the model has queries, of InternVL-G.

    Args:
        processor: The model's processor.
        images: The images.
        captions: One caption of each image; equal ones match each other's images.
    """

    def __init__(self, processor: InternVLProcessor, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
        self.processor = processor
        self.images = images
        self.captions = {"all": [[text] for text in captions]}

    def names(self, model: Any) -> tuple[str, ...]:
        """Return the names of what is measured of this model."""
        return tuple(f"recall_at_1_{mode}" for mode in modes_of(model))

    @classmethod
    def of_scenes(cls, processor: InternVLProcessor, num_pairs: int) -> "RetrievalCurve":
        """Return the curve on held-out generated scenes with English captions."""
        scenes = held_out_scenes(num_pairs, seed=SEED)
        return cls(processor, [draw_scene(scene) for scene in scenes], [caption(scene) for scene in scenes])

    def __call__(self, model: Any) -> dict[str, float]:
        """Return `recall_at_1_MODE` for each mode, the mean of both directions."""
        found = retrieve(model, self.processor, self.images, self.captions)
        return {
            f"recall_at_1_{mode}": sum(part["R@1"] for part in captions["all"].values()) / len(captions["all"])
            for mode, captions in found.items()
        }


class CaptionCurve:
    """CIDEr of captions that are generated greedily, see `metrics.cider`.

    Args:
        processor: The model's processor.
        images: The images.
        captions: One caption of each image.
    """

    def __init__(self, processor: InternVLProcessor, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
        self.processor = processor
        self.images = images
        self.captions = captions
        self.samples: list[dict[str, str]] = []

    def names(self, model: Any) -> tuple[str, ...]:
        """Return the names of what is measured."""
        return ("cider",)

    def __call__(self, model: Any) -> dict[str, float]:
        """Return `cider`, the mean; `samples` then holds expected and generated captions."""
        found = generate_captions(model, self.processor, self.images, language=None)
        names = ("expected", "generated")
        self.samples = [dict(zip(names, pair, strict=True)) for pair in zip(self.captions, found, strict=True)]
        scores = cider(found, [[caption] for caption in self.captions])
        return {"cider": sum(scores) / len(scores)}


class AnswerCurve:
    """Exact match of the last answer of held-out dialogues, which the model generates greedily from all before it.

    Args:
        processor: The model's processor.
        rows: Encoded dialogues, as from `DialogueDataset`.
        num_rows: How many of them are asked.
    """

    def __init__(self, processor: InternVLProcessor, rows: Dataset, num_rows: int) -> None:
        self.processor = processor
        self.rows = [rows[index] for index in range(min(num_rows, len(rows)))]  # type: ignore[arg-type]
        self.samples: list[dict[str, str]] = []

    def names(self, model: Any) -> tuple[str, ...]:
        """Return the names of what is measured."""
        return ("exact_match",)

    def __call__(self, model: Any) -> dict[str, float]:
        """Return `exact_match`; `samples` then holds question, expected and generated answer of each row."""
        self.samples = [self._sample(model, row) for row in self.rows]
        right = sum(is_correct(sample["generated"], sample["expected"]) for sample in self.samples)
        return {"exact_match": right / len(self.samples)}

    @torch.no_grad()
    def _sample(self, model: Any, row: dict[str, torch.Tensor]) -> dict[str, str]:
        is_answer = row["labels"] != IGNORE_INDEX
        end = int(is_answer.nonzero()[-1]) + 1
        start = int((~is_answer[:end]).nonzero()[-1]) + 1
        ids = row["input_ids"]
        inputs = {"input_ids": ids[None, :start], "attention_mask": torch.ones(1, start, dtype=torch.long)}
        if "pixel_values" in row:
            inputs["pixel_values"] = row["pixel_values"]
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        found = model.generate(**inputs, do_sample=False, max_new_tokens=end - start + 8)
        shown = ids[:start][~torch.isin(ids[:start], torch.tensor(self.processor.image_token_ids))]
        texts = self.processor.batch_decode([shown, ids[start:end], found[0, start:]], skip_special_tokens=True)
        return dict(zip(("prompt", "expected", "generated"), texts, strict=True))
