"""Dialogue accuracy: `python -m internvl.evaluation dialogue MODEL`.

Answers are generated greedily and must equal the expected one, apart from case and surrounding blanks. Generated
questions about small text are about large images only, and are asked twice: with tiles, and with the image as one
tile.
"""

from collections.abc import Iterable
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ..renaming_internvl import renamed_names
from .embeddings import batches
from .generated import SMALL_TEXT, ImageQuestion, held_out_questions
from .metrics import accuracy_by_kind, is_correct  # noqa: F401 (this module had it as `is_right`)


@torch.inference_mode()
def answer_questions(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    items: Iterable[tuple[Image.Image, str]],
    batch_size: int = 8,
    **image_settings: Any,
) -> list[str]:
    """Answers one question about each image by a chat model, greedily; the answers have no special tokens.

    `image_settings` go to the image processor, for instance `max_num=1` for one tile per image.
    """
    answers: list[str] = []
    for batch in batches(items, batch_size, "answering"):
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
            for image, text in batch
        ]
        prompts = processor.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
        images = [[image] for image, _ in batch]
        inputs = processor(
            text=prompts, images=images, padding=True, padding_side="left", return_tensors="pt", **image_settings
        ).to(model.device)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=12)
        new_tokens = tokens[:, inputs["input_ids"].shape[1] :]
        answers += processor.batch_decode(new_tokens, skip_special_tokens=True)
    return answers


def evaluate_questions(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    asked: Iterable[ImageQuestion],
    batch_size: int = 8,
    **image_settings: Any,
) -> dict[str, Any]:
    """Asks a chat model questions about images as `answer_questions` does, and counts the correct answers.

    Returns:
        "questions" (how many), "accuracy", and "by_kind" (see `accuracy_by_kind`).
    """
    asked = list(asked)
    questions = [item.question for item in asked]
    items = [(item.image, item.question.text) for item in asked]
    answers = answer_questions(model, processor, items, batch_size, **image_settings)
    by_kind = accuracy_by_kind(questions, answers)
    right = sum(kind["right"] for kind in by_kind.values())
    return {"questions": len(asked), "accuracy": right / len(asked) if asked else 0.0, "by_kind": by_kind}


def evaluate_dialogue(
    model: PreTrainedModel, processor: ProcessorMixin, questions: int = 500, seed: int = 0, batch_size: int = 8
) -> dict[str, Any]:
    """Asks a chat model questions about held-out generated scenes, of the stream with this seed.

    Returns:
        What `evaluate_questions` gives, and "small_text_one_tile": the questions about small text again, with every
        image as one tile.
    """
    asked = held_out_questions(questions, seed)
    small = [item for item in asked if item.question.kind == SMALL_TEXT]
    report = evaluate_questions(model, processor, asked, batch_size)
    blurred = evaluate_questions(model, processor, small, batch_size, max_num=1)
    return {**report, "small_text_one_tile": blurred["by_kind"].get(SMALL_TEXT)}


__getattr__ = renamed_names(globals(), ask="evaluate_questions", is_right="is_correct")
