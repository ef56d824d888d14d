"""One file of a checkpoint: what it holds, read without running any of it.

PyTorch files are opened with `weights_only=True`; other pickled objects are refused by name. Where the reader of a
format knows of further classes in its files, inert objects stand in for theirs, so that none of their code is needed
or run.
"""

import io
import json
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import torch

from .damages import naming
from .tensors import LazyTensor


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
# What a file that `torch.save` wrote begins with, since 1.6 and before: an archive, a pickle.
ARCHIVE_START = b"PK\x03\x04"
PICKLE_STARTS = tuple(bytes((128, version)) for version in range(2, 6))
LENGTH_OF_START = 64
# Callables among those that torch permits, in the spelling of a pickle, that make memory of a size which the pickle
# says.
ALLOCATIONS = re.compile(rb"c(?:builtins|__builtin__|torch)\n(bytearray|\w+Tensor)\n")
LARGEST_PICKLE = 64 * 2**20
# What else people find under such a name.
KINDS = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"%PDF": "a PDF",
    b"\x1f\x8b": "a gzip archive",
    b"GGUF": "a GGUF model",
    b"version https://git-lfs": "the pointer of Git LFS to a file that was not downloaded",
    b"<": "a page of the web",
}
LARGEST_JSON = 256 * 2**20
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
SURROGATE_CHARACTER = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Weights:
    """Tensors of a checkpoint.

    Args:
        files: Files that hold them.
        tensors: Name to tensor, of all files.
        dtype: Type of the trained weights, where other parts of the model have another.
        left_out: Name to reason, of what the files hold and conversion leaves out.
    """

    files: list[Path]
    tensors: dict[str, LazyTensor]
    dtype: torch.dtype | None = None
    left_out: dict[str, str] = field(default_factory=dict)


class Inert:
    """Stands in for an object of a known class that is not created; only keeps its pickled state."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


@dataclass(frozen=True)
class PyTorchContent:
    """Content of a PyTorch file: tensors by name, and names of everything beside them."""

    tensors: dict[str, torch.Tensor]
    others: tuple[str, ...]


def is_plain(name: str) -> bool:
    """Whether a name stays in its folder, on every system."""
    parts = {PurePosixPath(name).name, PureWindowsPath(name).name}
    return parts == {name} and name not in ("", ".", "..")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it holds anything else, says one thing twice, or is nested deeper or larger than any
            checkpoint's.
    """
    if not path.is_file():
        return {}
    content = read_any_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"`{path}` must hold a JSON object, got a {type(content).__name__}.")
    return content


def read_any_json(path: Path) -> Any:
    """What a JSON file holds, an object or not; else as `read_json`."""
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(
            f"`{path}` has {path.stat().st_size:,} bytes, and no JSON of a checkpoint has over {LARGEST_JSON:,}."
        )
    with naming(path, "valid JSON", ValueError, "Copy it again from where it was published."):
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_each_once, parse_constant=_number_beyond_json)
        if SURROGATE.search(text):
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    return content


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it says `{next(name for name in names if names.count(name) > 1)}` twice")
    return found


def _number_beyond_json(name: str) -> float:
    if name == "NaN":
        raise ValueError("it holds NaN, which is no setting")
    return float(name)


