"""Finds images that are nearly the same, by their fingerprints: candidates through faiss, then a close comparison."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ...extras import extra
from .fingerprints import (
    HASH_BITS,
    HASHED,
    MIRRORED,
    SEARCHED_CUTS,
    SIDE,
    Whitening,
    coefficients,
    perceptual_hashes,
    sameness,
)


with extra("search"):
    import faiss

MIN_SAMENESS = 0.9
MAX_HASH_DISTANCE = 8  # bits
MIN_COSINE = 0.6  # of vectors that are compared closely
NEIGHBOURS = 8
MAX_COLOUR_DISTANCE = 16  # steps of the mean of a channel, of 255
FLAT_INDEX_UP_TO = 20_000  # above it, candidates are looked for in some of many cells
HASH_TABLES_FROM = 50_000  # below it, every hash is compared with every other
IMAGES_AT_ONCE = 1024
PAIRS_AT_ONCE = 64


@dataclass(frozen=True)
class Fingerprints:
    """Of images.

    Args:
        grids: (B, 3, SIDE, SIDE), uint8.
    """

    grids: np.ndarray

    def __len__(self) -> int:
        return len(self.grids)

    @cached_property
    def colours(self) -> np.ndarray:
        """The means of the channels, (B, 3)."""
        return np.concatenate([part.mean(axis=(2, 3)) for part in self.parts()])

    @cached_property
    def coefficients(self) -> np.ndarray:
        """Of the grey channel of each image as a whole, (B, C, C); see `fingerprints.coefficients`."""
        return np.concatenate([coefficients(part[:, 0])[:, 0] for part in self.parts()])

    @cached_property
    def hashes(self) -> np.ndarray:
        """Perceptual hashes, (B, 8)."""
        return perceptual_hashes(self.coefficients)

    def parts(self) -> Iterator[np.ndarray]:
        """Yields some grids at a time."""
        for start in range(0, len(self), IMAGES_AT_ONCE):
            yield self.grids[start : start + IMAGES_AT_ONCE]


def hash_pairs(hashes: np.ndarray, others: np.ndarray, max_distance: int = MAX_HASH_DISTANCE) -> np.ndarray:
    """Finds hashes that differ in a few bits.

    Args:
        hashes: (B, 8), what is looked for.
        others: (D, 8), where.
        max_distance: Bits. Among many hashes, some pairs that differ in more than 3 bits may be missed.

    Returns:
        (P, 2) numbers of both.
    """
    if not len(hashes) or not len(others):
        return np.zeros((0, 2), np.int64)
    index: Any
    if len(others) < HASH_TABLES_FROM:
        index = faiss.IndexBinaryFlat(HASH_BITS)
    else:
        index = faiss.IndexBinaryMultiHash(HASH_BITS, 4, HASH_BITS // 4)
    index.add(others)
    limits, _, found = index.range_search(hashes, max_distance + 1)
    return np.stack([np.repeat(np.arange(len(hashes)), np.diff(limits).astype(np.int64)), found], axis=1)


def mirrored_hashes(hashes: np.ndarray) -> np.ndarray:
    """Returns the hashes of mirrored images."""
    return hashes ^ np.packbits(MIRRORED[HASHED[:, 1]] < 0)


def _vector_pairs(images: Fingerprints, others: Fingerprints) -> Iterator[np.ndarray]:
    """Yields pairs of which one may be a crop of the other: every image looks, as a whole and mirrored, for windows of
    others."""
    whitening = Whitening(others.coefficients)
    index = _index_of(whitening.vectors(others.coefficients))
    for start in range(0, len(images), IMAGES_AT_ONCE):
        grey = images.grids[start : start + IMAGES_AT_ONCE, 0]
        windows = coefficients(grey, SEARCHED_CUTS)  # (B, W, C, C)
        rows = np.repeat(np.arange(start, start + len(grey)), windows.shape[1])
        flat = windows.reshape(-1, *windows.shape[2:])
        for values in (flat, flat * MIRRORED):
            scores, found = index.search(whitening.vectors(values), min(NEIGHBOURS, len(others)))
            query, place = np.nonzero((scores >= MIN_COSINE) & (found >= 0))
            yield np.unique(np.stack([rows[query], found[query, place]], axis=1), axis=0)


def _index_of(vectors: np.ndarray) -> Any:
    size = vectors.shape[1]
    index: Any
    if len(vectors) <= FLAT_INDEX_UP_TO:
        index = faiss.IndexFlatIP(size)
    else:
        cells = int(2 * len(vectors) ** 0.5)
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(size), size, cells, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors[:: max(1, len(vectors) // (64 * cells))])
        index.nprobe = 16
    index.add(vectors)
    return index


def near_duplicates(
    images: Fingerprints, others: Fingerprints | None = None, min_sameness: float = MIN_SAMENESS, crops: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Finds pairs of images that are nearly the same.

    Args:
        images: What is looked at.
        others: What they are compared with; None compares them with each other.
        min_sameness: Pairs that are less alike are left out, see `sameness`.
        crops: Whether crops are looked for, too, which takes longer than hashes alone.

    Returns:
        (P, 2) numbers of the image and the other one (among each other, the lower one first), and how alike they are,
        (P,).
    """
    among = others is None
    others = images if others is None else others
    if not len(images) or not len(others):
        return np.zeros((0, 2), np.int64), np.zeros(0, np.float32)
    found = [hash_pairs(hashes, others.hashes) for hashes in (images.hashes, mirrored_hashes(images.hashes))]
    if crops:
        found += _vector_pairs(images, others)
        if not among:
            found += [pairs[:, ::-1] for pairs in _vector_pairs(others, images)]
    pairs = np.concatenate(found)
    if among:
        pairs = np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1)
    pairs = np.unique(pairs, axis=0)
    colours = images.colours[pairs[:, 0]] - others.colours[pairs[:, 1]]
    pairs = pairs[(np.abs(colours) <= MAX_COLOUR_DISTANCE).all(axis=1)]
    scores = [
        sameness(images.grids[some[:, 0]], others.grids[some[:, 1]])
        for some in np.split(pairs, range(PAIRS_AT_ONCE, len(pairs), PAIRS_AT_ONCE))
        if len(some)
    ]
    score = np.concatenate(scores) if scores else np.zeros(0, np.float32)
    return pairs[score >= min_sameness], score[score >= min_sameness]


def groups_of(count: int, pairs: np.ndarray) -> np.ndarray:
    """Returns for each of `count` images the lowest number of those that it is tied to by pairs, over others too."""
    parents = np.arange(count)

    def root(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    for first, second in pairs.tolist():
        low, high = sorted((root(first), root(second)))
        parents[high] = low
    return np.array([root(number) for number in range(count)], np.int64)


__all__ = ["SIDE", "Fingerprints", "groups_of", "hash_pairs", "mirrored_hashes", "near_duplicates"]
