"""Folders that are whole or not there: a process may be killed at any moment of a write, and nothing half-written is
taken for a model.

`written_whole` writes beside the final names and moves the files in at the end; `recovered` completes a move that was
cut off. `fault_of` says what a checkpoint of `Trainer` lacks, and `newest_whole` finds the one to go on from.

Not covered: file systems that lose what was written when the machine itself goes down.
"""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath

from transformers.utils import logging

from ...kinds import is_whole_safetensors


logger = logging.get_logger(__name__)

# Inside of the folder that is written: what is being written, and what only has to be moved.
INCOMPLETE, READY = ".incomplete", ".ready"
NAMES_FILE = ".names.json"  # of all that is in READY
# A folder without its configuration is not read, and one without its log is not finished: they go first and come last.
OPENING_FILES = ("config.json", "training_log.json")
PROCESSES_FILE = "processes.json"  # in a checkpoint: how many processes wrote it
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = re.compile(r"(model|pytorch_model|adapter_model)([-.].*)?\.(safetensors|bin)(\.index\.json)?")
# What reading JSON raises, and going on as if it were what belongs there.
_OF_OTHER_CONTENT = (ValueError, RecursionError, LookupError, TypeError, AttributeError)
# Either of these is a checkpoint's model, its optimizer. DeepSpeed keeps both in `global_step...`, FSDP in folders of
# its own.
_MODELS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model_fsdp*", "global_step*")
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")


# ------------------------------------------------------------------------------------------------------------- writing
@contextmanager
def written_whole(folder: str | os.PathLike, is_writer: bool = True) -> Iterator[Path]:
    """Gives a place to write to; what is there at the end replaces the model in `folder`, old shards included.

    Args:
        folder: The final folder. Files of other names and sub-folders in it stay.
        is_writer: False for processes that write nothing and only need the place.

    Yields:
        The place.
    """
    folder = Path(folder)
    place, was_there = folder / INCOMPLETE, folder.exists()
    if not is_writer:
        yield place
        return
    recovered(folder)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        yield place
        names = [entry.name for entry in place.iterdir()]
        (place / NAMES_FILE).write_text(json.dumps(names), encoding="utf-8")
        place.rename(folder / READY)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        if not was_there and not any(folder.iterdir()):
            folder.rmdir()
    recovered(folder)


def recovered(folder: str | Path) -> Path:
    """Complete what a kill cut off between the last byte written and the last file moved; return the folder.

    Raises:
        ValueError: If the list of what has to be moved names anything outside of the folder.
    """
    folder = Path(folder)
    ready = folder / READY
    if not ready.is_dir():
        return folder
    names = _names_in(ready / NAMES_FILE)
    for name in OPENING_FILES:
        if (ready / name).exists():
            (folder / name).unlink(missing_ok=True)
    for entry in list(folder.iterdir()):
        if _WEIGHTS.fullmatch(entry.name) and entry.name not in names:
            entry.unlink()
    others = [name for name in names if name not in OPENING_FILES]
    for name in (*others, *OPENING_FILES):
        source, target = ready / name, folder / name
        if source.is_dir() and target.is_dir():
            shutil.rmtree(target)
        if source.exists():
            source.replace(target)
    shutil.rmtree(ready)
    return folder


def _names_in(file: Path) -> list[str]:
    """The names that `written_whole` listed. The folder may come from others, so none leads out of it."""
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) and _is_plain(name) for name in names):
        raise ValueError(f"{file} is not a list of plain file names, as an interrupted write leaves it.")
    return names


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and PureWindowsPath(name).name == name and "\0" not in name


# ------------------------------------------------------------------------------------------------------------- reading
def step_of(checkpoint: Path) -> int | None:
    """The step in the name of a checkpoint; None for anything else."""
    found = _CHECKPOINT.fullmatch(checkpoint.name)
    return int(found[1]) if found and checkpoint.is_dir() else None


def checkpoints_in(folder: str | Path) -> list[Path]:
    """Checkpoints of `Trainer`, whole or not, the newest first."""
    steps = [(step, entry) for entry in Path(folder).glob("checkpoint-*") if (step := step_of(entry)) is not None]
    return [entry for _, entry in sorted(steps, reverse=True)]


def newest_whole(folder: str | Path, processes: int = 1) -> Path | None:
    """The newest checkpoint that a run can go on from; newer ones that are not whole are passed over, with one
    warning.

    Args:
        folder: `output_dir` of a `Trainer`.
        processes: Which wrote it, where a checkpoint itself does not say.
    """
    faults: list[str] = []
    for checkpoint in checkpoints_in(folder):
        fault = fault_of(checkpoint, processes)
        if fault is None:
            if faults:
                logger.warning(f"{checkpoint} is the newest whole checkpoint. Passed over: {'; '.join(faults)}.")
            return checkpoint
        faults.append(f"{checkpoint.name} ({fault})")
    if faults:
        logger.warning(f"{folder} has no whole checkpoint, so training starts anew. Passed over: {'; '.join(faults)}.")
    return None


def processes_of(checkpoint: Path) -> int | None:
    """The number of processes that wrote a checkpoint; None where it does not say."""
    try:
        return int(json.loads((checkpoint / PROCESSES_FILE).read_text(encoding="utf-8"))["processes"])
    except (OSError, *_OF_OTHER_CONTENT):
        return None


def fault_of(checkpoint: Path, processes: int = 1) -> str | None:
    """What makes a checkpoint of `Trainer` unfit to go on from; None where nothing does.

    Args:
        checkpoint: Its folder.
        processes: Which wrote it, where the checkpoint itself does not say.

    Returns:
        A few words with the name of the file.
    """
    is_deepspeed = any(checkpoint.glob("global_step*"))
    processes = processes_of(checkpoint) or processes
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    wanted = [("trainer_state.json",), _MODELS, _OPTIMIZERS, *((state,) for state in states)]
    wanted.append(("latest",) if is_deepspeed else ("scheduler.pt",))
    for patterns in wanted:
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            return f"no {patterns[0]}"
    for path in sorted(checkpoint.rglob("*")):
        if fault := _fault_in_file(path) if path.is_file() else _fault_in_folder(path):
            return f"{path.relative_to(checkpoint)} {fault}"
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    if not isinstance(state, dict) or state.get("global_step") != step_of(checkpoint):
        return "trainer_state.json is of another step"
    return None


def _fault_in_folder(path: Path) -> str | None:
    """torch.distributed.checkpoint writes its table of contents last."""
    return "has no .metadata" if any(path.glob("*.distcp")) and not (path / ".metadata").exists() else None


def _fault_in_file(path: Path) -> str | None:
    """What shows that a file was not written to its end."""
    if path.suffix == ".safetensors":
        return None if is_whole_safetensors(path) else "ends too early"
    if path.suffix in (".pt", ".pth", ".bin"):  # torch.save writes archives, whose table of contents is their end
        return None if zipfile.is_zipfile(path) else "ends too early"
    if path.suffix == ".json":
        return _fault_in_json(path)
    return None


def _fault_in_json(path: Path) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        shards = content["weight_map"] if path.name.endswith(".index.json") else {}
        missing = sorted({name for name in shards.values() if not (path.parent / name).is_file()})
    except _OF_OTHER_CONTENT:
        return "is broken JSON"
    return f"names {missing[0]}, which is missing" if missing else None