def load_pytorch_file(file: Path) -> PyTorchContent:
    """Tensors by name, from a PyTorch file; memory-mapped unless it is of the oldest format.

    Training code wraps the weights in a dictionary (`{"module": {...}, "optimizer": ...}`); the wrapper is taken off.

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
    for name, tensor in content.items():
        check_tensor(file, name, tensor)
    return PyTorchContent(content, others)


def check_tensor(file: Path, name: Any, tensor: torch.Tensor) -> None:
    """Raises ValueError, with name and reason, for anything that no safetensors file can hold as a tensor."""
    wrong = ""
    if not isinstance(name, str) or SURROGATE_CHARACTER.search(name):
        wrong = "names are texts in a file of weights"
    elif tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        wrong = "it is no plain tensor"
    elif tensor.dtype not in SAFETENSORS_DTYPES.values():
        wrong = f"weights of type {str(tensor.dtype).removeprefix('torch.')} are not converted"
    elif tensor.numel() * tensor.itemsize > max(file.stat().st_size, tensor.untyped_storage().nbytes()):
        wrong = f"its shape {tuple(tensor.shape)} repeats a few numbers beyond the size of the file"
    if wrong:
        raise ValueError(f"`{file}` holds {name!r}, and {wrong}. Save the weights again as plain tensors.")


def unpickle(file: Path, known: Iterable[str] = ()) -> Any:
    """Content of a PyTorch file: tensors and plain containers only.

    Args:
        file: Any file that `torch.save` wrote.
        known: Classes, as `module.name`, for whose objects an `Inert` is given.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it holds anything else; such content is not run.
    """
    with file.open("rb") as stream:
        start = stream.read(LENGTH_OF_START)
    is_archive = start.startswith(ARCHIVE_START)
    if not is_archive and not start.startswith(PICKLE_STARTS):
        raise ValueError(
            f"`{file}` holds no PyTorch weights, but {_kind_of(start)}. Give a file that `torch.save` wrote."
        )
    with torch.serialization.safe_globals([(Inert, name) for name in known]):
        return _load(file, file, mmap=is_archive)


def unpickle_section(file: Path, start: int, length: int) -> Any:
    """The same, of a part of a file that is a PyTorch file itself, by its place in bytes."""
    with naming(file, "complete PyTorch file"), file.open("rb") as stream:
        stream.seek(start)
        section = io.BytesIO(stream.read(length))
    return _load(section, file, mmap=False)


def _load(readable: Path | BinaryIO, file: Path, mmap: bool) -> Any:
    with naming(file, "complete PyTorch file"):
        _check_growth(readable)
        try:
            return torch.load(readable, map_location="cpu", weights_only=True, mmap=mmap)
        except torch.serialization.pickle.UnpicklingError as error:
            refused = error
    raise ValueError(
        f"`{file}` was refused: it holds pickled objects besides tensors, which could run code when loaded "
        f"({_reason(refused)}). Get the weights as safetensors, or from someone you trust as a file of tensors only."
    ) from refused


def _check_growth(readable: Path | BinaryIO) -> None:
    """Refuses, before anything is read, content that would grow beyond the size of the file."""
    stream = readable.open("rb") if isinstance(readable, Path) else readable
    try:
        is_archive = stream.read(len(ARCHIVE_START)) == ARCHIVE_START
        pickled = _pickles_of_archive(stream) if is_archive else stream.read(LARGEST_PICKLE)
        if found := ALLOCATIONS.search(pickled):
            raise ValueError(f"it asks for an empty {found[1].decode()}, and holds none")
    finally:
        stream.seek(0)
        if isinstance(readable, Path):
            stream.close()


def _pickles_of_archive(stream: BinaryIO) -> bytes:
    """The pickles of an archive. PyTorch compresses nothing, so entries larger than the file are refused."""
    size = stream.seek(0, io.SEEK_END)
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise zipfile.BadZipFile("its entries are compressed, and those of PyTorch never are")
        if sum(entry.file_size for entry in entries) > size:
            raise zipfile.BadZipFile("its entries are larger than the file")
        return b"".join(archive.read(entry) for entry in entries if entry.filename.endswith(".pkl"))


def _kind_of(start: bytes) -> str:
    """Describes a file by its first bytes."""
    if not start:
        return "nothing: it is empty"
    found = next((kind for mark, kind in KINDS.items() if start.startswith(mark)), None)
    if found is None and start[8:16].startswith(b'{"'):
        return "safetensors under another ending"
    is_text = not start.strip(b"\t\r\n").translate(None, bytes(range(32, 127)))
    return found or ("a text" if is_text else "something else")


def _reason(error: Exception) -> str:
    """The finding alone, from a message that goes on to advise loading the file all the same."""
    found = re.search(r"GLOBAL (\S+)|Unsupported operand \d+", str(error))
    return (found[1] or found[0]) if found else "objects that no file of tensors needs"
