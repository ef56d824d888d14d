"""Weights of the result: safetensors files whose tensors are written one by one, as they are read.

The format is a length, a JSON header with name, type, shape and place of every tensor, then the data; names, shapes
and types are known before any data is read, so nothing is held but the tensor at hand.
"""

import hashlib
import json
import os
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from tqdm.auto import tqdm

from ..readers.checkpoint_files import SAFETENSORS_DTYPES
from ..readers.tensors import LazyTensor, TensorReader, computed


BESIDE_STEM = "parts"
# Elsewhere it copies to sockets only.
HAS_FILE_COPY = sys.platform == "linux"
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def write_shards(
    folder: Path,
    tensors: dict[str, LazyTensor],
    max_shard_size: int | str,
    show_progress: bool = True,
    stem: str = "model",
) -> dict[str, str]:
    """Writes all weights, in files of at most `max_shard_size`, e.g. "5GB"; returns the SHA-256 of each.

    `stem` is the beginning of their names, "model" for what the Auto classes load.

    Raises:
        ValueError: If a number does not survive the conversion to the wanted type.
    """
    sizes = {name: tensor.on_meta() for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(
        sizes, filename_pattern=stem + "{suffix}.safetensors", max_shard_size=max_shard_size
    )
    hashes, reader = {}, TensorReader()
    with tqdm(total=len(tensors), unit="tensor", desc="Writing weights", disable=not show_progress) as progress:
        for name, members in split.filename_to_tensors.items():
            part = {member: tensors[member] for member in members}
            hashes[name] = _write_shard(folder / name, part, reader, progress)
            reader.close()  # else the pages of the whole source stay in memory
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")
    return hashes


def _write_shard(path: Path, tensors: dict[str, LazyTensor], reader: TensorReader, progress: Any) -> str:
    digest = hashlib.sha256()
    # Wide types first, so that every tensor starts at a multiple of its width.
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    # The checksum of a tensor is computed while its bytes are written: both leave Python's lock.
    with path.open("wb") as file, ThreadPoolExecutor(max_workers=1) as worker:
        for chunk in _header(tensors, names):
            digest.update(chunk)
            file.write(chunk)
        for name in names:
            data = _bytes_of(tensors[name].load(reader))
            hashed = worker.submit(digest.update, data)
            _write(file, tensors[name], data)
            hashed.result()
            progress.update()
    return digest.hexdigest()


def _write(file: BinaryIO, tensor: LazyTensor, data: memoryview) -> None:
    """Writes the data of a tensor. Where a file holds just these bytes, the kernel copies them from file to file."""
    if tensor.start is None or not HAS_FILE_COPY:
        file.write(data)
        return
    file.flush()
    start, end = tensor.start, tensor.start + tensor.num_bytes
    with tensor.file.open("rb") as source:
        while start < end:
            copied = os.sendfile(file.fileno(), source.fileno(), start, end - start)
            if not copied:
                raise OSError(f"`{tensor.file}` became shorter while it was read.")
            start += copied


def cast(name: str, tensor: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """Casts a tensor, whose name is for messages; reading it raises ValueError where a number becomes infinite."""
    return tensor if tensor.dtype == dtype else computed(lambda value: _cast(name, value, dtype), tensor)


def _header(tensors: dict[str, LazyTensor], names: list[str]) -> tuple[bytes, bytes]:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        tensor = tensors[name]
        end = start + tensor.num_bytes
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
    if dtype == torch.float16 and not tensor.is_meta:
        lost = converted.isinf() & ~tensor.isinf()
        if bool(lost.any()):
            largest = tensor[lost].abs().max().item()
            raise ValueError(
                f"`{name}` holds {largest:g}, which float16 cannot hold. Use `--dtype bfloat16` or `float32`."
            )
    return converted


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
