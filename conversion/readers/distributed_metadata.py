"""The description of a torch.distributed.checkpoint folder: `.metadata`, a pickle, read without running any of it.

Only the few classes that a description needs are known, and even these are not made: something inert stands in for
their objects. Anything else is refused by name.
"""

import pickle
from pathlib import Path
from typing import IO, Any

from .checkpoint_files import SAFETENSORS_DTYPES, Inert
from .damages import naming


METADATA_FILE = ".metadata"
KNOWN_CLASSES = (
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
    "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed.checkpoint.metadata.BytesStorageMetadata",
    "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata.Metadata",
    "torch.distributed.checkpoint.metadata.MetadataIndex",
    "torch.distributed.checkpoint.metadata.StorageMeta",
    "torch.distributed.checkpoint.metadata.TensorProperties",
    "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    "torch.serialization._get_layout",
)
KNOWN_VALUES = {
    "torch.Size": tuple,
    **{str(dtype): dtype for dtype in SAFETENSORS_DTYPES.values()},
}


class _RefusedError(Exception):
    """A class that no checkpoint needs."""


class _MetadataUnpickler(pickle.Unpickler):
    """Makes inert objects of known classes, and no others."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream)
        self.classes: dict[str, type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The inert stand-in for a class or value."""
        full_name = f"{module}.{name}"
        if full_name in KNOWN_VALUES:
            return KNOWN_VALUES[full_name]
        if full_name not in KNOWN_CLASSES:
            raise _RefusedError(full_name)
        return self.classes.setdefault(full_name, type(name, (Inert,), {}))


def read_metadata(folder: Path) -> Inert:
    """The description of a checkpoint: a record, whose attributes are read with `attribute`.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it holds objects of other classes, or describes something else.
    """
    file = folder / METADATA_FILE
    refused: _RefusedError | None = None
    with file.open("rb") as stream, naming(file, "complete description of a checkpoint", advice="Copy it again."):
        try:
            metadata = _MetadataUnpickler(stream).load()
        except _RefusedError as error:
            refused = error
        except pickle.UnpicklingError as error:
            raise ValueError(str(error)) from error
    if refused is not None:
        raise ValueError(
            f"`{file}` was refused: it holds pickled objects of `{refused}`, which could run code when loaded. Get "
            "the weights as safetensors, or from someone you trust."
        )
    if class_name(metadata) != "Metadata":
        raise ValueError(
            f"`{file}` must describe a checkpoint of torch.distributed.checkpoint, got a {class_name(metadata)}."
        )
    return metadata


def class_name(record: Any) -> str:
    """Name of the class that a record stands for."""
    return type(record).__name__


def attribute(record: Any, name: str) -> Any:
    """An attribute of a record; ValueError where it has none."""
    state = record.state if isinstance(record, Inert) else None
    if not isinstance(state, dict) or name not in state:
        raise ValueError(f"`{METADATA_FILE}` is malformed: a {class_name(record)} in it must have `{name}`.")
    return state[name]
