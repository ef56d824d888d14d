"""The files of a DeepSpeed ZeRO checkpoint: which belong together, and what lies in them. DeepSpeed is not needed."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint_files import is_plain, unpickle


# Classes whose objects lie in the files and say nothing about the weights.
KNOWN_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
FILE_SUFFIXES = ("model_states.pt", "optim_states.pt")
OPTIMIZER_FILE = re.compile(r"(bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_00_optim_states\.pt")
# Stages 1 and 2 have one file for all processes, stage 3 one for each.
MODEL_FILE = re.compile(r"(zero_pp_rank_(?P<rank>\d+)_)?mp_rank_00_model_states\.pt")
# Where the parts of the float32 weights are.
STRETCHES = "single_partition_of_fp32_groups"
PARTS = "fp32_flat_groups"


@dataclass(frozen=True)
class Zero:
    """The files of one checkpoint and what they say.

    Args:
        folder: Their folder.
        model_files: Files with model states, by rank.
        model: Content of the first of `model_files`.
        optimizer_files: Files with optimizer states, by rank.
        optimizers: Optimizer states, by rank.
    """

    folder: Path
    model_files: list[Path]
    model: dict[str, Any]
    optimizer_files: list[Path]
    optimizers: list[dict[str, Any]]


def find_zero_folder(path: Path) -> Path | None:
    """The folder with the files of ranks: what is given, the one that `latest` names, or the only one within.

    Raises:
        OSError: If `latest` names a folder that is not there.
        ValueError: If `latest` points elsewhere, or there are several such folders.
    """
    if path.is_file():
        if path.name == "latest":
            return find_zero_folder(path.parent)
        return path.parent if path.name.endswith(FILE_SUFFIXES) else None
    if _has_files_of_ranks(path):
        return path
    if (path / "latest").is_file():
        tag = (path / "latest").read_text(encoding="utf-8", errors="replace").strip()
        if not is_plain(tag):
            raise ValueError(
                f"`{path / 'latest'}` points outside its folder: {tag[:80]!r}. Do not use this checkpoint."
            )
        if not (path / tag).is_dir():
            raise FileNotFoundError(f"`{path / 'latest'}` names `{tag}`, which `{path}` does not have.")
        return path / tag
    found = sorted(folder for folder in path.iterdir() if folder.is_dir() and _has_files_of_ranks(folder))
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise ValueError(f"`{path}` holds several checkpoints: {names}. Give one of them.")
    return found[0] if found else None


def open_zero_folder(folder: Path) -> Zero:
    """Looks at the files of all ranks.

    Raises:
        OSError: If a file is missing or cannot be read.
        ValueError: If the files do not belong together, or are of a kind that is not read.
    """
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(FILE_SUFFIXES))
    unknown = [name for name in names if not (OPTIMIZER_FILE.fullmatch(name) or MODEL_FILE.fullmatch(name))]
    if unknown:
        raise ValueError(
            f"`{folder}` holds files of tensor, pipeline or expert parallel training, which are not converted: "
            f"{', '.join(unknown)}."
        )
    model_files, optimizer_files = (_by_rank(folder, names, pattern) for pattern in (MODEL_FILE, OPTIMIZER_FILE))
    if 0 not in model_files:
        raise FileNotFoundError(f"`{folder}` lacks the model states of rank 0 (*mp_rank_00_model_states.pt).")
    model = _read(model_files[0])
    optimizers = {rank: _optimizer_of(file) for rank, file in sorted(optimizer_files.items())}
    by_part = "zero_pp_rank" in model_files[0].name
    if optimizers or by_part:
        size = _world_size(folder, optimizers) if optimizers else len(model_files)
        _check_ranks(folder, "optim_states", optimizer_files, size)
        _check_ranks(folder, "model_states", model_files, size if by_part else 1)
    return Zero(
        folder,
        [file for _, file in sorted(model_files.items())],
        model,
        [file for _, file in sorted(optimizer_files.items())],
        list(optimizers.values()),
    )


def open_zero_file(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of one file: `module.NAME` and `frozen_param_fragments.NAME`, or those of the optimizer, `KEY.GROUP`."""
    content = _read(file)
    found = {
        f"{key}.{name}": value
        for key in ("module", "frozen_param_fragments")
        for name, value in items_of(content, key)
    }
    optimizer = content.get("optimizer_state_dict")
    if isinstance(optimizer, dict):
        found |= {f"{key}.{group}": value for key in (STRETCHES, PARTS) for group, value in items_of(optimizer, key)}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def items_of(content: dict[str, Any], key: str) -> list[tuple[Any, Any]]:
    """Names or indices, and values, of a dictionary or a list in a content; none where there is neither."""
    value = content.get(key)
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, (list, tuple)) else []


def _has_files_of_ranks(folder: Path) -> bool:
    return any(file.name.endswith(FILE_SUFFIXES) for file in folder.iterdir())


def _read(file: Path) -> dict[str, Any]:
    content = unpickle(file, KNOWN_CLASSES)
    if not isinstance(content, dict):
        raise ValueError(f"`{file}` must hold the states of a training run, got a {type(content).__name__}.")
    return content


def _by_rank(folder: Path, names: list[str], pattern: re.Pattern) -> dict[int, Path]:
    matches = [match for match in map(pattern.fullmatch, names) if match]
    found: dict[int, Path] = {}
    for match in matches:
        rank = int(match["rank"] or 0)
        if rank in found:
            raise ValueError(f"`{folder}` holds two checkpoints: {found[rank].name} and {match[0]} are of one rank.")
        found[rank] = folder / match[0]
    return found


def _optimizer_of(file: Path) -> dict[str, Any]:
    optimizer = _read(file).get("optimizer_state_dict")
    if not isinstance(optimizer, dict) or not (STRETCHES in optimizer or PARTS in optimizer):
        raise ValueError(f"`{file}` is no optimizer state of ZeRO: it has neither `{STRETCHES}` nor `{PARTS}`.")
    parts = [value for key in (STRETCHES, PARTS) for _, value in items_of(optimizer, key)]
    if not all(isinstance(value, torch.Tensor) for value in parts):
        raise ValueError(f"`{file}` must hold tensors as `{STRETCHES}` or `{PARTS}`, got something else.")
    return optimizer


def _world_size(folder: Path, optimizers: dict[int, dict[str, Any]]) -> int:
    """The number of processes, on which all files must agree."""
    counts = {rank: optimizer.get("partition_count") for rank, optimizer in optimizers.items()}
    sizes = {rank: set(value) if isinstance(value, list) else {value} for rank, value in counts.items()}
    different = set().union(*sizes.values())
    if len(different) != 1 or not all(isinstance(size, int) for size in different):
        said = "; ".join(f"rank {rank}: {', '.join(map(str, size))}" for rank, size in sizes.items())
        raise ValueError(
            f"The files of `{folder}` do not belong together: they must agree on the number of processes, and say "
            f"{said}."
        )
    return different.pop()


def _check_ranks(folder: Path, kind: str, files: dict[int, Path], size: int) -> None:
    missing = [str(rank) for rank in range(size) if rank not in files]
    if missing:
        raise FileNotFoundError(
            f"`{folder}` was written by {size} processes, and lacks the *_{kind}.pt of rank {', '.join(missing)}. "
            "Copy all files."
        )
    beyond = [file.name for rank, file in files.items() if rank >= size]
    if beyond:
        raise ValueError(
            f"`{folder}` was written by {size} process{'es' if size > 1 else ''}, and holds files of another run: "
            f"{', '.join(beyond)}."
        )
