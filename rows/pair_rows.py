"""What a raw row of a shard holds: its metadata, its caption and its image, undecoded. See `shards` for the rows."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..image_loading_internvl import read_image_size
from ..image_processing_internvl import InternVLImageProcessor
from .image_files import image_file, is_path
from .json_rows import Row
from .shards import CSV_ENDINGS, FAULT_COLUMN
from .texts import check_text


# Where images and captions are found, in this order; the first that a row has is taken.
IMAGE_COLUMNS = (
    *("jpg", "jpeg", "png", "webp", "image", "image_bytes", "bytes"),
    *("image_path", "file_name", "filepath"),
)
TEXT_COLUMNS = ("txt", "caption", "text", "TEXT", "title")
JSON_COLUMN = "json"
MAX_CAPTION = 20_000  # characters; tokenizers take seconds for a megabyte


def metadata_of(row: Row) -> Row:
    """A copy of a raw row with the entries of its JSON column as columns.

    Args:
        row: As `shards` gives it.

    Returns:
        The copy. Where both have a column, the row's own stays.

    Raises:
        ValueError: If the JSON is broken, or the row stands for a damaged shard.
    """
    if FAULT_COLUMN in row:
        raise ValueError(row[FAULT_COLUMN])
    row = dict(row)
    metadata = row.pop(JSON_COLUMN, None)
    if isinstance(metadata, (bytes, str)):
        try:
            metadata = json.loads(metadata)
        except RecursionError as error:
            raise ValueError("The metadata is broken JSON: it is nested too deeply.") from error
        except ValueError as error:
            raise ValueError(f"The metadata is broken JSON: {error}.") from error
    if metadata is not None and not isinstance(metadata, dict):
        raise ValueError(f"The metadata is no JSON object: it is of type {type(metadata).__name__}.")
    return {**(metadata or {}), **row}


def caption_in(row: Row, columns: Sequence[str] = TEXT_COLUMNS) -> str:
    """The caption, without blanks around it.

    Args:
        row: What `metadata_of` returned.
        columns: Where to look.

    Returns:
        The text.

    Raises:
        ValueError: If there is none, or it is no text.
    """
    return _caption(_first_of(row, columns))


def captions_in(row: Row, columns: Sequence[str] = TEXT_COLUMNS) -> list[str]:
    """The caption, or all of those in a list, as some data sets have several of an image; see `caption_in`."""
    value = _first_of(row, columns)
    if isinstance(value, list) and not value:
        raise ValueError("The caption is empty.")
    return [_caption(text) for text in value] if isinstance(value, list) else [_caption(value)]


def _caption(value: Any) -> str:
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"The caption is not UTF-8: {error}.") from error
    if not isinstance(value, str):
        raise ValueError(f"The caption is no text: it is of type {type(value).__name__}.")
    value = value.strip()
    if not value:
        raise ValueError("The caption is empty.")
    if len(value) > MAX_CAPTION:
        raise ValueError(f"The caption is too long: {len(value)} characters, at most {MAX_CAPTION} are read.")
    check_text(value, "The caption")
    return value


def image_source(row: Row, columns: Sequence[str] = IMAGE_COLUMNS, folder: str | Path | None = None) -> Any:
    """The image as it is stored: bytes, an address, or a file.

    Args:
        row: What `metadata_of` returned.
        columns: Where to look.
        folder: Below which files must lie; None takes the folder of a local shard.

    Returns:
        The source.

    Raises:
        ValueError: If there is none, or it names a file elsewhere.
    """
    value = _first_of(row, columns)
    if isinstance(value, dict):  # how `datasets` writes images to parquet
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if not isinstance(value, str):
        raise ValueError(f"The image is neither bytes nor a path: it is of type {type(value).__name__}.")
    if not is_path(value):
        return value
    if folder is None and "://" in row["__shard__"]:
        raise ValueError("The image is named by a path, which a shard at an address cannot have.")
    return str(image_file(value, Path(row["__shard__"]).parent if folder is None else folder))


def add_size(row: Row, image: Any) -> None:
    """Adds `width` and `height` out of the image's header where the metadata lacks them and nothing is fetched.

    Args:
        row: Changed in place.
        image: What `image_source` returned.

    Raises:
        ValueError: If there is no header to read.
    """
    if not (isinstance(image, bytes) or is_path(image)) or ("width" in row and "height" in row):
        return
    limit = InternVLImageProcessor.max_image_pixels
    row["width"], row["height"] = read_image_size(image, "The image", limit)


def _first_of(row: Row, columns: Sequence[str]) -> Any:
    value = next((row[column] for column in columns if row.get(column) is not None), None)
    if value is None:
        has = ", ".join(column for column in row if not column.startswith("__"))
        is_table = str(row.get("__shard__", "")).lower().endswith(tuple(CSV_ENDINGS))
        hint = " The first line of the file must name the columns." if is_table else ""
        raise ValueError(f"A column is missing: the row needs one of {', '.join(columns)}, and has {has}.{hint}")
    return value
