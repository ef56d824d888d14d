"""Embeddings beside the results of a run: rows of float32 that grow batch by batch and are mapped into memory."""

import glob
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import torch


WIDTH_DIGITS = 8  # the file's first line: how many numbers a row has


class FeatureFile:
    """Rows of one kind of embeddings of a run; a row that was torn off by a kill is written again.

    Args:
        results: The file of the run's samples; the embeddings lie beside it.
        kind: What the rows are, such as "texts".
    """

    def __init__(self, results: Path, kind: str) -> None:
        self.path = results.with_suffix(f".{kind}.features")
        self._file: BinaryIO | None = None
        self._width = 0
        self._rows = 0

    def __enter__(self) -> Self:
        self.path.touch()
        self._file = self.path.open("rb+")
        head = self._file.read(WIDTH_DIGITS)
        if len(head) == WIDTH_DIGITS:
            self._width = int(head)
            self._rows = (os.fstat(self._file.fileno()).st_size - WIDTH_DIGITS) // (4 * self._width)
        self._file.truncate(self._end)
        self._file.seek(self._end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file:
            self._file.close()

    def __len__(self) -> int:
        return self._rows

    @property
    def _end(self) -> int:
        return WIDTH_DIGITS + 4 * self._width * self._rows if self._width else 0

    def add(self, rows: torch.Tensor) -> None:
        """Appends rows (B, E)."""
        if self._file is None:
            raise ValueError(f"{self.path} is not open: add rows within `with FeatureFile(...) as stored`.")
        if not self._width:
            self._width = rows.shape[1]
            self._file.write(f"{self._width:0{WIDTH_DIGITS}d}".encode())
        self._file.write(rows.float().numpy().astype("<f4").tobytes())
        self._file.flush()
        self._rows += len(rows)

    def read(self) -> torch.Tensor:
        """The rows (B, E), mapped from the file."""
        shape = (self._rows, self._width)
        return torch.from_numpy(np.memmap(self.path, "<f4", "c", offset=WIDTH_DIGITS, shape=shape))


def remove_features(results: Path) -> None:
    """Removes the embeddings beside the results of a run."""
    for path in results.parent.glob(f"{glob.escape(results.with_suffix('').name)}.*.features"):
        path.unlink()
