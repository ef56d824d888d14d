"""Evaluators of sentence-transformers, for `SentenceTransformer(FOLDER, trust_remote_code=True)`.

    evaluators = retrieval_evaluators(images, captions, name="flickr")
    evaluators["image_to_text"](model)["flickr_image_to_text_cosine_accuracy@1"]

is R@1 of captions by images. They are evaluators as its trainer takes them. A folder whose code is that of this
package, and not its own, needs `import internvl` first.
"""

from collections.abc import Sequence

from PIL import Image

from ..metrics import CUTS
from . import harness


with harness("sentence-transformers"):
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator


Entries = dict[str, Image.Image | str]


def retrieval_evaluators(
    images: Sequence[Image.Image],
    captions: Sequence[Sequence[str]],
    name: str = "",
    cuts: Sequence[int] = CUTS,
    batch_size: int = 32,
) -> dict[str, InformationRetrievalEvaluator]:
    """Makes evaluators of retrieval both ways.

    Args:
        images: The images.
        captions: Those of every image, one or more.
        name: Put before the names of the figures.
        cuts: Each k of R@k.
        batch_size: Of the model.

    Returns:
        "image_to_text" and "text_to_image"; R@k is their `[NAME_]WAY_cosine_accuracy@k`.
    """
    image_ids: Entries = {f"image{n}": image for n, image in enumerate(images)}
    text_ids: Entries = {
        f"text{n}-{k}": text for n, of_image in enumerate(captions) for k, text in enumerate(of_image)
    }
    texts_of = {f"image{n}": {f"text{n}-{k}" for k in range(len(texts))} for n, texts in enumerate(captions)}
    image_of = {text: {image} for image, texts in texts_of.items() for text in texts}
    ways: dict[str, tuple[Entries, Entries, dict[str, set[str]]]]
    ways = {"image_to_text": (image_ids, text_ids, texts_of), "text_to_image": (text_ids, image_ids, image_of)}
    prefix = f"{name}_" if name else ""
    return {
        way: _evaluator(queries, corpus, relevant, f"{prefix}{way}", cuts, batch_size)
        for way, (queries, corpus, relevant) in ways.items()
    }


def classification_evaluator(
    images: Sequence[Image.Image],
    labels: Sequence[int],
    prompts: Sequence[str],
    name: str = "zero_shot",
    cuts: Sequence[int] = (1, 5),
    batch_size: int = 32,
) -> InformationRetrievalEvaluator:
    """Makes an evaluator of zero-shot classification: of every class, one prompt is found by the image.

    `NAME_cosine_accuracy@1` is the top-1 accuracy of prompts that are not averaged.
    """
    queries: Entries = {f"image{n}": image for n, image in enumerate(images)}
    corpus: Entries = {f"class{n}": prompt for n, prompt in enumerate(prompts)}
    relevant = {f"image{n}": {f"class{label}"} for n, label in enumerate(labels)}
    return _evaluator(queries, corpus, relevant, name, cuts, batch_size)


def _evaluator(
    queries: Entries,
    corpus: Entries,
    relevant: dict[str, set[str]],
    name: str,
    cuts: Sequence[int],
    batch_size: int,
) -> InformationRetrievalEvaluator:
    cuts = list(cuts)
    return InformationRetrievalEvaluator(
        queries,
        corpus,
        relevant,
        accuracy_at_k=cuts,
        precision_recall_at_k=cuts,
        name=name,
        batch_size=batch_size,
        write_csv=False,
    )


__all__ = ["classification_evaluator", "retrieval_evaluators"]
