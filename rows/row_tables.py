"""Rows that are read by their number, whatever holds them: JSON, parquet, or a data set of `datasets`.

What parquet files and data sets store is read as it is stored: `datasets` decodes no image and no video.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..extras import extra
from .bad_rows import UnusableRowError
from .image_files import NO_FOLDER
from .json_rows import MAX_ROW_BYTES, JsonRows, Row
from .shards import CSV_ENDINGS, JSON_ENDINGS, PARQUET_ENDINGS, SHARD_ERRORS


if TYPE_CHECKING:
    import datasets

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+){0,2}")


class Rows(Protocol):
    """Rows of one source.

    Attributes:
        path: Its name in messages.
        folder: Below which the images lie that its rows name by a path.
    """

    path: Path
    folder: Path

    def __len__(self) -> int:
        """The number of rows."""

    def line(self, index: int) -> int:
        """The line or the number of a row, counted from 1."""

    def read(self, index: int) -> Row:
        """Reads one row.

        Raises:
            UnusableRowError: If it cannot be read.
        """


class TableRows:
    """The rows of a data set of `datasets`, which keeps them on disk.

    Args:
        table: The data set.
        name: Of it, for messages.
        folder: Below which images lie that are named by a path.
    """

    def __init__(self, table: "datasets.Dataset", name: str | Path, folder: Path) -> None:
        self.path = Path(name)
        self.folder = folder
        self._table = table.with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    def line(self, index: int) -> int:
        """The number of a row, counted from 1."""
        return index + 1

    def read(self, index: int) -> Row:
        """Reads one row.

        Raises:
            UnusableRowError: If it cannot be read, or is too large.
        """
        try:
            table: Any = self._table[index : index + 1]
            if table.nbytes > MAX_ROW_BYTES:
                raise ValueError(f"it has {table.nbytes} bytes, at most {MAX_ROW_BYTES} are read")
            (row,) = table.to_pylist()
        except SHARD_ERRORS as error:
            raise UnusableRowError(f"The row cannot be read: {error}.") from error
        return row


def open_rows(source: str | Path) -> Rows:
    """Opens a source of rows.

    Args:
        source: A JSON array, JSON lines, a parquet file, a folder that `datasets` reads or has saved, or the name of a
            data set on the Hub, `OWNER/NAME`. `:SPLIT` or `:CONFIGURATION:SPLIT` may follow a folder or name; by
            default the split is `train`.

    Raises:
        OSError: If there is no such file or data set.
        ValueError: If it is something else as a whole, or damaged.
    """
    path, name = Path(source), str(source)
    if path.suffix.lower() in CSV_ENDINGS:
        raise ValueError(
            f"{path} holds image-text pairs, from which an InternVL-C or -G learns. Dialogues of a chat model are "
            "JSON, JSON lines, parquet, or a data set."
        )
    if path.is_file() and path.suffix.lower() in PARQUET_ENDINGS:
        try:
            return TableRows(_loaded("parquet", data_files={"train": [name]}, split="train"), path, path.parent)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    found, *choice = [name] if path.exists() else name.split(":")
    *configuration, split = choice or ["train"]
    if Path(found).is_dir():
        return TableRows(_loaded_folder(found, *configuration, split=split), path, Path(found))
    is_file_name = path.suffix.lower() in (*JSON_ENDINGS, *PARQUET_ENDINGS)
    if not path.exists() and not is_file_name and _HUB_NAME.fullmatch(name):
        try:
            return TableRows(_loaded(found, *configuration, split=split), path, NO_FOLDER)
        except OSError as error:
            raise OSError(
                f"There is no file `{name}`, and no such data set can be read from the Hub: {error}"
            ) from error
    return JsonRows(path)


def open_all_rows(sources: str | Path | Sequence[str | Path]) -> list[Rows]:
    """Opens one source or several."""
    return [open_rows(source) for source in ([sources] if isinstance(sources, (str, Path)) else sources)]


def _loaded_folder(folder: str, *configuration: str, split: str) -> "datasets.Dataset":
    if Path(folder, "dataset_dict.json").is_file():
        folder = str(Path(folder, split))
    if Path(folder, "state.json").is_file():
        with extra("train"):
            from datasets import load_from_disk
        return load_from_disk(folder)
    return _loaded(folder, *configuration, split=split)


def _loaded(*arguments: Any, **settings: Any) -> "datasets.Dataset":
    with extra("train"):
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    try:
        return load_dataset(*arguments, **settings)
    except DatasetsError as error:
        if isinstance(error, (OSError, ValueError)):
            raise
        raise ValueError(f"{arguments[0]} cannot be read: {error} ({error.__cause__}).") from error
