"""Files that appear whole or not at all: what stops a process leaves none of them half written."""

import os
from pathlib import Path
from typing import IO, Any


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def write_whole(path: Path, content: Any, keep: bool = False) -> None:
    """Writes a file, and makes the folders above it.

    Args:
        path: The file; until all of the content is written, it stays as it was.
        content: Bytes, or a text, which is stored as UTF-8.
        keep: Leave a file that is there already, even if another process has put it there just now.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        if not keep or not _link(beside, path):
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Check that a file can be written, before there is work to lose.

    Raises:
        OSError: If it cannot.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file.")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {above} is a file.")
    beside = _beside(above / path.name)
    try:
        beside.touch()
        beside.unlink()
    except OSError as error:
        raise type(error)(f"{path} cannot be written into {above}: {error.strerror}.") from error


def _beside(path: Path) -> Path:
    """Where a file is written until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def _link(source: Path, path: Path) -> bool:
    """Gives a file its name unless another has it; returns False on file systems without links."""
    try:
        os.link(source, path)
    except FileExistsError:
        pass
    except OSError:
        return False
    return True


def lock_file(file: IO[Any], path: Path, waits: bool = False) -> None:
    """Keeps other processes from a file until it is closed, where the system has such locks.

    Args:
        file: Open for writing.
        path: Of it, for messages.
        waits: For the process that has it.

    Raises:
        ValueError: If another process has it.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except BlockingIOError as error:
        raise ValueError(f"Another run is writing {path}: wait for it, or name another file.") from error
    except OSError:  # a file system without locks
        return
