"""Search over a folder of embeddings by texts and images."""

from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

from ..image_loading_internvl import ImageSource, read_image
from ..image_processing_internvl import InternVLImageProcessor
from .embeddings import ModelPlace
from .indexing import QUERIES, Embedder, Job
from .matching import matching_scores
from .vectors.files import Description, EmbeddingFolder
from .vectors.indexes import CANDIDATES, StoredVectors, search_vectors


@dataclass(frozen=True)
class Hit:
    """What was found.

    Args:
        score: Cosine with the query; after re-ranking, the probability that both match is added to it, as in BLIP-2.
        id: Of the row.
        path: File or address of the image, or of the text; its place in a shard.
        text: That of the row, if it has one.
    """

    score: float
    id: str
    path: str
    text: str | None


class Searcher:
    """Searches embeddings.

    Args:
        folder: Written by `embed_data`.
        model: The one that embedded; None loads it from where it was then.
        processor: Its processor.
        index: See `search_vectors`.
        candidates: See `search_vectors`.

    Raises:
        OSError: If there are no embeddings.
        ValueError: If they are not finished.
    """

    def __init__(
        self,
        folder: str | Path | EmbeddingFolder,
        model: PreTrainedModel | None = None,
        processor: ProcessorMixin | None = None,
        index: str | None = None,
        candidates: int = CANDIDATES,
    ) -> None:
        self.folder = folder if isinstance(folder, EmbeddingFolder) else EmbeddingFolder(folder)
        self.folder.check_is_finished()
        self.index = index
        self.candidates = candidates
        self._given = (model, processor)
        self.vectors = cache(self._open)

    def _open(self, side: str) -> StoredVectors:
        return StoredVectors(self.folder, side)

    @cached_property
    def _embedder(self) -> Embedder:
        description = self.folder.description
        model, processor = self._given
        if model is None or processor is None:
            model, processor = ModelPlace(description.model, description.subfolder).load()
        width = model.config.clip_embed_dim
        dims = None if description.size == width else description.size
        return Embedder(model, processor, Job((), "", mode=description.mode, dims=dims))

    def by_text(self, text: str, side: str = "image", top: int = 10, rerank: int = 0) -> list[Hit]:
        """Finds images, or texts, by a text.

        Args:
            text: What is looked for.
            side: "image" or "text": among what.
            top: How many are wanted.
            rerank: How many of the best images the matching head of an InternVL-G puts in order; 0 for none.

        Raises:
            ValueError: If there are none of this side, or re-ranking is not possible.
        """
        self.check(side, rerank)
        hits = self._search(self._embedder.texts([text])[0], side, max(top, rerank))
        if rerank:
            images = [read_found_image(hit) for hit in hits[:rerank]]
            hits = self._ordered(hits, images, [text] * len(images))
        return hits[:top]

    def by_image(self, image: ImageSource, side: str = "image", top: int = 10, rerank: int = 0) -> list[Hit]:
        """Finds images, or texts, by an image; `rerank` is for texts. See `by_text`."""
        self.check(side, rerank)
        if rerank and side == "image":
            raise ValueError("`rerank` compares an image with texts, and not with images.")
        query = _loaded(image, "The image")
        hits = self._search(self._embedder.images([query])[0], side, max(top, rerank))
        if rerank:
            hits = self._ordered(hits, [query], [hit.text or "" for hit in hits[:rerank]])
        return hits[:top]

    def check(self, side: str, rerank: int) -> None:
        """Raises a ValueError if there is nothing to find, or re-ranking asks for another model; loads none."""
        count = self.folder.count()
        if not count[f"{side}s"]:
            raise ValueError(f"`{self.folder.path}` has no embeddings of {side}s.")
        description = self.folder.description
        is_set = side == "image" and description.vectors > 1 and description.precision != "binary"
        if is_set and self.index not in (None, "flat"):
            raise ValueError(f"Sets of vectors are compared whole: the index must be flat, got {self.index!r}.")
        if rerank and description.mode == "InternVL-C":
            raise ValueError("`rerank` needs embeddings of an InternVL-G, in mode InternVL-G or queries.")

    def _search(self, query: np.ndarray, side: str, k: int) -> list[Hit]:
        """Finds the nearest of a query (K, E)."""
        if not np.isfinite(query).all():
            raise ValueError(
                "The query's vector is not finite: the model is damaged, or computes in too narrow a type."
            )
        vectors = self.vectors(side)
        is_set = self.folder.description.mode == QUERIES and len(query) > 1
        scores, rows = search_vectors(
            query[None] if is_set else query, vectors, k, index=self.index, candidates=self.candidates
        )
        items = vectors.items(rows[0])
        return [Hit(float(score), **item) for score, item in zip(scores[0], items, strict=True)]

    def _ordered(self, hits: list[Hit], images: list[Image.Image], texts: list[str]) -> list[Hit]:
        """Puts the first hits, one for each text, in order by how likely image and text match, too."""
        matches = matching_scores(self._embedder.model, self._embedder.processor, images, texts).tolist()
        if not np.isfinite(matches).all():
            raise ValueError("How likely an image and a text match is no number: the model is damaged.")
        scored = [replace(hit, score=hit.score + match) for hit, match in zip(hits, matches, strict=False)]
        return sorted(scored, key=lambda hit: -hit.score) + hits[len(scored) :]


def check_fits(description: Description, config: PretrainedConfig, model: str) -> None:
    """Raises a ValueError if a model of this configuration gives no vectors like those of a folder."""
    sizes = [config.clip_embed_dim, *(config.matryoshka_dims or ())]
    if description.size not in sizes:
        raise ValueError(
            f"These embeddings have {description.size} components, and `{model}` gives {', '.join(map(str, sizes))}: "
            "search by the model that embedded them."
        )
    if description.mode != "InternVL-C" and not config.has_queries:
        raise ValueError(f"These embeddings are of mode {description.mode}, and `{model}` is an InternVL-C.")


def read_found_image(hit: Hit) -> Image.Image:
    """Reads the image of a hit.

    Raises:
        ValueError: If it lies in a shard, of which its path names the place, or cannot be read.
    """
    if not hit.path.startswith(("http://", "https://")) and not Path(hit.path).is_file():
        raise ValueError(f"The image of `{hit.id}` is needed again, and `{hit.path}` is no file: it lies in a shard.")
    return _loaded(hit.path, f"The image `{hit.path}`")


def _loaded(image: ImageSource, name: str) -> Any:
    return read_image(image, name, InternVLImageProcessor.max_image_pixels)


__all__ = ["Hit", "Searcher", "check_fits", "read_found_image"]
