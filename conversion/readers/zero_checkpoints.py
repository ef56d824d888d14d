"""Weights of a DeepSpeed ZeRO checkpoint, read without DeepSpeed.

Each process wrote a file with its part of the float32 weights. In stages 1 and 2 all parameters of an optimizer group
lie behind each other in one long vector, of which each process holds a stretch. In stage 3 each parameter is cut into
as many equal parts as there are processes, and each process holds its parts behind each other. Both are padded at the
end of what is cut. Names, shapes and order are in the files with model states, and beside them what is not trained:
buffers, and frozen parameters in the type of the training.

Supported is data parallel training of any world size, in float16, bfloat16 or float32; not tensor, pipeline or expert
parallelism.
"""

import math
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

import torch

from .checkpoint_files import Weights
from .tensors import LazyTensor, computed, stored
from .zero_files import PARTS, STRETCHES, Zero, items_of, open_zero_file, open_zero_folder


def read_zero_weights(folder: Path) -> Weights:
    """The weights as they were trained: float32, but for frozen parameters, which lie in the type of the training.

    Raises:
        OSError: If a file is missing or cannot be read.
        ValueError: If the files do not fit together.
    """
    zero = open_zero_folder(folder)
    left_out = {f"state of the training in {folder.name}": "no weights of the model"}
    if not zero.optimizers:
        # Without ZeRO, or where these files were deleted to save space.
        tensors = _whole_tensors(zero, skipped=())
        if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors.values()):
            left_out[f"float32 weights of {folder.name}"] = "no *_optim_states.pt holds them"
        return Weights(zero.model_files, tensors, None, left_out)
    trained = dict(_trained_by_stretch(zero) if STRETCHES in zero.optimizers[0] else _trained_by_part(zero))
    if STRETCHES in zero.optimizers[0]:
        others = _whole_tensors(zero, skipped=trained)
    else:
        others = {**_buffers(zero), **dict(_frozen_by_part(zero))}
    tensors = {**others, **trained}
    shared = zero.model.get("shared_params") or {}
    tensors |= {name: tensors[first] for name, first in shared.items() if first in tensors}
    dtype = next(iter(trained.values())).dtype if trained else None
    return Weights([*zero.model_files, *zero.optimizer_files], tensors, dtype, left_out)


def _whole_tensors(zero: Zero, skipped: Container[str]) -> dict[str, LazyTensor]:
    """Tensors of the model states that are no copies of trained ones."""
    weights = {name: value for name, value in items_of(zero.model, "module") if name not in skipped}
    buffers = _buffers(zero)
    return {
        name: buffers.get(name) or _stored(zero.model_files[0], f"module.{name}", value)
        for name, value in weights.items()
        if isinstance(value, torch.Tensor)
    }


def _buffers(zero: Zero) -> dict[str, LazyTensor]:
    module, file = dict(items_of(zero.model, "module")), zero.model_files[0]
    found = {name: module.get(name) for name in zero.model.get("buffer_names") or ()}
    return {
        name: computed(_widen, _stored(file, f"module.{name}", value))
        for name, value in found.items()
        if isinstance(value, torch.Tensor)
    }


