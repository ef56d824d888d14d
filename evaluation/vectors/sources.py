"""What is embedded: images and texts of folders, files, shards and data sets, in parts that are read one by one.

A folder gives its images and texts (`.txt`), and those of one name, `cat.jpg` and `cat.txt`, as one item. Of rows, see
`rows.pair_rows` for the columns. Nothing is decoded here.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Protocol

from ...rows.bad_rows import UnusableRowError
from ...rows.image_files import is_path
from ...rows.json_rows import Row
from ...rows.pair_rows import IMAGE_COLUMNS, MAX_CAPTION, TEXT_COLUMNS, caption_in, image_source, metadata_of
from ...rows.row_tables import Rows, open_rows
from ...rows.shards import ENDINGS, FAULT_COLUMN, find_shards, has_lines, place_of_row, read_shards
from ...rows.texts import check_text
from ..data.items import IMAGE_ENDINGS


TEXT_ENDING = ".txt"
SAVED_DATA_SETS = ("dataset_dict.json", "state.json")  # of `datasets`
MAX_PATH = 500  # characters of an address that are shown


@dataclass(frozen=True)
class EmbeddedItem:
    """An image, a text, or a pair of them.

    Args:
        id: Where it comes from; no other item of the data has it.
        path: File or address of the image, or of the text; the place of what lies in a shard.
        image: As `read_image` takes it; None if there is none.
        text: None if there is none.
        fault: Why it cannot be used.
    """

    id: str
    path: str
    image: Any = None
    text: str | None = None
    fault: str = ""


@dataclass(frozen=True)
class Columns:
    """Where rows hold images and texts, and below which folder the images lie that they name by a path."""

    image: tuple[str, ...] = IMAGE_COLUMNS
    text: tuple[str, ...] = TEXT_COLUMNS
    folder: str | None = None


class Part(Protocol):
    """Some of the data."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def is_shared(self) -> bool:
        """Whether several processes read it, each for some of its blocks, because reading is fast."""

    def read(self) -> Iterator[EmbeddedItem]:
        """Yields the items, which come in the same order whenever they are read."""

    def fingerprint(self) -> str:
        """Returns what differs if the data have changed, as far as that shows without reading them."""


@dataclass(frozen=True)
class FilePart:
    """Files of images and texts.

    Args:
        name: Of the first one.
        files: Those of one item after the other.
    """

    name: str
    files: tuple[str, ...]
    is_shared: bool = False

    def read(self) -> Iterator[EmbeddedItem]:
        """Yields an item for the files of a name."""
        for _, files in groupby(self.files, key=_stem):
            yield from _items_of_files(list(files))

    def fingerprint(self) -> str:
        """Returns a digest of the names."""
        return hashlib.sha256("\0".join(self.files).encode("utf-8", "surrogateescape")).hexdigest()


@dataclass(frozen=True)
class TablePart:
    """Rows `start` to `stop` of a data set."""

    name: str
    rows: Rows
    start: int
    stop: int
    columns: Columns
    is_shared: bool = False

    def read(self) -> Iterator[EmbeddedItem]:
        """Yields an item for every row."""
        for index in range(self.start, self.stop):
            place = {"__shard__": str(self.rows.path), "__key__": str(self.rows.line(index))}
            try:
                row = {**self.rows.read(index), **place}
            except UnusableRowError as error:
                row = {FAULT_COLUMN: str(error), **place}
            yield item_of_row(row, self.columns, self.rows.folder)

    def fingerprint(self) -> str:
        """Returns the number of rows."""
        return f"{self.name} of {len(self.rows)}"


@dataclass(frozen=True)
class ShardPart:
    """The rows of a shard."""

    name: str
    columns: Columns

    @cached_property
    def is_shared(self) -> bool:
        """Whether the shard has lines."""
        return has_lines(self.name)

    def read(self) -> Iterator[EmbeddedItem]:
        """Yields an item for every row; what is damaged on disk is one that cannot be used.

        Raises:
            OSError: If a shard at an address cannot be read to its end, which may be so for now only.
        """
        for row in read_shards([self.name]):
            if "://" in self.name and FAULT_COLUMN in row and not row["__key__"]:
                raise OSError(f"`{self.name}`: {row[FAULT_COLUMN]} Try again: what is embedded is kept.")
            yield item_of_row(row, self.columns)

    def fingerprint(self) -> str:
        """Returns its name and, on disk, its size."""
        return f"{self.name} {'' if '://' in self.name else os.path.getsize(self.name)}"


