"""Features on disk, by what decides them, such as model and images: computed once, and gone on with after a kill."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..writing import lock_file, write_whole
from .data.items import Item
from .embeddings import batches


SAMPLED = 1024  # numbers of each weight that a model is known by
STORED_AS = {torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: "<u2"}  # numpy has no bfloat16


def fingerprint_of_model(model: nn.Module) -> str:
    """Returns what tells a model from others: a hash of names, shapes and a sample of its weights."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, len(flat) // SAMPLED)].float().cpu().numpy()
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(sample.tobytes())
    return found.hexdigest()


def fingerprint_of_items(items: Iterable[Item]) -> str:
    """Returns what tells images from others: a hash of their names and of size and date of their files."""
    found = hashlib.sha256()
    for item in items:
        if isinstance(item.source, bytes):
            found.update(_bytes_of(item.name) + hashlib.sha256(item.source).digest())
        else:
            status = item.source.stat()
            found.update(_bytes_of(item.name) + f"{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return found.hexdigest()


def _bytes_of(name: str) -> bytes:
    """A name, also one that is no UTF-8."""
    return f"{name}\0".encode("utf-8", "surrogatepass")


class FeatureStore:
    """Features of images or texts, a file for each combination of what decides them.

    Args:
        folder: Where the files lie; it is made.
        key: What decides the features; JSON.
    """

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.key = key
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
        self.path = folder / f"{name}.features"
        self.state_path = folder / f"{name}.json"

    def features(
        self, items: Sequence[Any], compute: Callable[[Sequence[Any]], torch.Tensor], batch_size: int
    ) -> torch.Tensor:
        """Returns the features (items, ...), mapped from the file.

        Args:
            items: Images or texts; those that the file has are not computed again.
            compute: Computes the features of a batch.
            batch_size: Items at a time.
        """
        with self.path.open("a+b") as lock, self.path.open("r+b") as file:
            lock_file(lock, self.path, waits=True)
            if not (state := self._state()):
                file.truncate(0)
            for batch in batches(items[state.get("rows", 0) :], batch_size, "extracting features"):
                rows = compute(batch).cpu()
                state = state or {"rows": 0, "shape": list(rows.shape[1:]), "dtype": str(rows.dtype), "key": self.key}
                size = rows[0].numel() * rows.element_size()
                file.seek(state["rows"] * size)
                file.write(_as_stored(rows).tobytes())
                file.flush()
                state["rows"] += len(rows)
                self._write_state(state)
        dtype = next(one for one in STORED_AS if str(one) == state["dtype"])
        mapped = np.memmap(self.path, STORED_AS[dtype], "r+", shape=(len(items), *state["shape"]))
        return torch.from_numpy(mapped).view(dtype)

    def _state(self) -> dict[str, Any]:
        try:
            state = json.loads(self.state_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there, or torn by a kill: the features are computed again
            return {}
        if not isinstance(state, dict) or state.get("key") != self.key:
            return {}
        dtype = next((one for one in STORED_AS if str(one) == state.get("dtype")), None)
        numbers = [state.get("rows"), *shape] if isinstance(shape := state.get("shape"), list) else [None]
        if dtype is None or not all(isinstance(number, int) and number >= 0 for number in numbers):
            return {}
        size = state["rows"] * math.prod(state["shape"]) * dtype.itemsize
        return state if self.path.stat().st_size >= size else {}  # cut off, as by a full disk

    def _write_state(self, state: dict[str, Any]) -> None:
        write_whole(self.state_path, json.dumps(state))


def _as_stored(rows: torch.Tensor) -> np.ndarray:
    rows = rows.contiguous()
    return (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()


def rows_at_random(count: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yields the places of all rows in a random order, so many at a time; the last few that fill no batch are left."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    for start in range(0, count - batch_size + 1, batch_size):
        yield order[start : start + batch_size]


__all__ = ["FeatureStore", "fingerprint_of_items", "fingerprint_of_model", "rows_at_random"]
