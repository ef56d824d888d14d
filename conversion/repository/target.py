"""OUT: at any moment the complete old folder or the complete new one, even if a run is killed or several run at once.

Each run writes into a separate folder beside OUT, locked for the life of the process, and exchanges the two at the
end.
"""

import ctypes
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


try:
    import fcntl
except ImportError:  # on Windows, where no run sees another
    fcntl = None  # type: ignore[assignment]

# Names in the folder of a run. The lock is removed last, so that a folder with content always has one.
LOCK, NEW, OLD = "conversion.lock", "new", "old"
RENAME_EXCHANGE, AT_FDCWD = 2, -100  # of Linux's renameat2


def place_of(out: Path, overwrite: bool, inputs: list[Path]) -> Path:
    """Where a result is written: OUT without links, the folder that it leads to where it is one.

    Args:
        out: The path that the user gave.
        overwrite: Whether what is there may be replaced.
        inputs: Files and folders that are read.

    Raises:
        OSError: Something is there that may not be replaced.
        ValueError: The place holds the inputs, is a part of them, or is where the command runs.
    """
    try:
        place = out.resolve()
    except RuntimeError as error:  # a circle of links
        raise ValueError(f"OUT (`{out}`) is a link that leads nowhere. Give another name.") from error
    for path in inputs:
        real = path.resolve()
        if real.is_relative_to(place):
            raise ValueError(f"OUT (`{out}`) must be a folder of its own, and not hold the input `{path}`.")
        if place.is_relative_to(real) and place.is_dir() and any(place.iterdir()):
            raise ValueError(
                f"OUT (`{out}`) must be a folder of its own, and is a part of the input `{path}`. Name a new folder "
                "in it."
            )
    if Path.cwd().is_relative_to(place):
        raise ValueError(
            f"OUT (`{out}`) must be a folder of its own, and is the one in which this command runs, or above it. Name "
            "a new folder in it."
        )
    check_free(out, place, overwrite)
    return place


def check_free(out: Path, place: Path, overwrite: bool) -> None:
    """Refuses a place where something is that may not be replaced; `out` is the path that the user gave."""
    if place.is_dir():
        if any(place.iterdir()) and not overwrite:
            raise FileExistsError(
                f"OUT (`{out}`) is not empty. Give another folder, or replace it with `--overwrite`."
            )
    elif place.exists() or place.is_symlink():
        raise FileExistsError(f"OUT (`{out}`) must be a folder, but is a file. Give another name.")


@contextmanager
def complete_or_nothing(out: Path, place: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside the place that takes its name when all went well, and else vanishes.

    Raises:
        OSError: Another run writes to this place, or something came there meanwhile.
    """
    with ExitStack() as stack:
        run = _own_folder(out, place, stack)
        (run / NEW).mkdir()
        yield run / NEW
        check_free(out, place, overwrite)
        _take_place(run, place)


def _own_folder(out: Path, place: Path, stack: ExitStack) -> Path:
    """A new folder of this run, locked until the stack closes; what killed runs left is cleared."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with _locked_parent(place.parent):
        for left in _folders_of_runs(place):
            if not _is_abandoned(left):
                raise FileExistsError(
                    f"Another conversion is writing OUT (`{out}`) right now. Wait for it, or give another folder."
                )
            _clear(left, place)
        run = place.parent / f".{place.name}.{secrets.token_hex(4)}.incomplete"
        run.mkdir()
        stack.callback(_clear, run, place)
        lock = stack.enter_context((run / LOCK).open("w"))
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
    return run


@contextmanager
def _locked_parent(parent: Path) -> Iterator[None]:
    """Runs that look around at the same time do so one after another."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _folders_of_runs(place: Path) -> list[Path]:
    """Folders of runs to this place, recognised by their names and their content."""
    pattern = re.compile(rf"\.{re.escape(place.name)}\.[0-9a-f]{{8}}\.incomplete")
    found = [path for path in place.parent.iterdir() if pattern.fullmatch(path.name)]
    return [path for path in found if path.is_dir() and not path.is_symlink() and _is_ours(path)]


def _is_ours(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    return not names or (LOCK in names and names <= {LOCK, NEW, OLD})


def _is_abandoned(folder: Path) -> bool:
    """Whether no living process holds the lock. A run that was killed before it took one left an empty folder."""
    if fcntl is None:
        return False
    try:
        with (folder / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


def _clear(run: Path, place: Path) -> None:
    """Removes the folder of a run. The old result returns to its place if nothing took that."""
    if (run / OLD).exists() and not place.exists():
        (run / OLD).rename(place)
    for name in (NEW, OLD):
        shutil.rmtree(run / name, ignore_errors=True)
    with suppress(OSError):  # another run may be clearing it just now
        (run / LOCK).unlink(missing_ok=True)
        run.rmdir()


def _take_place(run: Path, place: Path) -> None:
    if not place.exists():
        (run / NEW).rename(place)
        return
    if _exchange(run / NEW, place):
        return
    place.rename(run / OLD)
    (run / NEW).rename(place)


def _exchange(left: Path, right: Path) -> bool:
    """Gives two folders each other's name in one step; False where the system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and not rename(
        AT_FDCWD, os.fsencode(left), AT_FDCWD, os.fsencode(right), RENAME_EXCHANGE
    )