def _stored(file: Path, name: str, value: torch.Tensor) -> LazyTensor:
    return stored(lambda file: open_zero_file(file).__getitem__, file, name, value.shape, value.dtype)


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    """Buffers as trained weights are: the training only cast them."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _shapes(zero: Zero) -> list[dict[str, torch.Size]]:
    """Shapes of each optimizer group, in the order of the flat weights."""
    shapes = zero.model.get("param_shapes")
    if not shapes:
        raise ValueError(
            f"`{zero.model_files[0]}` must hold `param_shapes`, got none: the weights cannot be told apart."
        )
    return [shapes] if isinstance(shapes, dict) else list(shapes)


def _partitions(zero: Zero, key: str) -> list[list[LazyTensor]]:
    """For each rank its flat weights, group by group."""
    return [
        [_stored(file, f"{key}.{group}", value) for group, value in items_of(optimizer, key)]
        for file, optimizer in zip(zero.optimizer_files, zero.optimizers, strict=True)
    ]


def _trained_by_stretch(zero: Zero) -> Iterator[tuple[str, LazyTensor]]:
    ranks = _partitions(zero, STRETCHES)
    shapes = _shapes(zero)
    # Releases that align every parameter say by how much.
    paddings = zero.optimizers[0].get("param_alignment_paddings") or [[0] * len(group) for group in shapes]
    if any(len(groups) != len(shapes) for groups in ranks) or [*map(len, paddings)] != [*map(len, shapes)]:
        raise ValueError(
            f"The files of `{zero.folder}` do not belong together: {len(shapes)} optimizer groups in the model "
            f"states, {', '.join(str(len(groups)) for groups in ranks)} in the optimizer states, or other parameters "
            "in them."
        )
    for index, (group, padding) in enumerate(zip(shapes, paddings, strict=True)):
        vector = [groups[index] for groups in ranks]
        start = 0
        for (name, shape), gap in zip(group.items(), padding, strict=True):
            yield name, _cut(zero, name, [(vector, start)], math.prod(shape), shape)
            start += math.prod(shape) + gap
        _check_length(zero, f"group {index}", start, sum(_length(part) for part in vector), 2 * len(ranks))


def _trained_by_part(zero: Zero) -> Iterator[tuple[str, LazyTensor]]:
    ranks = _partitions(zero, PARTS)
    start = 0
    for group in _shapes(zero):
        for name, shape in group.items():
            length = math.ceil(math.prod(shape) / len(ranks))
            yield name, _cut(zero, name, [(vector, start) for vector in ranks], length, shape)
            start += length
    for rank, vector in enumerate(ranks):
        _check_length(zero, f"rank {rank}", start, sum(_length(part) for part in vector), 1)


def _frozen_by_part(zero: Zero) -> Iterator[tuple[str, LazyTensor]]:
    shapes = zero.model.get("frozen_param_shapes") or {}
    if not shapes:
        return
    contents = [open_zero_file(file) for file in zero.model_files]
    for name, shape in shapes.items():
        key = f"frozen_param_fragments.{name}"
        missing = [str(rank) for rank, content in enumerate(contents) if key not in content]
        if missing:
            raise ValueError(
                f"The model states of rank {', '.join(missing)} in `{zero.folder}` lack their part of `{name}`."
            )
        parts = [_stored(file, key, content[key]) for file, content in zip(zero.model_files, contents, strict=True)]
        length = math.ceil(math.prod(shape) / len(parts))
        yield name, _cut(zero, name, [([part], 0) for part in parts], length, shape)


def _cut(
    zero: Zero, name: str, places: list[tuple[list[LazyTensor], int]], length: int, shape: Sequence[int]
) -> LazyTensor:
    """One tensor, out of equally long parts of vectors; numbers of the parts beyond its shape are padding.

    A place is a vector, as a list of flat tensors that continue each other, and where in it the part begins.
    """
    found = [piece for vector, start in places for piece in _pieces(vector, start, start + length)]
    if sum(stop - start for _, start, stop in found) != length * len(places):
        raise ValueError(f"The files of `{zero.folder}` hold fewer numbers than `{name}` {tuple(shape)} needs.")

    def assemble(*parts: torch.Tensor) -> torch.Tensor:
        flat = [part[start:stop] for part, (_, start, stop) in zip(parts, found, strict=True)]
        return torch.cat(flat)[: math.prod(shape)].view(tuple(shape))

    return computed(assemble, *(part for part, _, _ in found))


def _pieces(vector: list[LazyTensor], start: int, stop: int) -> Iterator[tuple[LazyTensor, int, int]]:
    """Yields the flat tensors between two places of a vector, with start and stop in each."""
    begin = 0
    for part in vector:
        end = begin + _length(part)
        if max(begin, start) < min(end, stop):
            yield part, max(begin, start) - begin, min(end, stop) - begin
        begin = end


def _length(flat: LazyTensor) -> int:
    return math.prod(flat.shape)


def _check_length(zero: Zero, place: str, used: int, there: int, alignment: int) -> None:
    """The flat weights must be used up, but for padding to a multiple of the alignment."""
    if math.ceil(used / alignment) != math.ceil(there / alignment):
        raise ValueError(
            f"The files of `{zero.folder}` do not belong together: the parameters of {place} have {used} numbers, "
            f"{there} are there."
        )
