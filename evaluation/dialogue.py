"""Dialogue accuracy: `python -m internvl.evaluation dialogue MODEL`.

Answers are generated greedily and must equal the expected one, apart from case and surrounding blanks. Generated
questions about small text are about large images only, and are asked twice: with tiles, and with the image as one
tile.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ..renaming_internvl import renamed_names
from ..synthetic.scenes import QUESTION_KINDS, Question
from .embeddings import batches
from .generated import SMALL_TEXT, ImageQuestion, held_out_question
from .metrics import accuracy_by_kind, is_correct
from .reports import Report, metrics_of, new_report, samples_file, write_report
from .samples import Sample, SampleLog


ACCURACY = "accuracy"


@torch.inference_mode()
def answer_questions(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    items: Iterable[tuple[Image.Image, str]],
    batch_size: int = 8,
    max_new_tokens: int = 12,
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
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        new_tokens = tokens[:, inputs["input_ids"].shape[1] :]
        answers += processor.batch_decode(new_tokens, skip_special_tokens=True)
    return answers


def answer_samples(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    asked: Iterable[tuple[str, ImageQuestion]],
    batch_size: int = 8,
    metric: str = ACCURACY,
    **image_settings: Any,
) -> Iterator[Sample]:
    """Answers questions with their ids as `answer_questions` does; yields a sample of each once its batch is answered.

    Questions are drawn a batch at a time. A sample counts under `metric`, and under `accuracy/KIND` if that is it.
    """
    for batch in batches(asked, batch_size, "answering"):
        items = [(item.image, item.question.text) for _, item in batch]
        answers = answer_questions(model, processor, items, batch_size, **image_settings)
        for (name, item), answer in zip(batch, answers, strict=True):
            question = item.question
            score = int(is_correct(answer, question.answer))
            yield {
                "id": name,
                "scores": {metric: score, **({f"{metric}/{question.kind}": score} if metric == ACCURACY else {})},
                "kind": question.kind,
                "question": question.text,
                "expected": question.answer,
                "answer": answer,
            }


def _summary(samples: Sequence[Sample]) -> dict[str, Any]:
    questions = [Question(sample["kind"], sample["question"], sample["expected"]) for sample in samples]
    by_kind = accuracy_by_kind(questions, [sample["answer"] for sample in samples])
    right = sum(kind["right"] for kind in by_kind.values())
    return {"questions": len(samples), "accuracy": right / len(samples) if samples else 0.0, "by_kind": by_kind}


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
    named = ((str(number), item) for number, item in enumerate(asked))
    return _summary(list(answer_samples(model, processor, named, batch_size, **image_settings)))


def evaluate_dialogue(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: int = 500,
    seed: int = 0,
    batch_size: int = 8,
    log: SampleLog | None = None,
) -> dict[str, Any]:
    """Asks a chat model questions about held-out generated scenes, of the stream with this seed.

    Args:
        model: The chat model.
        processor: Its processor.
        questions: How many; their kinds are interleaved.
        seed: Of the stream.
        batch_size: Questions at a time.
        log: An open log, which gets every answer, and whose questions are not asked again. The metrics are "accuracy",
            "accuracy/KIND", and "one_tile" for the questions about small text with the image as one tile.

    Returns:
        What `evaluate_questions` gives, and "small_text_one_tile": the questions about small text again, with every
        image as one tile.
    """
    numbers = range(questions)
    small = [number for number in numbers if QUESTION_KINDS[number % len(QUESTION_KINDS)] == SMALL_TEXT]
    ask = partial(_ask_generated, model, processor, seed=seed, batch_size=batch_size, log=log)
    whole = _summary(ask(numbers, ACCURACY))
    blurred = _summary(ask(small, "one_tile", "/one_tile", max_num=1))
    return {**whole, "small_text_one_tile": blurred["by_kind"].get(SMALL_TEXT)}


def report_dialogue(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    output: Path,
    name: str,
    state: str | None = None,
    questions: int = 500,
    seed: int = 0,
    batch_size: int = 8,
) -> Report:
    """Runs `evaluate_dialogue` and writes its report, and beside it every answer; one that was stopped goes on.

    Args:
        model: The chat model.
        processor: Its processor.
        output: The report's file. Answers in its file of samples are kept, so more questions can be asked later.
        name: Of the model, for the report.
        state: Of its weights, see `checkpoint_state`.
        questions: How many.
        seed: Of the stream.
        batch_size: Questions at a time.

    Raises:
        OSError: If a file cannot be written.
        ValueError: If the samples are those of another run, or of more questions.
    """
    settings = {"task": "dialogue", "model": name, "state": state, "seed": seed, "batch_size": batch_size}
    with SampleLog(samples_file(output), settings) as log:
        found = evaluate_dialogue(model, processor, questions, seed, batch_size, log)
        asked = found["questions"] + (found["small_text_one_tile"] or {"asked": 0})["asked"]
        if len(log.done) > asked:
            raise ValueError(f"{log.path} has answers to more than {questions} questions: name another file.")
    settings = {**settings, "questions": questions}
    metrics = metrics_of(log.done.values())
    report = new_report("dialogue", name, settings, metrics, samples=samples_file(output).name, **found)
    write_report(output, report)
    return report


def _ask_generated(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    numbers: Iterable[int],
    metric: str,
    suffix: str = "",
    *,
    seed: int,
    batch_size: int,
    log: SampleLog | None,
    **image_settings: Any,
) -> list[Sample]:
    """Asks held-out generated questions that `log` has no answers to; returns samples of all, in order."""
    names = {f"generated/{seed}/{number}{suffix}": number for number in numbers}
    done = dict(log.done) if log else {}
    if log:
        log.check_done(["kind", "question", "expected", "answer"])
    left = ((name, held_out_question(number, seed)) for name, number in names.items() if name not in done)
    for sample in answer_samples(model, processor, left, batch_size, metric, **image_settings):
        cluster = {"cluster": sample["id"].removesuffix(suffix)} if suffix else {}
        done[sample["id"]] = {**sample, **cluster}
        if log:
            log.add(done[sample["id"]])
    return [done[name] for name in names]


__getattr__ = renamed_names(globals(), ask="evaluate_questions", is_right="is_correct")
