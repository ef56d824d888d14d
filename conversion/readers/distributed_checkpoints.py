"""Weights of a torch.distributed.checkpoint folder, which FSDP writes: `.metadata` and files of the ranks (*.distcp).

`.metadata` says which tensors there are, and for every chunk of one, in which file and at which byte it lies as a
PyTorch file of its own. Chunks may cut a tensor along any dimensions.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint_files import WRAPPERS, Inert, Weights, is_plain, unpickle_section
from .distributed_metadata import METADATA_FILE, attribute, class_name, read_metadata
from .tensors import LazyTensor, TensorReader, stored


CHUNK_SUFFIX = ".distcp"


@dataclass(frozen=True)
class Chunk:
    """A block of a tensor, and its first index there, in every dimension."""

    data: LazyTensor
    offsets: tuple[int, ...]

    @property
    def ends(self) -> tuple[int, ...]:
        """The index behind its last, in every dimension."""
        return tuple(offset + size for offset, size in zip(self.offsets, self.data.shape, strict=True))


def _open_file_of_rank(file: Path) -> Callable[[str], torch.Tensor]:
    """Reads what lies at `START:LENGTH`, in bytes."""
    return lambda section: unpickle_section(file, *map(int, section.split(":")))


def find_distributed_folder(path: Path) -> Path | None:
    """The folder whose `.metadata` describes a model: what is given, or the only one within.

    Raises:
        OSError: If `.metadata` is missing or cannot be read.
        ValueError: If it is refused, or there are several such folders.
    """
    folder = path.parent if path.is_file() else path
    if path.is_file() and not (path.name == METADATA_FILE or path.suffix == CHUNK_SUFFIX):
        return None
    if (folder / METADATA_FILE).is_file():
        return folder
    if any(file.suffix == CHUNK_SUFFIX for file in folder.iterdir()):
        raise FileNotFoundError(f"`{folder}` lacks `{METADATA_FILE}`: it was not written to its end. Copy all files.")
    described = sorted(place for place in folder.iterdir() if (place / METADATA_FILE).is_file())
    found = [place for place in described if _model_entries(read_metadata(place))]
    if len(found) > 1:
        names = ", ".join(place.name for place in found)
        raise ValueError(f"`{folder}` holds several models: {names}. Give one of them.")
    return found[0] if found else None


def read_distributed_weights(folder: Path) -> Weights:
    """The weights of the model.

    Raises:
        OSError: If a file is missing or cannot be read.
        ValueError: If `.metadata` is refused, points elsewhere, or does not describe whole tensors.
    """
    metadata = read_metadata(folder)
    entries = attribute(metadata, "state_dict_metadata")
    model = _model_entries(metadata)
    if not model:
        raise ValueError(
            f"`{folder}` holds no model, only {', '.join(sorted({key.split('.')[0] for key in entries}))}. Give the "
            "folder beside it."
        )
    places = {
        (attribute(index, "fqn"), _offsets(index)): info for index, info in attribute(metadata, "storage_data").items()
    }
    files = _check_files(folder, places.values())
    tensors = {}
    left_out = {}
    for key, name in model.items():
        if class_name(entries[key]) == "TensorStorageMetadata":
            tensors[name] = _tensor(folder, key, entries[key], places)
        else:
            left_out[f"{name} in {folder.name}"] = "no tensor"
    others = sorted({key.split(".")[0] for key in entries if key not in model})
    left_out |= {f"{other} in {folder.name}": "no weights of the model" for other in others}
    return Weights(files, tensors, left_out=left_out)


# ------------------------------------------------------------------------------------------------------------ metadata
def _dtype(entry: Any) -> torch.dtype:
    state = getattr(attribute(entry, "properties"), "state", None)
    if not (isinstance(state, tuple) and state and isinstance(state[0], torch.dtype)):
        raise ValueError(f"`{METADATA_FILE}` is malformed: the properties of a tensor must begin with its type.")
    return state[0]


def _offsets(index: Any) -> tuple[int, ...]:
    return tuple(index.state.get("offset") or ())  # of a scalar or no tensor there is none


def _model_entries(metadata: Inert) -> dict[str, str]:
    """Keys of what belongs to the model, and the names it has there."""
    keys = attribute(metadata, "state_dict_metadata")
    nested = attribute(metadata, "planner_data")
    paths = {key: (key,) for key in keys} | (nested if isinstance(nested, dict) else {})
    wrapped = {key: ".".join(map(str, paths[key][_depth(paths[key]) :])) for key in keys if _depth(paths[key])}
    return wrapped or {key: key for key in keys if len(paths[key]) == 1}


def _depth(path: Sequence[Any]) -> int:
    """How many keys are wrapped around the names of the model: `("model", NAME)`, or `("app", "model", NAME)`."""
    return next((depth for depth in (1, 2) if len(path) > depth and path[depth - 1] in WRAPPERS), 0)


def _check_files(folder: Path, infos: Any) -> list[Path]:
    """The files that hold chunks; all must be there, and long enough."""
    ends: dict[str, int] = {}
    for info in infos:
        name = attribute(info, "relative_path")
        ends[name] = max(ends.get(name, 0), attribute(info, "offset") + attribute(info, "length"))
        if info.state.get("transform_descriptors"):
            raise ValueError(
                f"`{folder}` is written through {info.state['transform_descriptors']}, which is not read."
            )
    outside = sorted(name for name in ends if not (is_plain(name) and name.endswith(CHUNK_SUFFIX)))
    if outside:
        raise ValueError(
            f"`{folder / METADATA_FILE}` points outside its folder: {', '.join(outside)}. Do not use this checkpoint."
        )
    missing = sorted(name for name in ends if not (folder / name).is_file())
    if missing:
        raise FileNotFoundError(f"`{folder}` lacks files of ranks: {', '.join(missing)}. Copy all files.")
    short = sorted(name for name, end in ends.items() if (folder / name).stat().st_size < end)
    if short:
        raise OSError(f"`{folder}` holds files that are not complete: {', '.join(short)}. Copy them again.")
    return [folder / name for name in sorted(ends)]


# ------------------------------------------------------------------------------------------------------------- tensors
def _tensor(folder: Path, key: str, entry: Any, places: dict[tuple[str, tuple[int, ...]], Any]) -> LazyTensor:
    """A tensor out of its chunks."""
    dtype = _dtype(entry)
    shape = tuple(attribute(entry, "size"))
    chunks = list(_chunks(folder, key, entry, dtype, places))
    if not _is_covered(shape, chunks):
        raise ValueError(f"`{folder / METADATA_FILE}` must describe all of `{key}` {shape}, and no part of it twice.")

    def assemble(reader: TensorReader) -> torch.Tensor:
        result = torch.empty(shape, dtype=dtype)
        for chunk in chunks:
            result[tuple(map(slice, chunk.offsets, chunk.ends))] = _load(key, chunk.data, reader)
        return result

    if len(chunks) == 1:
        return LazyTensor(shape, dtype, chunks[0].data.file, lambda reader: _load(key, chunks[0].data, reader))
    return LazyTensor(shape, dtype, chunks[0].data.file, assemble)


def _chunks(
    folder: Path, key: str, entry: Any, dtype: torch.dtype, places: dict[tuple[str, tuple[int, ...]], Any]
) -> Iterator[Chunk]:
    for record in attribute(entry, "chunks"):
        offsets, sizes = tuple(attribute(record, "offsets")), tuple(attribute(record, "sizes"))
        if math.prod(sizes) == 0:
            continue  # of a rank beyond the end of a small tensor
        if (key, offsets) not in places:
            raise ValueError(f"`{folder / METADATA_FILE}` does not say where `{key}` lies from {offsets} on.")
        info = places[key, offsets]
        section = f"{attribute(info, 'offset')}:{attribute(info, 'length')}"
        file = folder / attribute(info, "relative_path")
        yield Chunk(stored(_open_file_of_rank, file, section, sizes, dtype), offsets)


def _is_covered(shape: tuple[int, ...], chunks: list[Chunk]) -> bool:
    """Whether chunks fill a tensor without overlap."""
    if not chunks or any(len(chunk.offsets) != len(shape) for chunk in chunks):
        return False
    starts = torch.tensor([chunk.offsets for chunk in chunks])
    ends = torch.tensor([chunk.ends for chunk in chunks])
    overlaps = ((starts[:, None] < ends) & (starts < ends[:, None])).all(-1)  # (chunks, chunks); each overlaps itself
    is_inside = bool((starts >= 0).all() and (ends <= torch.tensor(shape)).all())
    filled = sum(math.prod(chunk.data.shape) for chunk in chunks)
    return is_inside and filled == math.prod(shape) and int(overlaps.sum()) == len(chunks)


def _load(key: str, data: LazyTensor, reader: TensorReader) -> torch.Tensor:
    tensor = data.load(reader)
    if not isinstance(tensor, torch.Tensor) or (tuple(tensor.shape), tensor.dtype) != (data.shape, data.dtype):
        found = f"{tuple(tensor.shape)} {tensor.dtype}" if isinstance(tensor, torch.Tensor) else class_name(tensor)
        raise ValueError(f"`{data.file}` must hold {data.shape} {data.dtype} for `{key}`, got {found}.")
    return tensor
