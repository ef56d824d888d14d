"""Tensors that are read when they are needed.

A conversion is a chain of steps (merge adapters, rename, split, resize, cast), each from one dictionary of lazy
tensors to another. Nothing is read until the result is written, and then one tensor at a time.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


# Opens a file, and gives what reads a tensor of it by its name.
Opener = Callable[[Path], Callable[[str], torch.Tensor]]


class TensorReader:
    """Reads stored tensors; files stay open until `close`, or as long as the reader."""

    def __init__(self) -> None:
        self.opened: dict[Path, Callable[[str], torch.Tensor]] = {}

    def read(self, open_file: Opener, file: Path, name: str) -> torch.Tensor:
        """Reads a tensor of a file."""
        if file not in self.opened:
            self.opened[file] = open_file(file)
        return self.opened[file](name)

    def close(self) -> None:
        """Closes the memory maps and frees the pages that were read; the next look-up opens its file again."""
        self.opened.clear()


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is needed.

    Args:
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


def stored(
    open_file: Opener, file: Path, name: str, shape: Sequence[int], dtype: torch.dtype, start: int | None = None
) -> LazyTensor:
    """A tensor of a file, under its name there; `start` as in `LazyTensor`."""
    return LazyTensor(tuple(shape), dtype, file, lambda reader: reader.read(open_file, file, name), start)


def computed(function: Callable[..., torch.Tensor], *inputs: LazyTensor) -> LazyTensor:
    """Applies a function to tensors, at least one, when the result is read; all are in memory while it runs.

    Shape and type come from one call on the meta device.
    """
    result = function(*(part.on_meta() for part in inputs))
    return LazyTensor(
        tuple(result.shape),
        result.dtype,
        inputs[0].file,
        lambda reader: function(*(part.load(reader) for part in inputs)),
    )


def is_equal(reader: TensorReader, left: LazyTensor, right: LazyTensor) -> bool:
    """Whether two tensors hold the same numbers."""
    return left.shape == right.shape and torch.equal(left.load(reader), right.load(reader))


def main_dtype(tensors: Tensors) -> str:
    """Name of the type that most numbers have, among floats."""
    sizes: Counter = Counter()
    for tensor in tensors.values():
        if tensor.dtype.is_floating_point:
            sizes[tensor.dtype] += torch.Size(tensor.shape).numel()
    return str(sizes.most_common(1)[0][0]).removeprefix("torch.")


def in_order_of_files(tensors: dict[str, LazyTensor], files: list[Path]) -> dict[str, LazyTensor]:
    """Sorts tensors by file, so that each file is opened once."""
    places = {file: place for place, file in enumerate(files)}
    return dict(sorted(tensors.items(), key=lambda item: places[item[1].file]))
