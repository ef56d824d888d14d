"""Folders with a sub-folder for each class, and which class of a benchmark each of them is."""

import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ...rows.json_files import read_json_file
from .items import IMAGE_ENDINGS, VIDEO_ENDINGS, Item


CLASS_NAMES_FILE = "classnames.json"
WORDNET_ID = re.compile(r"n\d{8}")


@cache
def imagenet() -> dict[str, list[Any]]:
    """The WordNet ids of ImageNet's 1,000 classes, and which of them ImageNet-A and -R have ("imagenet-a")."""
    return read_json_file(Path(__file__).with_name("imagenet.json"))


def class_folders(folder: Path) -> list[Path]:
    """The sub-folders of a folder, sorted by name; those of numbers by the number.

    Raises:
        ValueError: If there are none.
    """
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise ValueError(f"{folder} has no sub-folders, one a class, with the images of the class in it.")
    return sorted(found, key=lambda path: int(path.name)) if all(path.name.isdecimal() for path in found) else found


def labelled_items(folder: Path, labels: dict[str, int]) -> list[Item]:
    """The images and videos below the sub-folders of a folder.

    Args:
        folder: With a sub-folder a class.
        labels: The class of each sub-folder; others are passed over.

    Returns:
        Items in the order of the sub-folders, then of their names, which are relative to `folder`.
    """
    return [
        Item(path.relative_to(folder).as_posix(), path, (labels[place.name],))
        for place in class_folders(folder)
        if place.name in labels
        for path in sorted(place.rglob("*"))
        if path.name.lower().endswith((*IMAGE_ENDINGS, *VIDEO_ENDINGS))
        and not any(part.startswith(".") for part in path.relative_to(place).parts)
    ]


def class_names_beside(folder: Path, folders: Sequence[str]) -> list[str] | None:
    """The names of the classes of `folders` in a `classnames.json` in `folder` or the one above; None without one.

    Raises:
        ValueError: If the file has another form, or lacks a class.
    """
    path = next((at / CLASS_NAMES_FILE for at in (folder, folder.parent) if (at / CLASS_NAMES_FILE).is_file()), None)
    if path is None:
        return None
    content = read_json_file(path)
    expected = f"{path} has to hold the name of each class: a list in the order of the folders, or by folder"
    if isinstance(content, dict):
        lacking = [name for name in folders if name not in content]
        if lacking:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise ValueError(f"{expected}; it lacks {lacking[0]!r}{more}.")
        content = [content[name] for name in folders]
    if not isinstance(content, list) or len(content) != len(folders):
        number = f"{len(content)} names" if isinstance(content, list) else type(content).__name__
        raise ValueError(f"{expected}; it has {number}, and there are {len(folders)} folders.")
    if bad := [name for name in content if not isinstance(name, str) or not name.strip()]:
        raise ValueError(f"{expected}; {bad[0]!r} is no name.")
    return content


def readable_name(folder: str) -> str:
    """The name of a class by that of its folder: `Sea_Lake` and `sea-lake` become words."""
    return re.sub(r"[_\-\s]+", " ", folder).strip()


def match_folders(
    folders: Sequence[str], classes: Sequence[str], subset: Sequence[int] | None = None
) -> dict[str, int]:
    """Finds the class that each folder holds, among classes in a benchmark's order.

    Folders may be called by WordNet ids (for the classes of ImageNet), by numbers, or by the names of the classes; or
    there is one for each class, in alphabetical order as torchvision reads them.

    Args:
        folders: Sorted names.
        classes: Names of the classes.
        subset: Which of ImageNet's 1,000 classes these are; None for all.

    Raises:
        ValueError: If they cannot be told.
    """
    if all(map(WORDNET_ID.fullmatch, folders)) and len(classes) == len(subset or imagenet()["wordnet_ids"]):
        ids = imagenet()["wordnet_ids"]
        place_of = {ids[number]: place for place, number in enumerate(subset or range(len(ids)))}
    elif all(name.isdecimal() for name in folders):
        place_of = {name: int(name) for name in folders if int(name) < len(classes)}
    else:
        plain = [_plain(name) for name in classes]
        place_of = {name: plain.index(_plain(name)) for name in folders if _plain(name) in plain}
        # Folders in the order of the classes are so, too, where they have the same names.
        is_ordered = all(plain[place] == _plain(name) for place, name in enumerate(folders) if name in place_of)
        if len(place_of) < len(folders) == len(classes) and is_ordered:
            place_of = {name: place for place, name in enumerate(folders)}
    if unknown := [name for name in folders if name not in place_of]:
        raise ValueError(
            f"the folder {unknown[0]!r}" + f" (and {len(unknown) - 1} more)" * (len(unknown) > 1) + f" is none of the "
            f"{len(classes)} classes. Put a {CLASS_NAMES_FILE} beside the folders that gives the name of each."
        )
    return {name: place_of[name] for name in folders}


def _plain(name: str) -> str:
    return "".join(sign for sign in name.lower() if sign.isalnum())


def real_labels(items: Iterable[Item], path: Path) -> list[Item]:
    """Gives images of ImageNet's validation set their ReaL labels (arXiv 2006.07159) and leaves out those without any.

    Args:
        items: Named `.../ILSVRC2012_val_00000001.JPEG`.
        path: `real.json`: a list of labels for each of the 50,000 images.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it has another form, or an image another name.
    """
    content = read_json_file(path)
    classes = range(len(imagenet()["wordnet_ids"]))
    if not isinstance(content, list) or not all(
        isinstance(labels, list) and all(isinstance(one, int) and one in classes for one in labels)
        for labels in content
    ):
        raise ValueError(f"{path} has to hold a list of labels for each image of ImageNet's validation set, in order.")
    found = []
    for item in items:
        number = re.search(r"_val_(\d{8})\.", item.name)
        if number is None or not 0 < int(number[1]) <= len(content):
            raise ValueError(f"ReaL labels belong to images called ILSVRC2012_val_00000001.JPEG, not {item.name}.")
        labels = content[int(number[1]) - 1]
        if labels:
            found.append(Item(item.name, item.source, tuple(labels)))
    return found


__all__ = [
    "CLASS_NAMES_FILE",
    "WORDNET_ID",
    "class_folders",
    "class_names_beside",
    "imagenet",
    "labelled_items",
    "match_folders",
    "readable_name",
    "real_labels",
]
