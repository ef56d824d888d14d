"""Captions of held-out scenes by InternVL-G: `python -m internvl.evaluation.captioning MODEL_DIR`.

Two measures, in each of five languages. Facts: the objects that a caption names, each right only with its kind, value, colour,
size and place. CIDEr: in its variant D (https://arxiv.org/abs/1411.5726, section 4), as usually reported, over plain words;
Chinese and Japanese are cut into characters.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ..synthetic.captions import CAPTION_PROMPTS, LANGUAGES, caption, language_of
from ..synthetic.scenes import COLOURS, NUMBERS, SHAPES, WORDS, Scene, SceneObject, draw_scene
from .embeddings import batches, pixel_values_of, run_command
from .retrieval import held_out_scenes


LONGEST_NGRAM = 4
SIGMA = 6.0  # of the length penalty, in words
SCALE = 10.0

# Kind, value, colour, whether small, and the index of the place.
Fact = tuple[str, str, str, bool, int]


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation; kana and Chinese characters one by one."""
    return re.findall(r"[\u3041-\u30ff\u4e00-\u9fff]|[^\W\u3041-\u30ff\u4e00-\u9fff]+", text.lower())


def _ngrams(words: Sequence[str]) -> list[Counter[tuple[str, ...]]]:
    """Counts of the n-grams of every length."""
    return [
        Counter(tuple(words[start : start + n]) for start in range(len(words) - n + 1))
        for n in range(1, LONGEST_NGRAM + 1)
    ]


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each candidate; 10 is the best.

    Args:
        candidates: One caption per picture.
        references: The captions that each picture should have. They also say how rare an n-gram is: in how many pictures'
            references it occurs. With one picture alone no n-gram is rare, and the score is 0.

    Raises:
        ValueError: Not as many lists of references as candidates, or an empty one.
    """
    if len(candidates) != len(references) or not all(references):
        raise ValueError(
            f"Each of the {len(candidates)} candidates needs a list of references, got {len(references)} lists, of lengths "
            f"{sorted({len(texts) for texts in references})}."
        )
    counted = [[_ngrams(words_of(text)) for text in texts] for texts in references]
    pictures_with = Counter(
        gram for picture in counted for gram in {gram for text in picture for counts in text for gram in counts}
    )
    log_pictures = math.log(max(1, len(references)))

    def weigh(counts: Counter[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
        return {gram: count * (log_pictures - math.log(max(1, pictures_with[gram]))) for gram, count in counts.items()}

    scores = []
    for candidate, texts in zip(candidates, counted, strict=True):
        own = _ngrams(words_of(candidate))
        weighted = [weigh(counts) for counts in own]
        total = 0.0
        for text in texts:
            penalty = math.exp(-((own[0].total() - text[0].total()) ** 2) / (2 * SIGMA**2))
            parts = [_clipped_cosine(*pair) for pair in zip(weighted, map(weigh, text), strict=True)]
            total += penalty * sum(parts) / LONGEST_NGRAM
        scores.append(SCALE * total / len(texts))
    return scores


def _clipped_cosine(candidate: dict[tuple[str, ...], float], reference: dict[tuple[str, ...], float]) -> float:
    """Cosine in which the candidate gains nothing by saying an n-gram more often than the reference."""
    dot = sum(min(candidate[gram], weight) * weight for gram, weight in reference.items() if gram in candidate)
    lengths = [math.sqrt(sum(weight**2 for weight in part.values())) for part in (candidate, reference)]
    return dot / math.prod(lengths) if all(lengths) else 0.0


def facts_of(scene: Scene) -> Counter[Fact | None]:
    """What a complete caption of a scene says."""
    return Counter(_fact(item) for item in scene.objects)


def facts_in(text: str, language: str = "en") -> Counter[Fact | None]:
    """What a caption says, in any of the wordings of `captions.caption`; None stands for parts that say nothing known."""
    words = language_of(language)
    for frame in sorted(words.frames, key=len, reverse=True):
        before, after = frame.split("{things}")
        if text.startswith(before) and text.endswith(after):
            text = text[len(before) : len(text) - len(after)]
            break
    table = _facts_by_phrase(language)
    parts = re.split("|".join(map(re.escape, words.separators)), text) if text != words.empty else []
    return Counter(table.get(part.strip()) for part in parts)


def _fact(item: SceneObject) -> Fact:
    return item.kind, item.value, item.colour, item.is_small, item.place


@lru_cache(maxsize=len(LANGUAGES))
def _facts_by_phrase(language: str) -> dict[str, Fact]:
    words = language_of(language)
    things = [("shape", shape, colour, False) for shape in SHAPES for colour in COLOURS]
    things += [("digit", str(digit), "", False) for digit in range(10)]
    texts = [("word", word) for word in WORDS] + [("number", str(number)) for number in NUMBERS]
    things += [(kind, text, "", is_small) for kind, text in texts for is_small in (False, True)]
    table: dict[str, Fact] = {}
    for kind, value, colour, is_small in things:
        for place, place_word in enumerate(words.places):
            item = SceneObject(kind, value, place, (0, 0), 0, colour, (0, 0, 0), is_small)
            for name in words.names_of(item):
                table[words.at_place(name, place)] = _fact(item)
                table[words.clause.format(place=place_word, thing=name)] = _fact(item)
    return table


def score_facts(texts: Sequence[str], scenes: Sequence[Scene], language: str = "en") -> dict[str, float]:
    """How many facts are right.

    Args:
        texts: One caption per scene.
        scenes: The scenes.
        language: Of the captions.

    Returns:
        "precision" (of all facts said), "recall" (of all facts there are), and "exact", the share of captions that say all
        facts and nothing else.
    """
    said = [facts_in(text, language) for text in texts]
    true = [facts_of(scene) for scene in scenes]
    right = sum((found & expected).total() for found, expected in zip(said, true, strict=True))
    exact = sum(found == expected for found, expected in zip(said, true, strict=True))
    return {
        "precision": right / max(1, sum(found.total() for found in said)),
        "recall": right / max(1, sum(expected.total() for expected in true)),
        "exact": exact / max(1, len(texts)),
    }


@torch.inference_mode()
def describe(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pictures: Sequence[Image.Image],
    language: str = "en",
    batch_size: int = 32,
    max_new_tokens: int = 160,
) -> list[str]:
    """Captions, greedily, after the language's prompt.

    Args:
        model: An `InternVLModel` with queries.
        processor: Its processor.
        pictures: The pictures, each seen as one tile.
        language: A code of `LANGUAGES`.
        batch_size: Pictures per call.
        max_new_tokens: Longest caption.
    """
    texts: list[str] = []
    end, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    for batch in batches(pictures, batch_size, f"describing ({language})"):
        prompt = processor(text=[CAPTION_PROMPTS[language]] * len(batch), mode="caption", return_tensors="pt")
        tokens = model.generate(
            pixel_values=pixel_values_of(model, processor, batch),
            **prompt.to(model.device),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=end,
            pad_token_id=pad,
        )
        texts += [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    return texts


def evaluate_captioning(
    model: PreTrainedModel, processor: ProcessorMixin, pictures: int = 200, seed: int = 0, batch_size: int = 32
) -> dict[str, Any]:
    """Describes held-out scenes in every language.

    Args:
        model: An `InternVLModel` with queries.
        processor: Its processor.
        pictures: Scenes.
        seed: Of the held-out stream.
        batch_size: Pictures per call.

    Returns:
        "pictures", and by language "cider" (the mean) and what `score_facts` gives.
    """
    scenes = held_out_scenes(pictures, seed)
    drawn = [draw_scene(scene) for scene in scenes]
    report: dict[str, Any] = {"pictures": pictures}
    for language in LANGUAGES:
        texts = describe(model, processor, drawn, language, batch_size)
        scores = cider(texts, [[caption(scene, language)] for scene in scenes])
        report[language] = {"cider": sum(scores) / len(scores), **score_facts(texts, scenes, language)}
    return report


def main() -> None:
    """Evaluate a checkpoint from the command line."""
    run_command("Captions of held-out scenes in five languages.", evaluate_captioning, ("InternVL-G",), pictures=200)


if __name__ == "__main__":
    main()
