"""Folders that training leaves behind: where in them the weights are, and where the rest of the checkpoint is.

- DeepSpeed: `latest`, and the folder it names with the files of all ranks
- FSDP and torch.distributed.checkpoint: a folder with `.metadata`, alone or beside that of the optimizer
- Trainer: `checkpoint-N`, in a folder of such

The content of the files says which of it is weights.
"""

import re
from pathlib import Path

from .checkpoint_files import Weights
from .distributed_checkpoints import find_distributed_folder, read_distributed_weights
from .zero_checkpoints import read_zero_weights
from .zero_files import find_zero_folder


FORMATS = ((find_zero_folder, read_zero_weights), (find_distributed_folder, read_distributed_weights))
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def open_training_folder(path: Path) -> tuple[Path, Weights] | None:
    """Weights that a training framework wrote in parts, if any, and the folder with the rest of the checkpoint.

    Raises:
        OSError: If a file is missing or cannot be read.
        ValueError: If the files do not fit together, or hold what is not read.
    """
    for find, read in FORMATS:
        folder = find(path)
        if folder is not None:
            return _folder_of_config(folder), read(folder)
    return None


def only_checkpoint(folder: Path) -> Path | None:
    """The `checkpoint-N` of a Trainer's output folder, if there is any.

    Raises:
        ValueError: If there are several: which is wanted is the user's to say.
    """
    matches = [(CHECKPOINT.fullmatch(place.name), place) for place in folder.iterdir() if place.is_dir()]
    found = sorted((int(match[1]), place) for match, place in matches if match)
    if len(found) > 1:
        names = ", ".join(place.name for _, place in found)
        raise ValueError(f"`{folder}` has no weights of its own but several checkpoints: {names}. Give one of them.")
    return found[0][1] if found else None


def _folder_of_config(folder: Path) -> Path:
    """The folder of config.json: beside the weights, or up to two folders above (run/checkpoint-N/global_stepM)."""
    places = [folder, *folder.absolute().parents[:2]]
    return next((place for place in places if (place / "config.json").is_file()), folder)
