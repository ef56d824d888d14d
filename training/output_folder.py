"""The folder that a run writes to: what may be in it before, and what a failed start takes away again.

A run deletes nothing that a run did not write, so that a mistyped folder is refused and not filled.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..kinds import check_weights
from .checkpoints import LOG_FILE, RECORD_FILE
from .models.whole_folders import INCOMPLETE, READY, checkpoints_in


TRAINER_FOLDER = "trainer"  # of the record, and of a folder of checkpoints for each phase
NAMED_ENTRIES = 3


def check_output(output: Path, inputs: Iterable[str | os.PathLike | None]) -> None:
    """Check that a run may write to a folder, an empty one or one with an earlier run, and that models are whole.

    Args:
        output: The folder, which need not exist.
        inputs: Files and folders that the run reads; names that are no path here pass.

    Raises:
        ValueError: If the folder holds anything else, or an input, or the weights of an input are cut off.
    """
    here = output.resolve()
    for path in (Path(given) for given in inputs if given is not None and os.path.exists(given)):
        if here == path.resolve() or here in path.resolve().parents:
            is_itself = here == path.resolve()
            where = "is read by the run" if is_itself else f"holds {path}, which the run reads"
            raise ValueError(f"The output {output} {where}: take another folder.")
        check_weights(path)
    if output.exists() and not output.is_dir():
        raise ValueError(f"The output {output} is a file: take another name.")
    foreign = [] if holds_run(output) else _entries(output)
    if foreign:
        more = f" and {len(foreign) - NAMED_ENTRIES} more" if len(foreign) > NAMED_ENTRIES else ""
        raise ValueError(
            f"The output {output} is not empty and holds no run of training, but {', '.join(foreign[:NAMED_ENTRIES])}"
            f"{more}: take another folder."
        )


def holds_run(output: Path) -> bool:
    """Return whether a run is in a folder, finished or not."""
    return any((output / name).is_file() for name in (LOG_FILE, RECORD_FILE, f"{READY}/{LOG_FILE}")) or is_begun(
        output
    )


def is_begun(output: Path) -> bool:
    """Return whether a folder has checkpoints to go on from."""
    return any(checkpoints_in(folder) for folder in (output / TRAINER_FOLDER).glob("*"))


def _entries(output: Path) -> list[str]:
    """What is in a folder, but for what a kill leaves behind at the very start or end of a run."""
    if not output.is_dir():
        return []
    entries = [entry for entry in sorted(output.iterdir()) if entry.name != INCOMPLETE]
    return [entry.name for entry in entries if entry.name != TRAINER_FOLDER or _has_files(entry)]


def _has_files(folder: Path) -> bool:
    """Whether more than empty folders, and a record that was being written, are in a folder."""
    unfinished = f".{Path(RECORD_FILE).name}."
    files = (entry for entry in folder.rglob("*") if not entry.is_dir() and not entry.name.startswith(unfinished))
    return not folder.is_dir() or any(files)


def remove_start(output: Path, phases: Iterable[str]) -> None:
    """Remove the record of a run without checkpoints and the folders of its phases, and what is empty then."""
    trainer = output / TRAINER_FOLDER
    for phase in phases:
        shutil.rmtree(trainer / phase, ignore_errors=True)
    (output / RECORD_FILE).unlink(missing_ok=True)
    if trainer.is_dir() and not any(trainer.iterdir()):
        trainer.rmdir()


@contextmanager
def cleared_on_failure(output: Path, phases: Iterable[str], is_writer: bool) -> Iterator[None]:
    """A start that fails before its first checkpoint leaves no folder behind.

    Args:
        output: The folder.
        phases: Names of the phases.
        is_writer: False for processes that remove nothing.
    """
    was_there = output.exists()
    try:
        yield
    finally:
        if is_writer and not (output / LOG_FILE).exists() and not is_begun(output):
            remove_start(output, phases)
            if not was_there and output.exists() and not any(output.iterdir()):
                output.rmdir()
