"""Files that rows of data name by a path: only those below the folder given for them, wherever links lead."""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any


ADDRESSES = ("http://", "https://", "data:")
NO_FOLDER = Path(os.devnull)  # of rows that no folder belongs to, such as those of the Hub
NAME_LENGTH = 200  # characters of a path that messages show


def is_path(source: Any) -> bool:
    """Whether an image's source is a path, and no address or content."""
    return isinstance(source, Path) or (isinstance(source, str) and not source.startswith(ADDRESSES))


def image_file(source: str | Path, folder: str | Path | None, what: str = "image") -> Path:
    """The file of an image or a video.

    Args:
        source: Path in a row, relative to `folder` or below it.
        folder: Below which files may lie; None allows any, and `NO_FOLDER` none.
        what: It is, for messages.

    Raises:
        ValueError: If it lies elsewhere, or is no regular file.
    """
    name = f"The {what} `{str(source)[:NAME_LENGTH]}`"
    if folder == NO_FOLDER:
        raise ValueError(f"{name} is a path, and its row belongs to no folder. Name the folder of the images.")
    path = Path(folder or "", source)
    try:
        is_inside = folder is None or path.resolve().is_relative_to(_resolved(str(folder)))
        is_file = is_inside and path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long, links in a circle, NUL
        raise ValueError(f"{name} is missing: its path cannot be read ({type(error).__name__}).") from error
    if not is_inside:
        raise ValueError(f"{name} lies outside of `{folder}`; rows may only name {what}s below that folder.")
    if not is_file:
        beside = "" if folder is None or Path(source).is_absolute() else " Is `--images` the folder of its path?"
        raise ValueError(f"{name} is missing: there is no file `{str(path)[:NAME_LENGTH]}`.{beside}")
    return path


@lru_cache(maxsize=64)
def _resolved(folder: str) -> Path:
    return Path(folder).resolve()
