"""The nearest of many vectors: whole, in 8 bits, by their signs, and of sets of vectors (MaxSim).

Scores are cosines. Whole vectors are read in blocks from a memory-mapped file, so that they need not fit in memory;
indexes in 8 bits and in signs are faiss', are made once and mapped too.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...extras import extra
from ...writing import lock_file, write_whole
from .files import EmbeddingFolder, rows_at
from .quantization import dequantize, dtype_of, quantize, stored_size


with extra("search"):
    import faiss

INDEXES = ("flat", "int8", "binary")
BLOCK_BYTES = 2**22  # of vectors in float32 that are compared at once: they stay near the core
TRAINING_ROWS = 100_000  # from which the ranges of the components are taken
CANDIDATES = 100  # compared again by whole vectors, for each that is wanted, after a search by signs

# Scores and rows, both (queries, k), the best first.
Found = tuple[np.ndarray, np.ndarray]


class StoredVectors:
    """The vectors of a folder as one memory-mapped array, made when it is first needed, or where it is damaged.

    Args:
        folder: Finished embeddings.
        side: "image" or "text".

    Attributes:
        stored: (rows, M, E) or, in binary, (rows, M, E / 8).
        precision: What it is stored in.
    """

    def __init__(self, folder: EmbeddingFolder, side: str) -> None:
        folder.check_is_finished()
        self.folder = folder
        self.side = side
        self.precision = folder.description.precision
        self.path = folder.path / "search" / side
        self._files = folder.files()
        if not self._open():
            with self.locked():
                if not self._open():  # another process may have made it meanwhile
                    self._make()
                    if not self._open():
                        raise ValueError(f"`{self.path}` was changed while it was made: search again.")

    def __len__(self) -> int:
        return len(self.stored)

    def items(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """Returns id, path and text of some rows."""
        found: dict[int, dict[str, Any]] = {}
        places = self._places[rows]
        for number in np.unique(places[:, 0]):
            inside = np.flatnonzero(places[:, 0] == number)
            if not 0 <= number < len(self._files):
                raise ValueError(f"`{self.path}` is damaged: delete it, and search again, which makes it anew.")
            found |= dict(zip(inside, rows_at(self._files[number], places[inside, 1]), strict=True))
        return [found[position] for position in range(len(rows))]

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the first row of each block, and its vectors (rows, M, E) in float32."""
        size = self.folder.description.size * self.stored.shape[1]
        step = max(1, BLOCK_BYTES // (4 * size))
        for start in range(0, len(self), step):
            yield start, dequantize(self.stored[start : start + step], self.precision)

    def at(self, rows: np.ndarray) -> np.ndarray:
        """Returns the vectors of some rows in float32."""
        return dequantize(self.stored[rows], self.precision)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from making the same files at once, of which each would see those half written."""
        lock = self.path.with_name(f".{self.side}.lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("a") as file:
            lock_file(file, lock, waits=True)
            yield

    def _open(self) -> bool:
        """Maps what lies in the folder of the search; returns whether it is whole, and made from the files as they
        are.
        """
        try:
            if json.loads((self.path / "made_from.json").read_text(encoding="utf-8")) != self._state():
                return False
            self.stored = np.load(self.path / "vectors.npy", mmap_mode="c")  # never written, but torch asks for that
            self._places = np.load(self.path / "places.npy", mmap_mode="r")  # (rows, 2): number of the file, row in it
        except (EOFError, OSError, RecursionError, ValueError):
            return False
        size = stored_size(self.folder.description.size, self.precision)
        shapes = (self.folder.description.vectors_of(self.side), size), (len(self.stored), 2)
        return (self.stored.shape[1:], self._places.shape) == shapes and self.stored.dtype == dtype_of(self.precision)

    def _state(self) -> list[list[Any]]:
        status = [(file.name, file.stat()) for file in self._files]
        return [[name, found.st_size, found.st_mtime_ns] for name, found in status]

    def _make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        for old in self.path.iterdir():
            old.unlink()
        description = self.folder.description
        count = self.folder.count()[f"{self.side}s"]
        shape = (count, description.vectors_of(self.side), stored_size(description.size, self.precision))
        vectors = _new_array(self.path / "vectors.npy", dtype_of(self.precision), shape)
        places = _new_array(self.path / "places.npy", np.dtype("int64"), (count, 2))
        number = {file: index for index, file in enumerate(self._files)}
        start = 0
        for file, rows, values in self.folder.read(self.side):
            end = start + len(rows)
            vectors[start:end], places[start:end, 0], places[start:end, 1] = values, number[file], rows
            start = end
        for array in (vectors, places):
            if isinstance(array, np.memmap):
                array.flush()
        write_whole(self.path / "made_from.json", json.dumps(self._state()))


def _new_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a memory-mapped array; an empty one is a plain file, because nothing of length 0 can be mapped."""
    if 0 not in shape:
        return np.lib.format.open_memmap(path, "w+", dtype, shape)
    empty = np.zeros(shape, dtype)
    np.save(path, empty)
    return empty


# -------------------------------------------------------------------------------------------------------------- search
def search_vectors(
    queries: np.ndarray, vectors: StoredVectors, k: int, index: str | None = None, candidates: int = CANDIDATES
) -> Found:
    """Finds the nearest vectors.

    Args:
        queries: (Q, E) unit vectors in float32, or sets of them (Q, K, E).
        vectors: What is searched. In sets of several vectors (M above 1) the nearest are by `max_similarity`.
        k: How many are wanted.
        index: "flat" compares whole vectors as they are stored. "int8" compares in 8 bits. "binary" takes `candidates`
            for each wanted one by signs, and compares these whole. None is "binary" for binary vectors, else "flat".
        candidates: Of "binary".

    Raises:
        ValueError: An unknown index, or one that sets of vectors cannot have.
    """
    index = index or ("binary" if vectors.precision == "binary" else "flat")
    if index not in INDEXES:
        raise ValueError(f"`index` must be one of {', '.join(INDEXES)}, got {index!r}.")
    k = min(k, len(vectors))
    if vectors.stored.shape[1] > 1 or queries.ndim == 3:
        if index != "flat" and vectors.precision != "binary":
            raise ValueError(f"Sets of vectors are compared whole: `index` must be flat, got {index!r}.")
        return _search_sets(queries, vectors, k)
    if index == "flat":
        return _search_flat(queries, vectors, k)
    if index == "int8":
        return _mapped(vectors, "int8.faiss", _int8_index).search(queries, k)
    return _search_binary(queries, vectors, k, candidates)


def max_similarity(queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Computes MaxSim, as in ColBERT (https://arxiv.org/abs/2004.12832): for each vector of a query the cosine of the
    nearest vector of the other set, on average.

    Args:
        queries: (Q, K, E), unit length.
        vectors: (B, M, E), unit length.

    Returns:
        (Q, B).
    """
    flat = queries.reshape(-1, queries.shape[-1]) @ vectors.reshape(-1, vectors.shape[-1]).T  # (Q * K, B * M)
    return flat.reshape(*queries.shape[:2], *vectors.shape[:2]).max(axis=3).mean(axis=1)


def _search_flat(queries: np.ndarray, vectors: StoredVectors, k: int) -> Found:
    best = _Best(len(queries), k)
    for start, block in vectors.blocks():
        best.add(start, *faiss.knn(queries, block[:, 0], min(k, len(block)), faiss.METRIC_INNER_PRODUCT))
    return best.found


def _search_sets(queries: np.ndarray, vectors: StoredVectors, k: int) -> Found:
    best = _Best(len(queries), k)
    for start, block in vectors.blocks():
        if queries.ndim == 2:
            scores = max_similarity(queries[:, None], block)
        elif block.shape[1] == 1:  # sets look for single vectors: the same pairs have the same scores
            scores = max_similarity(block, queries).T
        else:
            scores = max_similarity(queries, block)
        best.add(start, scores, np.broadcast_to(np.arange(len(block)), scores.shape))
    return best.found


class _Best:
    """The best `k` rows of each query so far."""

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self.found: Found = (np.zeros((queries, 0), np.float32), np.zeros((queries, 0), np.int64))

    def add(self, start: int, scores: np.ndarray, rows: np.ndarray) -> None:
        """Adds (queries, n) scores of rows that are counted from `start`."""
        scores = np.concatenate([self.found[0], scores], axis=1)
        rows = np.concatenate([self.found[1], rows + start], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, : self.k]
        self.found = (np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1))


def _search_binary(queries: np.ndarray, vectors: StoredVectors, k: int, candidates: int) -> Found:
    index = _mapped(vectors, "binary.faiss", _binary_index)
    _, rows = index.search(quantize(queries, "binary"), min(len(vectors), k * candidates))
    scores = np.stack([vectors.at(of_query)[:, 0] @ query for query, of_query in zip(queries, rows, strict=True)])
    best = _Best(len(queries), k)
    best.add(0, scores, rows)
    return best.found


def _mapped(vectors: StoredVectors, name: str, make: Callable[[StoredVectors], Any]) -> Any:
    """Returns an index that is made once and read from disk as far as a search needs it."""
    path = vectors.path / name
    if (index := _read_index(path, vectors)) is None:
        with vectors.locked():
            if (index := _read_index(path, vectors)) is None:  # another process may have made it meanwhile
                write = faiss.write_index_binary if name.startswith("binary") else faiss.write_index
                beside = path.with_name(f".{name}")
                write(make(vectors), str(beside))
                beside.replace(path)
                index = _read_index(path, vectors)
    return index


def _read_index(path: Path, vectors: StoredVectors) -> Any:
    """Maps an index; None where there is none of these vectors, or a damaged one."""
    if not path.is_file():
        return None
    read = faiss.read_index_binary if path.name.startswith("binary") else faiss.read_index
    try:
        index = read(str(path), faiss.IO_FLAG_MMAP_IFC)
    except (MemoryError, RuntimeError):
        return None
    return index if (index.ntotal, index.d) == (len(vectors), vectors.folder.description.size) else None


def _int8_index(vectors: StoredVectors) -> Any:
    """Components as steps of their own range."""
    size = vectors.folder.description.size
    index = faiss.IndexScalarQuantizer(size, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    rows = np.linspace(0, len(vectors) - 1, min(len(vectors), TRAINING_ROWS)).astype(np.int64)
    index.train(vectors.at(rows)[:, 0])
    for _, block in vectors.blocks():
        index.add(block[:, 0])
    return index


def _binary_index(vectors: StoredVectors) -> Any:
    index = faiss.IndexBinaryFlat(vectors.folder.description.size)
    for _, block in vectors.blocks():
        index.add(quantize(block[:, 0], "binary"))
    return index


__all__ = ["CANDIDATES", "INDEXES", "Found", "StoredVectors", "max_similarity", "search_vectors"]
