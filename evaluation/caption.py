"""Captions of anyone's images, scored as the COCO caption evaluation scores them.

InternVL-G writes them as published: five beams, 8 to 30 tokens after its prompt; a chat model answers the published
request. Captions are kept beside the results as they are generated, since CIDEr needs all of them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ..kinds import kind_of
from .caption_scores import (
    PTB_TOKENIZER,
    CaptionScores,
    available_tokenizer,
    bleu_of_counts,
    score_captions,
    tokenize_captions,
)
from .captioning import generate_captions
from .corpus_intervals import at_most_one, interval_of_sums
from .reports import metrics_of
from .runs import TaskRun
from .samples import SampleLog


# Published internvl_g/eval/evaluate_caption.py and internvl_chat/eval/caption/evaluate_caption.py.
PROMPTS = {"InternVL-G": "English caption:", "chat": "Provide a one-sentence caption for the provided image."}
GENERATION = {
    "InternVL-G": {"num_beams": 5, "min_new_tokens": 8, "max_new_tokens": 30},
    "chat": {"num_beams": 1, "min_new_tokens": 8, "max_new_tokens": 30},
}
ENDING = ".captions.jsonl"


@torch.inference_mode()
def chat_captions(
    model: PreTrainedModel, processor: ProcessorMixin, images: Sequence[Image.Image], prompt: str, **generation: Any
) -> list[str]:
    """Asks a chat model for a caption of each image, seen as one tile."""
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
        for image in images
    ]
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        max_num=1,
    ).to(model.device)
    tokens = model.generate(**inputs, do_sample=False, **generation)
    answers = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def captions_of(run: TaskRun, kind: str) -> dict[str, str]:
    """Generates the captions of all items, by their names, or goes on where an earlier run was stopped.

    Args:
        run: The run. A protocol may state `prompts` and `options` by the kind of the model.
        kind: "InternVL-G" or "chat".
    """
    run.log.check_done(["answer"])
    if all(item.name in run.log.done for item in run.data.items):
        return {name: sample["answer"] for name, sample in run.log.done.items()}
    prompt = run.protocol.prompts.get(kind, PROMPTS[kind])
    generation = {**GENERATION[kind], **run.protocol.options.get(kind, {})}
    with SampleLog(run.log.path.with_suffix(ENDING), {**run.log.settings, "prompt": prompt, **generation}) as log:
        log.check_done(["answer"])
        left = [item for item in run.data.items if item.name not in log.done]
        for start in range(0, len(left), run.batch_size):
            batch = left[start : start + run.batch_size]
            images = [item.read()[0] for item in batch]
            if kind == "chat":
                texts = chat_captions(run.model, run.processor, images, prompt, **generation)
            else:
                texts = generate_captions(
                    run.model, run.processor, images, None, run.batch_size, prompt=prompt, **generation
                )
            for item, text in zip(batch, texts, strict=True):
                log.add({"id": item.name, "scores": {}, "answer": text})
        return {name: sample["answer"] for name, sample in log.done.items()}


def measure_caption(run: TaskRun) -> dict[str, dict[str, Any]]:
    """Captions the images of a data set and scores the captions.

    Every sample has the scores "KIND/CIDEr", "KIND/ROUGE-L" and "KIND/sentence BLEU-4".

    Returns:
        "KIND/CIDEr", "KIND/ROUGE-L" and "KIND/BLEU-4"; without Java with a note that they are over other words than
        published figures.
    """
    kind, tokenizer = str(kind_of(run.model.config)), available_tokenizer()
    texts, items = captions_of(run, kind), run.data.items
    tokenized = tokenize_captions([[texts[item.name]] for item in items], tokenizer)
    references = tokenize_captions([item.captions for item in items], tokenizer)
    scores = score_captions([text for (text,) in tokenized], references)
    by_sample = {"CIDEr": scores.cider, "ROUGE-L": scores.rouge_l, "sentence BLEU-4": scores.sentence_bleu_4}
    for place, item in enumerate(items):
        if item.name not in run.log.done:
            run.log.add(
                {
                    "id": item.name,
                    "image": str(item.source) if not isinstance(item.source, bytes) else "",
                    "answer": texts[item.name],
                    "expected": list(item.captions),
                    "scores": {f"{kind}/{name}": float(values[place]) for name, values in by_sample.items()},
                }
            )
    run.log.path.with_suffix(ENDING).unlink(missing_ok=True)
    return _metrics(run, kind, scores, tokenizer)


def _metrics(run: TaskRun, kind: str, scores: CaptionScores, tokenizer: str) -> dict[str, dict[str, Any]]:
    found = metrics_of(run.log.done.values())
    found |= at_most_one({name: metric for name, metric in found.items() if not name.endswith("CIDEr")})
    found[f"{kind}/BLEU-4"] = {
        "value": scores.bleu_4,
        "interval": interval_of_sums(bleu_of_counts, np.asarray(scores.bleu_counts)),
        "samples": len(scores.cider),
    }
    if tokenizer != PTB_TOKENIZER:
        note = {
            "comparable": False,
            "notes": [f"{tokenizer}: install Java for the PTB tokenizer of published figures"],
        }
        found = {name: {**metric, **note} for name, metric in found.items()}
    return found