# ------------------------------------------------------------------------------------------------------------- finding
def find_parts(data: Sequence[str], columns: Columns, rows_per_part: int) -> list[Part]:
    """Finds the parts of data.

    Args:
        data: Folders, files, shards (see `find_shards`) and names of data sets (see `open_rows`).
        columns: Of rows.
        rows_per_part: Of folders and data sets; every shard is a part.

    Raises:
        OSError: If there is no such data.
        ValueError: If it is of no kind that is read, or comes twice.
    """
    parts: list[Part] = []
    files: list[str] = []
    for source in data:
        if Path(source).is_dir() and not _is_saved(Path(source)):
            files += _files_below(Path(source))
        elif _ending(source).endswith((*IMAGE_ENDINGS, TEXT_ENDING)):
            files.append(_checked_file(source))
        elif _ending(source).endswith(ENDINGS) or "://" in source or any(sign in source for sign in "*?"):
            parts += [ShardPart(shard, columns) for shard in find_shards(source)]
        else:
            parts += _parts_of_table(source, columns, rows_per_part)
    stems = [list(names) for _, names in groupby(files, key=_stem)]
    for start in range(0, len(stems), rows_per_part):
        group = tuple(chain.from_iterable(stems[start : start + rows_per_part]))
        parts.append(FilePart(group[0], group))
    names = [*(part.name for part in parts if not isinstance(part, FilePart)), *files]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"`{twice[0]}` is given twice.")
    return parts


def fingerprint_of(parts: Sequence[Part], settings: Mapping[str, Any]) -> str:
    """Returns a digest of all parts, in their order, and of how they are read."""
    lines = [json.dumps(settings, sort_keys=True), *(part.fingerprint() for part in parts)]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _parts_of_table(source: str, columns: Columns, rows_per_part: int) -> list[Part]:
    rows = open_rows(source)
    parts: list[Part] = []
    for start in range(0, len(rows), rows_per_part):
        stop = min(start + rows_per_part, len(rows))
        parts.append(TablePart(f"{source}, rows {start} to {stop}", rows, start, stop, columns))
    return parts


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in SAVED_DATA_SETS)


def _ending(source: str) -> str:
    return (source.partition("?")[0] if "://" in source else source).lower()


def _stem(file: str) -> str:
    return os.path.splitext(file)[0]


def _checked_file(source: str) -> str:
    if not Path(source).is_file():
        raise OSError(f"There is no file `{source}`.")
    return source


def _files_below(folder: Path) -> list[str]:
    """Returns the images and texts below a folder, hidden ones left out; those of one name are neighbours."""
    found, endings = [], set()
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted((name for name in names if not name.startswith(".")), key=os.path.splitext):
            ending = _ending(name)
            endings.add(os.path.splitext(ending)[1])
            if ending.endswith((*IMAGE_ENDINGS, TEXT_ENDING)):
                found.append(os.path.join(place, name))
    if not found:
        shards = sorted(ending for ending in endings if ending and ending in ENDINGS)
        hint = f" Shards are named one by one: `{folder}/*{shards[0]}`." if shards else ""
        raise ValueError(f"`{folder}` holds no images ({', '.join(IMAGE_ENDINGS)}) and no texts (.txt).{hint}")
    return found


# --------------------------------------------------------------------------------------------------------------- items
def _items_of_files(files: list[str]) -> Iterator[EmbeddedItem]:
    """Yields every image of one name, with the text of that name if there is one; or that text."""
    texts = [file for file in files if _ending(file).endswith(TEXT_ENDING)]
    images = [file for file in files if file not in texts]
    try:
        text = _text_in(texts[0]) if texts else None
    except (OSError, ValueError) as error:
        yield EmbeddedItem(_shown(texts[0]), _shown(texts[0]), fault=str(error))
        text = None
    for image in images:
        yield _checked(EmbeddedItem(image, os.path.abspath(image), image, text))
    if text is not None and not images:
        yield _checked(EmbeddedItem(texts[0], os.path.abspath(texts[0]), None, text))


def _text_in(file: str) -> str:
    size = os.path.getsize(file)
    if size > 4 * MAX_CAPTION:  # UTF-8 has at most four bytes for a character
        raise ValueError(f"The text is too long: {size} bytes, at most {MAX_CAPTION} characters are read.")
    return caption_in({"text": Path(file).read_bytes()}, ("text",))


def item_of_row(row: Row, columns: Columns, folder: str | Path | None = None) -> EmbeddedItem:
    """Returns the item in a raw row of `shards`.

    Args:
        row: With `__shard__` and `__key__`.
        columns: Where to look; its folder goes before `folder`.
        folder: Below which images lie that are named by a path; None takes the folder of the shard.
    """
    place = place_of_row(row)
    try:
        row = metadata_of(row)
        has_image, has_text = (_has(row, names) for names in (columns.image, columns.text))
        image = image_source(row, columns.image, columns.folder or folder) if has_image or not has_text else None
        text = caption_in(row, columns.text) if has_text else None
    except ValueError as error:
        return EmbeddedItem(_shown(place), _shown(place), fault=str(error))
    path = place
    if isinstance(image, str) and not image.startswith("data:"):
        path = os.path.abspath(image) if is_path(image) else image[:MAX_PATH]
    return _checked(EmbeddedItem(place, path, image, text))


def _has(row: Row, columns: Sequence[str]) -> bool:
    return any(row.get(column) is not None for column in columns)


def _checked(item: EmbeddedItem) -> EmbeddedItem:
    """The item; or, where its names are no UTF-8, which no parquet file holds, its fault."""
    try:
        check_text(item.id, "The name")
        check_text(item.path, "The name")
    except ValueError as error:
        return EmbeddedItem(_shown(item.id), _shown(item.path), fault=str(error))
    return item


def _shown(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


__all__ = ["Columns", "EmbeddedItem", "Part", "find_parts", "fingerprint_of", "item_of_row"]
