"""Opens a source: safetensors, single or sharded, PyTorch files, and what training frameworks write in parts.

Files are memory-mapped. Nothing in SOURCE is run or written to.
"""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .checkpoint_files import SAFETENSORS_DTYPES, WEIGHT_SUFFIXES, is_plain, load_pytorch_file, read_json
from .damages import naming
from .foreign_settings import only_data
from .links import check_links
from .quantised import dequantised
from .source import Source
from .tensors import LazyTensor, stored
from .training_folders import only_checkpoint, open_training_folder


# In the order in which transformers looks for them.
STANDARD_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


# What a training run leaves beside the weights.
STATE_OF_TRAINING = (
    "training_args.bin",
    "optimizer*",
    "scheduler*",
    "scaler*",
    "rng_state*",
    "random_states*",
    "sampler*",
    "dl_state_dict*",
)


def open_source(path: str | Path) -> Source:
    """Opens a checkpoint: reads headers, no weights (PyTorch files are memory-mapped to learn their names).

    Args:
        path: Folder of a checkpoint, or a single file with weights and a config.json beside it.

    Raises:
        OSError: If there is nothing, a file is missing or cannot be read.
        ValueError: If a file holds other things than tensors, or an index points outside the folder.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no `{path}`. Give the folder of a downloaded checkpoint.")
    if not (path.is_file() or path.is_dir()):
        raise ValueError(f"`{path}` is neither a folder nor a file. Give the folder of a downloaded checkpoint.")
    if path.is_dir():
        check_links(path)
    else:
        check_links(path.parent, depth=0)
    found = _open(path)
    if not found.folder.resolve().is_relative_to(path.resolve()):
        check_links(found.folder, depth=0)
    return dequantised(found)


def _open(path: Path) -> Source:
    if path.is_file():
        return _open_parts(path) or open_files(path.parent, _with_other_shards(path))
    standard = _standard_file(path)
    found = None if standard else _open_parts(path)
    if found is None:
        checkpoint = None if standard or loose_files(path) else only_checkpoint(path)
        if checkpoint is not None:
            return _open(checkpoint)
        found = open_files(path, weight_files(path))
    others = (place.name for place in sorted(path.iterdir()) if _is_state_of_training(place.name))
    return replace(found, left_out={**found.left_out, **dict.fromkeys(others, "state of the training")})


def _open_parts(path: Path) -> Source | None:
    """The source that a training framework wrote in parts, if there is one."""
    found = open_training_folder(path)
    if found is None:
        return None
    folder, weights = found
    for name, tensor in weights.tensors.items():
        if tensor.dtype not in SAFETENSORS_DTYPES.values():
            raise ValueError(f"`{tensor.file}` holds {name!r}, and weights of type {tensor.dtype} are not converted.")
    config, notes = _read_config(folder)
    return Source(
        folder, config, weights.files, weights.tensors, left_out=weights.left_out, notes=notes, dtype=weights.dtype
    )


def _read_config(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The data in config.json, and a remark for the user on what was refused."""
    refused: list[str] = []
    config = only_data("config.json", read_json(folder / "config.json"), refused)
    # Weights that are quantised have their own message.
    refused = [key for key in refused if key.rpartition(".")[2] != "quantization_config"]
    said = f"Not taken over from config.json, as it names code or nothing known here: {', '.join(refused)}."
    return config, [said] if refused else []


def open_files(folder: Path, files: list[Path]) -> Source:
    """Opens these files with weights of a checkpoint, whose other files lie in `folder`.

    Raises:
        OSError: A file cannot be read.
        ValueError: If a file holds other things than tensors.
    """
    tensors: dict[str, LazyTensor] = {}
    doubled: list[str] = []
    left_out: dict[str, str] = {}
    for file in files:
        found, others = _list_tensors(file)
        doubled += [name for name in found if name in tensors]
        tensors |= found
        left_out |= {f"{other} in {file.name}": "no weights of the model" for other in others}
    config, notes = _read_config(folder)
    return Source(folder, config, files, tensors, doubled, left_out, notes)


def weight_files(folder: Path) -> list[Path]:
    """Lists the files with weights in a folder: those that transformers would load, else all there are.

    Raises:
        OSError: There are none, or one that an index names is missing.
        ValueError: An index points outside the folder.
    """
    standard = _standard_file(folder)
    if standard is None:
        files = loose_files(folder)
        if not files:
            raise FileNotFoundError(
                f"`{folder}` holds no weights: expected {', '.join(STANDARD_FILES)}, or other .bin/.pth."
            )
        return files
    return [standard] if standard.suffix != ".json" else _shards(standard)


def _with_other_shards(file: Path) -> list[Path]:
    """All shards where the file is an index or a shard that an index names; else the file alone."""
    indices = (file.parent / name for name in STANDARD_FILES if name.endswith(".json"))
    for index in indices:
        weight_map = read_json(index).get("weight_map")
        # An index that does not name the file need not be sound.
        if file == index or (isinstance(weight_map, dict) and file.name in weight_map.values()):
            return _shards(index)
    return [file]


def _shards(index: Path) -> list[Path]:
    folder = index.parent
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"`{index}` must hold a `weight_map`, got none.")
    names = sorted(set(map(str, weight_map.values())))
    outside = [name for name in names if not (is_plain(name) and name.endswith(WEIGHT_SUFFIXES))]
    if outside:
        # The name is judged, not where a link leads: the Hub's cache consists of links to a separate folder.
        raise ValueError(f"`{index}` points outside its folder: {', '.join(outside)}. Do not use this checkpoint.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"`{index}` names files that `{folder}` does not have: {', '.join(missing)}.")
    return [folder / name for name in names]


def _standard_file(folder: Path) -> Path | None:
    return next((folder / name for name in STANDARD_FILES if (folder / name).is_file()), None)


def loose_files(folder: Path) -> list[Path]:
    """All files in a folder that can be weights, sorted."""
    files = (file for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES and file.is_file())
    return sorted(file for file in files if not _is_state_of_training(file.name))


def _is_state_of_training(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in STATE_OF_TRAINING)


def _list_tensors(file: Path) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    if file.suffix != ".safetensors":
        content = load_pytorch_file(file)
        return {
            name: stored(_open_pytorch, file, name, value.shape, value.dtype)
            for name, value in content.tensors.items()
        }, content.others
    with naming(file, "complete safetensors file"), safe_open(file, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
        shapes = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
        starts = _data_starts(file)
    unknown = sorted({dtype for _, dtype in shapes.values()} - set(SAFETENSORS_DTYPES))
    if unknown:
        raise ValueError(f"`{file}` holds tensors of type {', '.join(unknown)}: quantised weights are not converted.")
    return {
        name: stored(_open_safetensors, file, name, shape, SAFETENSORS_DTYPES[dtype], starts[name])
        for name, (shape, dtype) in shapes.items()
    }, ()


def _open_safetensors(file: Path) -> Callable[[str], torch.Tensor]:
    return safe_open(file, framework="pt").get_tensor


def _open_pytorch(file: Path) -> Callable[[str], torch.Tensor]:
    return load_pytorch_file(file).tensors.__getitem__


def _data_starts(file: Path) -> dict[str, int]:
    """Offset of every tensor's data, from the header of a valid safetensors file."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}
