"""Captions by InternVL-G: `python -m internvl.evaluation captioning MODEL`.

Captions are scored by CIDEr; those of generated scenes also by facts: the objects that a caption names, each correct
only with its kind, value, colour, size and place.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ..renaming_internvl import renamed_arguments, renamed_names
from ..synthetic.captions import CAPTION_PROMPTS, LANGUAGES, caption
from ..synthetic.facts import facts_in, facts_of
from ..synthetic.scenes import Scene, draw_scene
from .embeddings import batches, pixel_values_of
from .generated import held_out_scenes
from .metrics import cider, precision_and_recall


@renamed_arguments(pictures="images")
@torch.inference_mode()
def generate_captions(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Iterable[Image.Image],
    language: str | None = "en",
    batch_size: int = 32,
    max_new_tokens: int = 160,
    prompt: str | None = None,
    **generation: Any,
) -> list[str]:
    """Generates captions of images, each seen as one tile.

    Args:
        model: InternVL-G.
        processor: Its processor.
        images: The images.
        language: Captions follow its prompt of `CAPTION_PROMPTS`; None takes the processor's own.
        batch_size: Images at a time.
        max_new_tokens: Most tokens of a caption.
        prompt: What captions follow instead.
        **generation: Further arguments of `generate`, such as `num_beams`; without any the search is greedy.
    """
    texts: list[str] = []
    end, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    text = prompt or (processor.caption_prompt if language is None else CAPTION_PROMPTS[language])
    for batch in batches(images, batch_size, f"captioning ({language or text})"):
        inputs = processor(text=[text] * len(batch), mode="caption", return_tensors="pt")
        tokens = model.generate(
            pixel_values=pixel_values_of(model, processor, batch),
            **inputs.to(model.device),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=end,
            pad_token_id=pad,
            **generation,
        )
        texts += [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    return texts


def score_facts(texts: Sequence[str], scenes: Sequence[Scene], language: str = "en") -> dict[str, float]:
    """Compares the facts that captions state with those of their scenes, as from `precision_and_recall`."""
    return precision_and_recall([facts_in(text, language) for text in texts], [facts_of(scene) for scene in scenes])


@renamed_arguments(pictures="images")
def evaluate_captioning(
    model: PreTrainedModel, processor: ProcessorMixin, images: int = 200, seed: int = 0, batch_size: int = 32
) -> dict[str, Any]:
    """Captions so many held-out generated scenes in every language.

    Returns:
        "images", and by language "cider" (the mean) and what `score_facts` gives.
    """
    scenes = held_out_scenes(images, seed)
    drawn = [draw_scene(scene) for scene in scenes]
    report: dict[str, Any] = {"images": images}
    for language in LANGUAGES:
        texts = generate_captions(model, processor, drawn, language, batch_size)
        scores = cider(texts, [[caption(scene, language)] for scene in scenes])
        report[language] = {"cider": sum(scores) / len(scores), **score_facts(texts, scenes, language)}
    return report


__getattr__ = renamed_names(globals(), describe="generate_captions")
