"""The tensors of a source, looked up by name and read one at a time.

Reads safetensors, single or sharded, and PyTorch files, which are opened with `weights_only=True`: whatever else is pickled in
them is refused and never run. Files are memory-mapped. Nothing in SOURCE is written to.
"""

import json
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open


# In the order in which transformers looks for them.
STANDARD_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
# What a training run leaves beside the weights.
NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt", "scaler.pt")
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it looks like."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Source:
    """A checkpoint folder: its configuration and its tensors.

    Args:
        folder: Where everything else of the checkpoint lies.
        config: config.json, or an empty dictionary.
        files: Files with weights.
        tensors: Name to tensor, of all files.
        doubled: Names that lie in more than one file.
    """

    folder: Path
    config: dict[str, Any]
    files: list[Path]
    tensors: dict[str, TensorInfo]
    doubled: list[str]

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(info.num_bytes for info in self.tensors.values())

    def in_order_of_files(self, names: Iterable[str]) -> list[str]:
        """Names of tensors, those of one file together, so that each file is opened once."""
        places = {file: place for place, file in enumerate(self.files)}
        return sorted(names, key=lambda name: places[self.tensors[name].file])

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder; empty where there is none."""
        return read_json(self.folder / name)

    @contextmanager
    def reader(self) -> Iterator["TensorReader"]:
        """Opens the files; tensors come from memory maps."""
        with ExitStack() as stack:
            yield TensorReader(self, stack)


class TensorReader:
    """Reads tensors of a source; a file stays open until one of another file is asked for."""

    def __init__(self, source: Source, stack: ExitStack) -> None:
        self.source = source
        self.stack = stack
        self.file: Path | None = None
        self.content: Any = None

    def __getitem__(self, name: str) -> torch.Tensor:
        info = self.source.tensors[name]
        if info.file != self.file:
            self.close()
            self.content = self._open(info.file)
            self.file = info.file
        if isinstance(self.content, dict):
            return self.content[name]
        return self.content.get_tensor(name)

    def close(self) -> None:
        """Gives back the memory map, and with it the pages that were read; the next look-up opens the file again."""
        self.stack.close()
        self.file = self.content = None

    def _open(self, file: Path) -> Any:
        if file.suffix == ".safetensors":
            return self.stack.enter_context(safe_open(file, framework="pt"))
        content = load_pytorch_file(file)
        self.stack.callback(content.clear)
        return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"`{path}` is no valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"`{path}` must hold a JSON object, got a {type(content).__name__}.")
    return content


def open_source(path: str | Path) -> Source:
    """Looks at a checkpoint: reads headers, no weights (PyTorch files are mapped to learn their names).

    Args:
        path: Folder of a checkpoint, or a single file with weights and a config.json beside it.

    Returns:
        The source.

    Raises:
        OSError: If there is nothing, a file is missing or cannot be read.
        ValueError: If a file holds other things than tensors, or an index points outside the folder.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no `{path}`. Give the folder of a downloaded checkpoint.")
    folder = path if path.is_dir() else path.parent
    files = _weight_files(folder) if path.is_dir() else [path]
    tensors: dict[str, TensorInfo] = {}
    doubled = []
    for file in files:
        for name, info in _list_tensors(file).items():
            if name in tensors:
                doubled.append(name)
            tensors[name] = info
    return Source(folder, read_json(folder / "config.json"), files, tensors, doubled)


def _weight_files(folder: Path) -> list[Path]:
    standard = next((folder / name for name in STANDARD_FILES if (folder / name).is_file()), None)
    if standard is None:
        files = sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES and p.name not in NOT_WEIGHTS)
        if not files:
            raise FileNotFoundError(
                f"`{folder}` holds no weights: expected {', '.join(STANDARD_FILES)}, or other .bin/.pth."
            )
        return files
    if standard.suffix != ".json":
        return [standard]
    weight_map = read_json(standard).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"`{standard}` must hold a `weight_map`, got none.")
    names = sorted(set(map(str, weight_map.values())))
    outside = [name for name in names if not _is_plain(name)]
    if outside:
        # The name itself is judged, not where a link leads: the Hub's cache is made of links to a folder of its own.
        raise ValueError(f"`{standard}` points outside its folder: {', '.join(outside)}. Do not use this checkpoint.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"`{standard}` names files that `{folder}` does not have: {', '.join(missing)}.")
    return [folder / name for name in names]


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file in the same folder, on every system, of a kind that is read here."""
    parts = {PurePosixPath(name).name, PureWindowsPath(name).name}
    return parts == {name} and name not in (".", "..") and name.endswith(WEIGHT_SUFFIXES)


def _list_tensors(file: Path) -> dict[str, TensorInfo]:
    if file.suffix != ".safetensors":
        content = load_pytorch_file(file)
        return {name: TensorInfo(file, tuple(value.shape), value.dtype) for name, value in content.items()}
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
            shapes = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except SafetensorError as error:
        raise OSError(f"`{file}` is no complete safetensors file ({error}). Download it again.") from error
    unknown = sorted({dtype for _, dtype in shapes.values()} - set(SAFETENSORS_DTYPES))
    if unknown:
        raise ValueError(f"`{file}` holds tensors of type {', '.join(unknown)}: quantised weights are not converted.")
    return {name: TensorInfo(file, shape, SAFETENSORS_DTYPES[dtype]) for name, (shape, dtype) in shapes.items()}


def load_pytorch_file(file: Path) -> dict[str, torch.Tensor]:
    """Tensors by name, from a PyTorch file; memory-mapped unless it is of the oldest format.

    Args:
        file: A .bin, .pth or .pt.

    Returns:
        The state dictionary.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it holds anything but tensors and plain containers; such content is not run.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except torch.serialization.pickle.UnpicklingError as error:
        reason = str(error).split("Please file an issue")[0].splitlines()[0].rstrip(" .")
        raise ValueError(
            f"`{file}` was refused: it holds pickled objects besides tensors, which could run code when loaded ({reason}). Get the "
            "weights as safetensors, or from someone you trust as a file of tensors only."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise OSError(
            f"`{file}` is no complete PyTorch file ({str(error).splitlines()[0]}). Download it again."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"`{file}` must hold tensors by name, got a {type(content).__name__} with other things.")
    return content
