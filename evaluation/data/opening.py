"""Opens the data of a protocol below a root, or anyone's own data in one of the known layouts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...rows.json_files import read_json_file
from ...rows.shards import ENDINGS
from ...rows.texts import check_text
from ..protocols.protocol import LAYOUTS_OF_TASK, Protocol, shipped_protocols
from .ade20k import class_names, segmented_images
from .annotations import captioned_items, read_annotations, read_parallel
from .folders import (
    CLASS_NAMES_FILE,
    WORDNET_ID,
    class_folders,
    class_names_beside,
    imagenet,
    labelled_items,
    match_folders,
    readable_name,
    real_labels,
)
from .items import EvaluationData, Item, check_items, taken
from .prompts import SIMPLE_TEMPLATES, benchmark_classes, benchmark_templates, check_templates
from .tables import items_of_shards


REAL_LABELS_FILE = "real.json"
FOLDERS_OF_CLASSES = "the sub-folders of classes"
SPLITS = ("train", "val", "validation", "test")  # a folder with these alone has no classes in it
TABLE_ENDINGS = (".json", ".csv", ".tsv")


def open_data(protocol: Protocol, root: str, limit: int | None = None) -> EvaluationData:
    """Opens the data of a protocol, and checks that all of it is there.

    Args:
        protocol: What is measured.
        root: A folder with data sets, the folder of this one, a file of annotations, or shards (also at an address).
        limit: How many images are taken, evenly over all.

    Raises:
        OSError: If something cannot be read.
        ValueError: If it is not there, or bad; the message says which file to give.
    """
    if _are_shards(root):
        found = _from_shards(protocol, root, limit)
    else:
        found = LAYOUTS[_layout(protocol)](protocol, _place(protocol, Path(root)))
    items = taken(found.items, limit)
    _check_texts(found, items)
    check_items(items, found.place)
    return replace(found, items=items)


def _check_texts(data: EvaluationData, items: Sequence[Item]) -> None:
    """Check that a tokenizer takes the captions, and the names of classes where prompts are made of them."""
    for item in items:
        for text in item.captions:
            check_text(text, f"{data.place}: a caption of {item.name}")
    for text in (*data.classes, *data.templates) if data.templates else ():
        check_text(text, f"{data.place}: {text}, of which prompts are made,")


def find_data(protocol: Protocol, root: Path) -> Path | None:
    """The folder of a protocol's data below a root; None if it is not there."""
    return next((folder for folder in protocol.folders_below(root) if _is_there(protocol, folder)), None)


