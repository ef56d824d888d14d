"""One file of a checkpoint: what it holds, read without running any of it.

PyTorch files are opened with `weights_only=True`: whatever else is pickled in them is refused by name. Where the reader of a format
knows of further classes in its files, these are stood in for by something inert, so that none of their code is needed or run.
"""

import json
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

import torch

from ..tensors import LazyTensor


WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
# Keys under which training code stores the weights, beside what else it stores.
WRAPPERS = ("module", "model", "state_dict")
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
class Weights:
    """Tensors of a checkpoint.

    Args:
        files: Where they lie.
        tensors: Name to tensor, of all files.
        dtype: Of what was trained, where other parts of the model are kept in another type.
        left_out: What files hold besides weights, with the reason why it is not converted.
    """

    files: list[Path]
    tensors: dict[str, LazyTensor]
    dtype: torch.dtype | None = None
    left_out: dict[str, str] = field(default_factory=dict)


class Inert:
    """Stands in for an object of a class that is known but not made; does nothing, and keeps the state that was pickled of it."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


@dataclass(frozen=True)
class PyTorchContent:
    """What a PyTorch file holds: its tensors by name, and names of what else lies beside them."""

    tensors: dict[str, torch.Tensor]
    others: tuple[str, ...]


def is_plain(name: str) -> bool:
    """Whether a name is that of something in the same folder, on every system."""
    parts = {PurePosixPath(name).name, PureWindowsPath(name).name}
    return parts == {name} and name not in ("", ".", "..")


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


def load_pytorch_file(file: Path) -> PyTorchContent:
    """Tensors by name, from a PyTorch file; memory-mapped unless it is of the oldest format.

    Training code wraps the weights in a dictionary (`{"module": {...}, "optimizer": ...}`); the wrapper is taken off.

    Args:
        file: A .bin, .pth or .pt.

    Returns:
        The state dictionary, and the keys beside it.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it holds anything but tensors and plain containers; such content is not run.
    """
    content = unpickle(file)
    others: tuple[str, ...] = ()
    if isinstance(content, dict):
        wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if wrapper is not None:
            others = tuple(str(key) for key in content if key != wrapper)
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"`{file}` must hold tensors by name, got a {type(content).__name__} with other things.")
    return PyTorchContent(content, others)


def unpickle(file: Path, known: Iterable[str] = ()) -> Any:
    """Content of a PyTorch file: tensors and plain containers only.

    Args:
        file: Any file that `torch.save` wrote.
        known: Classes, as `module.name`, for whose objects an `Inert` is given.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it holds anything else; such content is not run.
    """
    with torch.serialization.safe_globals([(Inert, name) for name in known]):
        return _load(file, file, mmap=zipfile.is_zipfile(file))


def unpickle_stream(stream: IO[bytes], file: Path) -> Any:
    """The same, of a part of a file.

    Args:
        stream: The part.
        file: For messages.

    Raises:
        OSError: If the part cannot be read.
        ValueError: If it holds anything but tensors and plain containers; such content is not run.
    """
    return _load(stream, file, mmap=False)


def _load(readable: Path | IO[bytes], file: Path, mmap: bool) -> Any:
    try:
        return torch.load(readable, map_location="cpu", weights_only=True, mmap=mmap)
    except torch.serialization.pickle.UnpicklingError as error:
        raise ValueError(
            f"`{file}` was refused: it holds pickled objects besides tensors, which could run code when loaded ({_reason(error)}). Get "
            "the weights as safetensors, or from someone you trust as a file of tensors only."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise OSError(
            f"`{file}` is no complete PyTorch file ({str(error).splitlines()[0]}). Download it again."
        ) from error


def _reason(error: Exception) -> str:
    """What was found, out of a message that goes on to advise to load it all the same."""
    found = re.search(r"GLOBAL (\S+)|Unsupported operand \d+", str(error))
    return (found[1] or found[0]) if found else "objects that no file of tensors needs"
