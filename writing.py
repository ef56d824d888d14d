"""Files that appear whole or not at all: what stops a process leaves none of them half written."""

import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: Any) -> None:
    """Writes a file, and makes the folders above it.

    Args:
        path: The file; until all of the content is written, it stays as it was.
        content: Bytes, or a text, which is stored as UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
