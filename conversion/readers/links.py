"""Refuses links out of a source: a foreign checkpoint may link to any file here, and results are uploaded."""

import os
from pathlib import Path

from .checkpoint_files import WEIGHT_SUFFIXES


# How far below SOURCE anything is read: run/checkpoint-N/global_stepM/file.
DEPTH = 3


# What is read, by the end of its name; other files may be links to anywhere.
READ = (
    *WEIGHT_SUFFIXES,
    *(".distcp", ".jinja", ".json", ".metadata", ".model"),
    *("LICENSE", "LICENSE.md", "LICENSE.txt", "README.md", "latest", "merges.txt"),
)


def check_links(folder: Path, depth: int = DEPTH) -> None:
    """Refuses links out of a folder, but for those of the Hub's cache from a snapshot to the repository's blobs.

    Args:
        folder: Given by the user, so that it may be a link itself.
        depth: Depth of the folders that are searched; 0 where only files beside a file are read.

    Raises:
        ValueError: If there are any; the message lists them, and where they lead.
    """
    root = folder.resolve()
    snapshots = hub_snapshot(root)
    allowed = [root] if snapshots is None else [root, snapshots.parent / "blobs"]
    leaving = {}
    for place in _links_below(root, depth):
        target = Path(os.path.realpath(place))  # through all links; a circle of them ends at itself
        if not any(target.is_relative_to(known) for known in allowed):
            leaving[place.relative_to(root)] = target
    if leaving:
        found = ", ".join(f"{place} -> {target}" for place, target in sorted(leaving.items()))
        raise ValueError(
            f"`{folder}` holds links that leave it: {found}. What they lead to is not read: copy what belongs to the "
            "checkpoint in their place, and take away the others."
        )


def hub_snapshot(folder: Path) -> Path | None:
    """The `snapshots` folder of a folder in the Hub's cache (models--USER--NAME/snapshots/COMMIT), else None."""
    places = (place for place in folder.resolve().parents if place.name == "snapshots")
    return next((place for place in places if place.parent.name.startswith("models--")), None)


def _links_below(root: Path, depth: int) -> list[Path]:
    found = []
    for place, folders, files in os.walk(root):
        if len(Path(place).relative_to(root).parts) >= depth:
            folders.clear()
        names = [*folders, *(name for name in files if name.endswith(READ))]
        found += [Path(place, name) for name in names if Path(place, name).is_symlink()]
    return found
