"""Weights of the result: safetensors files whose tensors are written one by one, as they are read.

The format is a length, a JSON header with name, type, shape and place of every tensor, then the data; names, shapes and types are
known before any data is read, so nothing is held but the tensor at hand.
"""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from tqdm.auto import tqdm

from .source import SAFETENSORS_DTYPES, TensorReader


INDEX_FILE = "model.safetensors.index.json"
FILE_PATTERN = "model{suffix}.safetensors"
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def write_shards(
    folder: Path,
    expected: dict[str, torch.Tensor],
    reader: TensorReader,
    max_shard_size: int | str,
    show_progress: bool = True,
) -> dict[str, str]:
    """Writes all weights.

    Args:
        folder: Where to.
        expected: Name to meta tensor: shape and type in the result.
        reader: Gives the data of a tensor, in any type.
        max_shard_size: Largest size of a file, e.g. "5GB".
        show_progress: Whether to draw a bar.

    Returns:
        SHA-256 of every file written.

    Raises:
        ValueError: If a number does not survive the conversion to the wanted type.
    """
    split = split_torch_state_dict_into_shards(expected, filename_pattern=FILE_PATTERN, max_shard_size=max_shard_size)
    hashes = {}
    with tqdm(total=len(expected), unit="tensor", desc="Writing weights", disable=not show_progress) as progress:
        for name, members in split.filename_to_tensors.items():
            part = {member: expected[member] for member in members}
            hashes[name] = _write_shard(folder / name, part, reader, progress)
            reader.close()  # else the pages of the whole source stay in memory
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX_FILE).write_text(text, encoding="utf-8")
    return hashes


def _write_shard(path: Path, expected: dict[str, torch.Tensor], reader: TensorReader, progress: Any) -> str:
    digest = hashlib.sha256()
    # Wide types first, so that every tensor starts at a multiple of its own width.
    names = sorted(expected, key=lambda name: -expected[name].dtype.itemsize)
    with path.open("wb") as file:
        for chunk in _header(expected, names):
            digest.update(chunk)
            file.write(chunk)
        for name in names:
            data = _bytes_of(_cast(name, reader[name], expected[name].dtype))
            digest.update(data)
            file.write(data)
            progress.update()
    return digest.hexdigest()


def _header(expected: dict[str, torch.Tensor], names: list[str]) -> tuple[bytes, bytes]:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        tensor = expected[name]
        end = start + tensor.numel() * tensor.dtype.itemsize
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)), header


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    converted = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype:
        lost = converted.isinf() & ~tensor.isinf()
        if bool(lost.any()):
            largest = tensor[lost].abs().max().item()
            raise ValueError(
                f"`{name}` holds {largest:g}, which float16 cannot hold. Use `--dtype bfloat16` or `float32`."
            )
    return converted


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
