"""Shards as data of a task: WebDataset tar files, parquet, CSV and JSON lines, on disk or at an address (`hf://`).

Images in a column `jpg`, `png`, `image` and so on; classes as numbers or names in `cls` or `label`; captions in `txt`,
`caption` or `text`, one or several (a list, or a line each, as clip-benchmark exports them).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...rows.image_files import is_path
from ...rows.pair_rows import TEXT_COLUMNS, image_source, metadata_of
from ...rows.shards import find_shards, place_of_row, read_shards
from .items import Item, taken


LABEL_COLUMNS = ("cls", "label", "class", "labels")


def items_of_shards(
    shards: str | Sequence[str], limit: int | None = None, of_front: bool = False
) -> tuple[list[Item], list[str]]:
    """Reads shards into memory, images undecoded.

    Args:
        shards: Paths, patterns or addresses.
        limit: How many rows are kept, spread evenly over all; with `of_front` those in front, and no other is read.
        of_front: See `limit`.

    Returns:
        Items with captions or labels, as the rows have them, and the names of the classes where labels are names.

    Raises:
        OSError: If there is no such shard.
        ValueError: If a row is bad; the message names it.
    """
    found: list[tuple[Item, Any]] = []
    known: set[Any] = set()
    step = 1  # of the rows, every so many-th is held: never more than twice the limit
    for number, row in enumerate(read_shards(find_shards(shards))):
        if limit is not None and of_front and number == limit:
            break
        place = place_of_row(row)
        try:
            row = metadata_of(row)
            source = image_source(row)
            captions, label = _captions(row), _label(row)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if isinstance(source, str) and not is_path(source):
            raise ValueError(f"{place}: the image is an address; data to measure on have to be files or contents.")
        known.add(label)
        if number % step == 0:
            name = f"{Path(str(row['__shard__'])).name}/{row['__key__']}"
            found.append((Item(name, _content(source), (), captions), label))
        if limit is not None and len(found) > 2 * limit:
            found, step = found[::2], 2 * step
    found = taken(found, limit)
    classes, number_of = _classes(known)
    return [replace(item, labels=_numbered(label, number_of)) for item, label in found], classes


def _content(source: str | bytes) -> Path | bytes:
    return source if isinstance(source, bytes) else Path(source)


def _captions(row: dict[str, Any]) -> tuple[str, ...]:
    value = next((row[column] for column in TEXT_COLUMNS if row.get(column) is not None), None)
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="strict")
    if value is None:
        return ()
    texts = value.split("\n") if isinstance(value, str) else value if isinstance(value, list) else [value]
    if bad := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"A caption is no text: it is of type {type(bad[0]).__name__}.")
    return tuple(text.strip() for text in texts if text.strip())


def _label(row: dict[str, Any]) -> int | str | None:
    value = next((row[column] for column in LABEL_COLUMNS if row.get(column) is not None), None)
    if isinstance(value, bytes):
        value = value.decode("utf-8").strip()
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    is_known = isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)
    if value is not None and not is_known:
        raise ValueError(f"The class {json.dumps(value, default=str)} is neither a number nor a name.")
    return value


def _classes(labels: Iterable[int | str | None]) -> tuple[list[str], dict[str, int]]:
    """Names of classes where labels are names, and the number of each."""
    names = sorted({label for label in labels if isinstance(label, str)})
    if names and any(isinstance(label, int) for label in labels):
        raise ValueError("Some classes are numbers and some are names: give all in one way.")
    return names, {name: place for place, name in enumerate(names)}


def _numbered(label: int | str | None, number_of: Mapping[str, int]) -> tuple[int, ...]:
    """The label as the number of its class; numbers stay what they are."""
    if label is None:
        return ()
    return (number_of[label] if isinstance(label, str) else label,)


__all__ = ["items_of_shards"]