def protocols_below(root: str, task: str | None = None) -> list[Protocol]:
    """The protocols whose data lie below a root.

    Raises:
        OSError: If there is no such folder.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} with data sets in it.")
    return [
        protocol
        for protocol in shipped_protocols().values()
        if task in (None, protocol.task) and _is_complete(protocol, find_data(protocol, folder))
    ]


def incomplete_below(root: str, tasks: Sequence[str]) -> dict[str, list[str]]:
    """Folders below a root that protocols look for, but in which a file is missing: of each, files one of which it
    lacks.
    """
    found: dict[str, list[str]] = {}
    for protocol in shipped_protocols().values():
        there = [folder for folder in protocol.folders_below(Path(root)) if folder.is_dir()]
        if protocol.task in tasks and there and find_data(protocol, Path(root)) is None:
            needed = found.setdefault(str(there[0]), [])
            files = annotation_names(protocol) or [FOLDERS_OF_CLASSES] * (protocol.data["layout"] == "class_folders")
            needed += [name for name in files if name not in needed]
    return {folder: names for folder, names in found.items() if names}


def _is_complete(protocol: Protocol, folder: Path | None) -> bool:
    """Whether a folder is there, and for ReaL labels the file that has them."""
    if folder is None or protocol.data.get("labels") != "real":
        return folder is not None
    images = _held_out_folder(protocol, folder) if protocol.data["layout"] == "probe_folders" else folder
    return images is not None and _real_labels_file(images).is_file()


def _are_shards(root: str) -> bool:
    name = root.lower().split("::")[-1]
    return "://" in root or (name.endswith(ENDINGS) and not name.endswith((".json", ".csv")))


def _layout(protocol: Protocol) -> str:
    layout = str(protocol.data["layout"])
    known = LAYOUTS_OF_TASK[protocol.task]
    if layout not in known:
        raise ValueError(
            f"The protocol {protocol.name}: layout {layout!r} is none that the task {protocol.task} reads: "
            f"{', '.join(known)}."
        )
    if layout == "xtd" and len(annotation_names(protocol)) != 2:
        raise ValueError(
            f'The protocol {protocol.name}: the "annotations" of the layout xtd are two files, one with names of '
            "images and one with their captions."
        )
    return layout


def _is_there(protocol: Protocol, folder: Path) -> bool:
    needed = annotation_names(protocol)
    if protocol.data["layout"] == "probe_folders":
        return (folder / "train").is_dir() and _held_out_folder(protocol, folder) is not None
    if protocol.data["layout"] == "xtd":
        return all((folder / name).is_file() for name in needed)
    if needed:
        return any((folder / name).is_file() for name in needed)
    if protocol.data["layout"] == "captions":
        return folder.is_dir() and _only_table(folder) is not None
    return folder.is_dir() and any(path.is_dir() and path.name not in SPLITS for path in folder.iterdir())


def _place(protocol: Protocol, root: Path) -> Path:
    found = find_data(protocol, root)
    if found is not None:
        return found
    if root.is_file() and protocol.data["layout"] != "captions":
        raise ValueError(f"{root} is a file, and the layout {protocol.data['layout']} is that of a folder: give it.")
    if root.exists() and (root.is_file() or _is_there(protocol, root)):
        return root
    if not root.exists():
        raise FileNotFoundError(f"There is no file or folder {root}.")
    needed = annotation_names(protocol)
    names = " or ".join(str(folder) for folder in protocol.folders_below(root)) or str(root)
    what = f", with {' or '.join(needed)}" if needed else ", with a sub-folder for each class"
    if protocol.data["layout"] == "captions" and not needed:
        names, what = _files_wanted(()), " in it"
    if protocol.data["layout"] == "probe_folders":
        what = f", with train and {' or '.join(_held_out_names(protocol))}, and a sub-folder for each class in both"
    raise ValueError(f"The data of {protocol.title or protocol.name} are not below {root}: give {names}{what}.")


def annotation_names(protocol: Protocol) -> list[str]:
    """The files of annotations of which a protocol reads the first that is there; of XTD both."""
    language = str(protocol.prompts.get("language", "en"))
    names = protocol.data.get("annotations", [])
    return [name.replace("{language}", language) for name in ([names] if isinstance(names, str) else names)]


def _templates(prompts: Mapping[str, Any]) -> tuple[str, ...]:
    templates = prompts.get("templates", list(SIMPLE_TEMPLATES))
    if isinstance(templates, str):
        templates = benchmark_templates(templates, prompts.get("language", "en"))
    check_templates(templates)
    return tuple(templates)


def _class_folders(protocol: Protocol, folder: Path) -> EvaluationData:
    prompts = protocol.prompts
    names = [path.name for path in class_folders(folder)]
    subset = _subset(protocol)
    classes = class_names_beside(folder, names)
    labels = {name: place for place, name in enumerate(names)}
    if classes is None and "classes" in prompts:
        known = benchmark_classes(prompts["classes"], prompts.get("language", "en"))
        if known is not None:
            classes = known if subset is None else [known[number] for number in subset]
            try:
                labels = match_folders(names, classes, subset)
            except ValueError as error:
                raise ValueError(f"{folder}: {error}") from error
    if classes is None:
        classes = _names_of_folders(folder, names)
    items: Sequence[Item] = labelled_items(folder, labels)
    if protocol.data.get("labels") == "real":
        items = real_labels(items, _real_labels_file(folder))
    return EvaluationData(items, str(folder), tuple(classes), _templates(prompts))


def _names_of_folders(folder: Path, names: Sequence[str]) -> list[str]:
    """The names of classes by those of their folders, which have to tell them apart."""
    found: dict[str, str] = {}
    if all(map(WORDNET_ID.fullmatch, names)):
        raise ValueError(
            f"The folders of {folder} are WordNet ids, such as {names[0]}, which no model reads as names: choose the "
            f"protocol by --protocol (imagenet-1k-en), or put a {CLASS_NAMES_FILE} beside them."
        )
    for name in names:
        other = found.setdefault(readable_name(name), name)
        if other != name:
            raise ValueError(
                f"{folder} has two folders of the class {readable_name(name)!r}, {other} and {name}: rename one, or "
                "put a classnames.json beside them."
            )
    return list(found)


def _subset(protocol: Protocol) -> Sequence[int] | None:
    """Which of ImageNet's classes the data have; None for all."""
    name = protocol.data.get("subset")
    known = sorted(key for key in imagenet() if key.startswith("imagenet"))
    if name is not None and name not in known:
        raise ValueError(f"The protocol {protocol.name}: the subset {name!r} is none of {', '.join(known)}.")
    return None if name is None else imagenet()[name]


