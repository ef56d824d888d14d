"""The tensors of a source, looked up by name and read one at a time."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .checkpoint_files import read_json
from .foreign_settings import only_data
from .tensors import LazyTensor


@dataclass(frozen=True)
class Source:
    """A checkpoint: its configuration and its tensors.

    Args:
        folder: Folder of the checkpoint's other files.
        config: config.json, or an empty dictionary.
        files: Files with weights.
        tensors: Name to tensor, of all files.
        doubled: Names that lie in more than one file.
        left_out: Name to reason, of what the files hold and conversion leaves out.
        notes: Remarks for the user.
        dtype: Type of the trained weights, where other parts of the model have another.
        recorded_files: JSON files by name, read instead of those in the folder; for a source as it once was.
    """

    folder: Path
    config: dict[str, Any]
    files: list[Path]
    tensors: dict[str, LazyTensor]
    doubled: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    dtype: torch.dtype | None = None
    recorded_files: dict[str, dict[str, Any]] | None = None

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def read_json(self, name: str) -> dict[str, Any]:
        """The data in a JSON file of the folder; empty where there is none."""
        if self.recorded_files is not None:
            return dict(self.recorded_files.get(name, {}))
        return only_data(name, read_json(self.folder / name))
