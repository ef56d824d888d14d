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
        folder: Where everything else of the checkpoint lies.
        config: config.json, or an empty dictionary.
        files: Files with weights.
        tensors: Name to tensor, of all files.
        doubled: Names that lie in more than one file.
        left_out: What files hold besides weights, with the reason why it is not converted.
        notes: What the user is told.
        dtype: Of what was trained, where other parts of the model are kept in another type.
        recorded_files: JSON files by name, read in place of those in the folder where the source is one of the past.
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