def _real_labels_file(folder: Path) -> Path:
    places = [at / REAL_LABELS_FILE for at in (folder, folder.parent)]
    return next((path for path in places if path.is_file()), places[-1])


def _objectnet(protocol: Protocol, folder: Path) -> EvaluationData:
    """The classes that ObjectNet shares with ImageNet, by the files that come with it."""
    files = [_either(folder, name) for name in ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json")]
    of_folder, shared = map(read_json_file, files)
    if not isinstance(of_folder, dict) or not all(isinstance(label, str) for label in of_folder.values()):
        raise ValueError(f"{files[0]} has to hold a name, a text, by folder.")
    if not isinstance(shared, dict):
        raise ValueError(f"{files[1]} has to hold the classes of ImageNet by name.")
    images = folder / "images" if (folder / "images").is_dir() else folder
    kept = sorted(name for name, label in of_folder.items() if label in shared)
    labels = {name: place for place, name in enumerate(kept)}
    classes = tuple(of_folder[name].lower() for name in kept)
    return EvaluationData(labelled_items(images, labels), str(images), classes, _templates(protocol.prompts))


def _either(folder: Path, name: str) -> Path:
    places = [folder / name, folder / "mappings" / name, folder.parent / name]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise ValueError(f"{folder} lacks {name}, which comes with ObjectNet in its folder mappings.")
    return found


def _captions(protocol: Protocol, folder: Path) -> EvaluationData:
    data = protocol.data
    if folder.is_file():
        captioned, at = read_annotations(folder, data.get("split", "test")), folder.parent
    else:
        names = annotation_names(protocol)
        path = next((folder / name for name in names if (folder / name).is_file()), None) or _only_table(folder)
        if path is None:
            raise ValueError(f"{folder} has no captions: give {_files_wanted(names)} in it.")
        captioned, at = read_annotations(path, data.get("split", "test")), folder
    return EvaluationData(captioned_items(captioned, at, data.get("images", ())), str(folder))


def _files_wanted(names: Sequence[str]) -> str:
    return " or ".join(names) or f"the file of annotations ({', '.join(TABLE_ENDINGS)}, or shards), or one alone"


def _only_table(folder: Path) -> Path | None:
    """The one file in a folder that can have captions; None if there are none, or several."""
    found = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in TABLE_ENDINGS and path.is_file()]
    return found[0] if len(found) == 1 else None


def _xtd(protocol: Protocol, folder: Path) -> EvaluationData:
    names, captions = (folder / name for name in annotation_names(protocol))
    items = captioned_items(read_parallel(names, captions), folder, protocol.data.get("images", ()))
    return EvaluationData(items, str(folder))


