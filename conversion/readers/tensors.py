"""Tensors that are read when they are needed.

A conversion is a chain of steps (merge adapters, rename, split, resize, cast), each from one dictionary of lazy
tensors to another. Nothing is read until the result is written, and then one tensor at a time.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


class TensorReader:
    """Reads stored tensors; files stay open until `close`.

    Args:
        open_file: Opens a file on an exit stack and returns its tensors by name.
    """

    def __init__(self, open_file: Callable[[Path, ExitStack], Any]) -> None:
        self.open_file = open_file
        self.stack = ExitStack()
        self.contents: dict[Path, Any] = {}

    def __getitem__(self, place: tuple[Path, str]) -> torch.Tensor:
        file, name = place
        if file not in self.contents:
            self.contents[file] = self.open_file(file, self.stack)
        return self.contents[file][name]

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the memory maps and frees the pages that were read; the next look-up opens its file again."""
        self.contents.clear()
        self.stack.close()


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is needed.

    Args:
        shape: Its shape.
        dtype: Its type.
        file: File with its data, or with the first part of it.
        load: Reads it.
        start: Offset in bytes, if the file holds the tensor contiguously; else None.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    load: Callable[[TensorReader], torch.Tensor]
    start: int | None = None

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def on_meta(self) -> torch.Tensor:
        """A tensor without data of this shape and type."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


Tensors = dict[str, LazyTensor]


def stored(file: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype, start: int | None = None) -> LazyTensor:
    """A tensor of a file, under its name there; `start` as in `LazyTensor`."""
    return LazyTensor(tuple(shape), dtype, file, lambda reader: reader[file, name], start)


def computed(function: Callable[..., torch.Tensor], *inputs: LazyTensor) -> LazyTensor:
    """Applies a function when the tensor is read. Shape and type come from one call on the meta device.

    Args:
        function: Takes as many tensors as there are inputs.
        inputs: At least one; all are in memory while `function` runs.
    """
    result = function(*(part.on_meta() for part in inputs))
    return LazyTensor(
        tuple(result.shape),
        result.dtype,
        inputs[0].file,
        lambda reader: function(*(part.load(reader) for part in inputs)),
    )


def in_order_of_files(tensors: dict[str, LazyTensor], files: list[Path]) -> dict[str, LazyTensor]:
    """Sorts tensors by file, so that each file is opened once."""
    places = {file: place for place, file in enumerate(files)}
    return dict(sorted(tensors.items(), key=lambda item: places[item[1].file]))
