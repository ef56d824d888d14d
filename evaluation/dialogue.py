"""Dialogue accuracy on held-out generated pictures: `python -m internvl.evaluation.dialogue MODEL_DIR`.

Each question has a picture of its own, drawn from the held-out stream, with digits of writers that training never
saw. Answers are generated greedily and must equal the expected one, apart from case and surrounding blanks. Questions
about small text are about large pictures only, and are asked twice: with tiles, and with the picture as one tile.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ..synthetic.scenes import (
    LAYOUTS,
    QUESTION_KINDS,
    Question,
    choose_question,
    draw_scene,
    questions_about,
    sample_scene,
    scene_generator,
)
from .embeddings import batches, run_command


SMALL_TEXT = "small_text"
EVERYWHERE = ("mixed", "few_tiles", "many_tiles")
LAYOUTS_OF_KIND = {
    "digit": ("digits", *EVERYWHERE),
    "text": ("reading", "mixed"),  # large pictures have small text only
    SMALL_TEXT: ("many_tiles",),
}


@dataclass(frozen=True)
class HeldOutQuestion:
    """A question and the picture it is about."""

    picture: Image.Image
    question: Question
    layout: str


def held_out_question(index: int, seed: int = 0) -> HeldOutQuestion:
    """Return question number `index`; kinds take turns, and so do the layouts within a kind."""
    kind = QUESTION_KINDS[index % len(QUESTION_KINDS)]
    layouts = LAYOUTS_OF_KIND.get(kind, EVERYWHERE)
    layout = layouts[index // len(QUESTION_KINDS) % len(layouts)]  # each of them has scenes with such a question
    rng = scene_generator("held_out", seed, index)
    while True:  # until the scene has a question of this kind
        scene = sample_scene(rng, LAYOUTS[layout], "held_out")
        candidates = [question for question in questions_about(scene, rng) if question.kind == kind]
        if candidates:
            return HeldOutQuestion(draw_scene(scene), choose_question(candidates, rng), layout)


def held_out_questions(count: int, seed: int = 0) -> list[HeldOutQuestion]:
    """Return `count` held-out questions, balanced over `QUESTION_KINDS`."""
    return [held_out_question(index, seed) for index in range(count)]


def is_right(answer: str, expected: str) -> bool:
    """Whether the answer equals the expected one, apart from case and surrounding blanks."""
    return answer.strip().lower() == expected.strip().lower()


def accuracy_by_kind(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, dict[str, float]]:
    """Count right answers.

    Args:
        questions: What was asked.
        answers: What was answered, in the same order.

    Returns:
        For each kind that was asked: "asked", "right", "accuracy", and "most_common_answer", the accuracy of always
        giving the kind's most frequent expected answer, which needs no picture.
    """
    report = {}
    for kind in QUESTION_KINDS:
        pairs = [(q, a) for q, a in zip(questions, answers, strict=True) if q.kind == kind]
        if not pairs:
            continue
        right = sum(is_right(answer, question.answer) for question, answer in pairs)
        commonest = Counter(question.answer for question, _ in pairs).most_common(1)[0][1]
        report[kind] = {
            "asked": len(pairs),
            "right": right,
            "accuracy": right / len(pairs),
            "most_common_answer": commonest / len(pairs),
        }
    return report


@torch.inference_mode()
def answer_questions(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    items: Sequence[tuple[Image.Image, str]],
    batch_size: int = 8,
    **image_settings: Any,
) -> list[str]:
    """Answer one question about each picture, greedily.

    Args:
        model: A chat model.
        processor: Its processor.
        items: Pictures and questions.
        batch_size: Pictures per call.
        **image_settings: Go to the image processor, for instance `max_num=1` for one tile per picture.

    Returns:
        The answers, without special tokens.
    """
    answers: list[str] = []
    for batch in batches(items, batch_size, "answering"):
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]
            for picture, text in batch
        ]
        prompts = processor.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
        pictures = [[picture] for picture, _ in batch]
        inputs = processor(
            text=prompts, images=pictures, padding=True, padding_side="left", return_tensors="pt", **image_settings
        ).to(model.device)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=12)
        new_tokens = tokens[:, inputs["input_ids"].shape[1] :]
        answers += processor.batch_decode(new_tokens, skip_special_tokens=True)
    return answers


def ask(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    asked: Sequence[HeldOutQuestion],
    batch_size: int = 8,
    **image_settings: Any,
) -> dict[str, Any]:
    """Ask held-out questions.

    Args:
        model: A chat model.
        processor: Its processor.
        asked: The questions.
        batch_size: Pictures per call.
        **image_settings: As for `answer_questions`.

    Returns:
        "questions" (how many), "accuracy", and "by_kind" (see `accuracy_by_kind`).
    """
    questions = [item.question for item in asked]
    items = [(item.picture, item.question.text) for item in asked]
    answers = answer_questions(model, processor, items, batch_size, **image_settings)
    right = sum(is_right(answer, question.answer) for question, answer in zip(questions, answers, strict=True))
    return {
        "questions": len(asked),
        "accuracy": right / len(asked) if asked else 0.0,
        "by_kind": accuracy_by_kind(questions, answers),
    }


def evaluate_dialogue(
    model: PreTrainedModel, processor: ProcessorMixin, questions: int = 500, seed: int = 0, batch_size: int = 8
) -> dict[str, Any]:
    """Ask held-out questions.

    Args:
        model: A chat model.
        processor: Its processor.
        questions: How many.
        seed: Of the held-out stream.
        batch_size: Pictures per call.

    Returns:
        What `ask` gives, and "small_text_one_tile": the same questions about small text with every picture shown as one
        tile.
    """
    asked = held_out_questions(questions, seed)
    small = [item for item in asked if item.question.kind == SMALL_TEXT]
    report = ask(model, processor, asked, batch_size)
    blurred = ask(model, processor, small, batch_size, max_num=1)
    return {**report, "small_text_one_tile": blurred["by_kind"].get(SMALL_TEXT)}


def main() -> None:
    """Evaluate a checkpoint from the command line."""
    description = "Dialogue accuracy on held-out generated pictures."
    run_command(description, evaluate_dialogue, ("chat",), questions=500, batch_size=8)


if __name__ == "__main__":
    main()