def _probe_folders(protocol: Protocol, folder: Path) -> EvaluationData:
    """Folders of classes to train a probe on, and others to measure it on, of all the classes or a part of them."""
    training, held_out = folder / "train", _held_out_folder(protocol, folder)
    if held_out is None or not training.is_dir():
        raise ValueError(f"{folder} needs train and {' or '.join(_held_out_names(protocol))}, with a folder a class.")
    names = [path.name for path in class_folders(training)]
    number_of = {name: number for number, name in enumerate(names)}
    found = [path.name for path in class_folders(held_out)]
    # Folders of numbers, as ImageNet-V2 has them, count classes whose folders have names.
    counts = not any(name.isdecimal() for name in names)
    labels = {name: number_of.get(name, int(name) if counts and name.isdecimal() else -1) for name in found}
    if bad := [name for name, label in labels.items() if not 0 <= label < len(names)]:
        raise ValueError(f"{held_out / bad[0]} is none of the {len(names)} classes of {training}.")
    items: Sequence[Item] = labelled_items(held_out, labels)
    if protocol.data.get("labels") == "real":
        items = real_labels(items, _real_labels_file(held_out))
    classes = class_names_beside(training, names) or [readable_name(name) for name in names]
    candidates = tuple(sorted(labels.values())) if len(found) < len(names) else ()
    trained = labelled_items(training, number_of)
    if len({item.labels for item in trained}) < 2:
        raise ValueError(f"{training} has images of fewer than two classes, between which a probe could tell.")
    return EvaluationData(items, str(held_out), tuple(classes), training=trained, candidates=candidates)


def _held_out_names(protocol: Protocol) -> Sequence[str]:
    return protocol.data.get("evaluate", ("val", "validation", "test"))


def _held_out_folder(protocol: Protocol, folder: Path) -> Path | None:
    return next((folder / name for name in _held_out_names(protocol) if (folder / name).is_dir()), None)


def _segmentation(protocol: Protocol, folder: Path) -> EvaluationData:
    images = segmented_images(folder, protocol.data.get("split", "validation"))
    for one in images:
        one.check_annotation()
    return EvaluationData([Item(one.name, one.image) for one in images], str(folder), tuple(class_names(folder)))


def _from_shards(protocol: Protocol, root: str, limit: int | None) -> EvaluationData:
    if protocol.data["layout"] not in ("class_folders", "captions", "xtd"):
        raise ValueError(f"{root} are shards, and the layout {protocol.data['layout']} is that of a folder: give it.")
    is_remote = "://" in root  # of which no more is fetched than is measured
    items, classes = items_of_shards(root, limit, of_front=is_remote)
    is_labelled = _layout(protocol) == "class_folders"
    lacking = next((item.name for item in items if not (item.labels if is_labelled else item.captions)), None)
    if lacking:
        what = "class (a column cls or label)" if is_labelled else "caption (a column txt, caption or text)"
        raise ValueError(f"{root}: the sample {lacking} has no {what}.")
    if not is_labelled:
        return EvaluationData(items, root)
    prompts = protocol.prompts
    known = benchmark_classes(prompts["classes"], prompts.get("language", "en")) if "classes" in prompts else None
    if known is not None and not classes:
        classes = known
    elif classes and is_remote and len(items) == limit:
        raise ValueError(f"{root}: its classes are names, which only all of its rows tell: leave out the limit.")
    highest = max((label for item in items for label in item.labels), default=-1)
    if highest >= len(classes):
        raise ValueError(f"{root} has the class {highest} and no names of classes: give them in the column label.")
    return EvaluationData(items, root, tuple(classes), _templates(prompts))


LAYOUTS: dict[str, Callable[[Protocol, Path], EvaluationData]] = {
    "class_folders": _class_folders,
    "objectnet": _objectnet,
    "captions": _captions,
    "xtd": _xtd,
    "segmentation": _segmentation,
    "probe_folders": _probe_folders,
}
