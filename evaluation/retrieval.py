"""Image-text retrieval, both ways: `python -m internvl.evaluation retrieval MODEL`.

InternVL-C and, where the model has queries, InternVL-G are measured, by R@1, R@5 and R@10.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from ..hub_internvl import loaded_parameter
from ..synthetic.captions import LANGUAGES, caption
from ..synthetic.scenes import draw_scene
from .data.items import Item
from .embeddings import embed_frames, embed_images_by_mode, embed_texts, modes_of
from .feature_store import FeatureStore
from .generated import held_out_scenes
from .metrics import CUTS, hubness, rank_in_blocks, recalls_both_ways
from .reports import features_folder
from .reranking import reranked
from .runs import TaskRun


def retrieve(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Iterable[Image.Image],
    captions: Mapping[str, Sequence[Sequence[str]]],
    cuts: Sequence[int] = CUTS,
    batch_size: int = 64,
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Measures recall of captions by images and of images by captions, by InternVL-C, and by -G if there are queries.

    `captions` holds those of every image, one or more, by the name of the set, such as a language. Equal captions
    match each other's images. `cuts` has each k of R@k.

    Returns:
        Recalls by mode and set of captions, as from `recalls_both_ways`.
    """
    texts = {name: [text for of_image in of_set for text in of_image] for name, of_set in captions.items()}
    owners = {
        name: [number for number, of_image in enumerate(of_set) for _ in of_image] for name, of_set in captions.items()
    }
    text_embeds = {name: embed_texts(model, processor, rows) for name, rows in texts.items()}
    image_embeds = embed_images_by_mode(model, processor, images, modes_of(model), batch_size)
    return {
        mode: {
            name: recalls_both_ways(embeds, text_embeds[name], texts[name], cuts, owners[name]) for name in captions
        }
        for mode, embeds in image_embeds.items()
    }


def measure_retrieval(run: TaskRun) -> dict[str, dict[str, Any]]:
    """Searches captions by images, or videos, and images by captions, in the modes of the protocol.

    Embeddings are kept beside the results, mapped from files, so that a run that was stopped goes on. An image has the
    sample "image_to_text/NAME", its captions "text_to_image/NAME/0" and so on; scores are called
    "MODE/image_to_text/R@1". As published, a caption is to find its own image, even where another image has the same
    caption; an image may find a caption that is equal to one of its own.

    Options: `rerank` orders so many candidates by the matching head (InternVL-G), as the mode "InternVL-G+ITM";
    `dual_softmax` weights similarities by their softmax over all queries.

    Returns:
        "MODE/DIRECTION/hubness": skewness of how often each result is among the ten nearest.
    """
    items = run.data.items
    texts = [text for item in items for text in item.captions]
    owner = [place for place, item in enumerate(items) for _ in item.captions]
    text_embeds = _stored_texts(run, texts)
    image_embeds = {mode: _stored_images(run, mode) for mode in run.modes}
    places: dict[str, list[int]] = {}
    for place, text in enumerate(texts):
        places.setdefault(text, []).append(place)
    texts_of = [sorted({place for text in item.captions for place in places[text]}) for item in items]
    images_of = [[image] for image in owner]
    scale = (
        float(loaded_parameter(run.model, "logit_scale").detach().exp()) if run.options.get("dual_softmax") else None
    )
    sides = {"image_to_text": (0, 1, texts_of), "text_to_image": (1, 0, images_of)}
    ranks: dict[str, torch.Tensor] = {}
    of_whole: dict[str, dict[str, Any]] = {}
    for mode, images in image_embeds.items():
        pair = (images, text_embeds)
        for side, (queries, found, matches) in sides.items():
            ranks[f"{mode}/{side}"], near = rank_in_blocks(pair[queries], pair[found], matches, dual_softmax=scale)
            value = hubness(near, len(pair[found]))
            of_whole[f"{mode}/{side}/hubness"] = {"value": value, "samples": len(matches)}
    if run.options.get("rerank"):
        ranks |= reranked(run, image_embeds["InternVL-G"], text_embeds, texts, sides)
    _write_samples(run, ranks)
    return of_whole


def _write_samples(run: TaskRun, ranks: Mapping[str, torch.Tensor]) -> None:
    """Writes a sample for every image and every caption."""

    def scores(side: str, place: int) -> dict[str, float]:
        own = {name: of_side for name, of_side in ranks.items() if name.endswith(side)}
        return {f"{name}/R@{k}": float(of_side[place] < k) for name, of_side in own.items() for k in CUTS}

    number = count()
    for place, item in enumerate(run.data.items):
        rows = [(f"image_to_text/{item.name}", "image_to_text", place, item.captions[0])]
        rows += [
            (f"text_to_image/{item.name}/{turn}", "text_to_image", next(number), text)
            for turn, text in enumerate(item.captions)
        ]
        for name, side, query, text in rows:
            if name not in run.log.done:
                sample = {"id": name, "cluster": item.name, "scores": scores(side, query), "caption": text}
                run.log.add({**sample, "image": item.name})


def _stored_texts(run: TaskRun, texts: Sequence[str]) -> torch.Tensor:
    store = FeatureStore(features_folder(run.log.path), {"of": "texts"})
    return store.features(texts, lambda batch: embed_texts(run.model, run.processor, batch), 4 * run.batch_size)


def _stored_images(run: TaskRun, mode: str) -> torch.Tensor:
    def embed(batch: Sequence[Item]) -> torch.Tensor:
        frames = [item.read(run.protocol.frames) for item in batch]
        return embed_frames(run.model, run.processor, frames, [mode])[mode]

    return FeatureStore(features_folder(run.log.path), {"of": mode}).features(run.data.items, embed, run.batch_size)


def evaluate_retrieval(
    model: PreTrainedModel, processor: ProcessorMixin, pairs: int = 500, seed: int = 0, batch_size: int = 64
) -> dict[str, Any]:
    """Searches so many held-out generated scenes, with one caption each, in every language.

    Returns:
        "pairs", and "recall": by mode and language, as from `recalls_both_ways`.
    """
    scenes = held_out_scenes(pairs, seed)
    captions = {language: [[caption(scene, language)] for scene in scenes] for language in LANGUAGES}
    images = (draw_scene(scene) for scene in scenes)
    return {"pairs": pairs, "recall": retrieve(model, processor, images, captions, batch_size=batch_size)}
