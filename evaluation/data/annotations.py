"""Files that name images or videos with their captions, in the layouts in which they are published.

| file | layout |
|---|---|
| JSON `{"images": [...], "annotations": [...]}` | COCO captions, COCO-CN, NoCaps |
| JSON `{"images": [{"sentences": ..., "split": ...}]}` | Karpathy's splits |
| JSON `[{"image" or "video": ..., "caption": ...}]` | what retrieval code of BLIP and ALBEF reads |
| JSON `{"videos": [...], "sentences": [...]}` | MSR-VTT |
| CSV with `image,caption`, with or without quotes; other separators too | Flickr30K, Flickr30K-CN |
| CSV with `video_id` and `sentence` | MSR-VTT, 1K split |
| two text files of equal length | XTD |
"""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ...rows.json_files import read_json_file
from .items import IMAGE_ENDINGS, VIDEO_ENDINGS, Item


Captioned = dict[str, list[str]]  # captions by the name of the file, in the order of the annotations
FOLDERS = (".", "images", "Images", "val2014", "train2014", "test2014", "videos", "video", "all", "TestVideo", "val")
SEPARATORS = (",", "\t", "|", ";")
# The first column that a table has is taken.
NAME_COLUMNS = ("image", "file_name", "filepath", "image_name", "video", "video_id")
CAPTION_COLUMNS = ("caption", "captions", "sentence", "text", "comment", "raw", "title")


def read_annotations(path: Path, split: str = "test") -> Captioned:
    """Reads the captions of images or videos.

    Args:
        path: JSON or CSV, see the table above.
        split: Where the file holds several.

    Returns:
        The captions by image or video, in the order of the file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it has another layout, or a row is bad; the message names the row.
    """
    try:
        found = _read_json(path, split) if path.suffix.lower() == ".json" else _read_table(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8: {error}.") from error
    if not found:
        raise ValueError(f"{path} names no image of the split {split!r}.")
    return found


def read_parallel(names: Path, captions: Path) -> Captioned:
    """Reads two text files: one names an image a line, the other has its caption in the same line.

    Raises:
        OSError: If one cannot be read.
        ValueError: If they differ in length, or a line is empty.
    """
    images, texts = (_lines_of(path) for path in (names, captions))
    if len(images) != len(texts):
        raise ValueError(f"{names} has {len(images)} lines and {captions} {len(texts)}: they have to be as long.")
    found: Captioned = {}
    for number, (image, text) in enumerate(zip(images, texts, strict=True), start=1):
        _add(found, image.strip(), text, f"{captions}, line {number}")
    return found


def _lines_of(path: Path) -> list[str]:
    """The lines of a text file; what else ends a line for Python may stand within a caption."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8: {error}.") from error
    return text.removesuffix("\n").split("\n")


def captioned_items(captioned: Captioned, folder: Path, folders: Sequence[str] = FOLDERS) -> list[Item]:
    """Finds the files that annotations name.

    Args:
        captioned: Captions by the names of files, with or without an ending.
        folder: Of the data set.
        folders: Below it where the files may lie; those that are not there are passed over.

    Raises:
        ValueError: If a file is missing, or would lie outside.
    """
    places = [folder / name for name in dict.fromkeys((*folders, *FOLDERS)) if (folder / name).is_dir()]
    return [
        Item(name, _located(name, places, folder), captions=tuple(captions)) for name, captions in captioned.items()
    ]


def _located(name: str, places: Sequence[Path], folder: Path) -> Path:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"The image {name} lies outside of {folder}: annotations may only name images below it.")
    has_ending = name.lower().endswith((*IMAGE_ENDINGS, *VIDEO_ENDINGS))
    endings = ("",) if has_ending else ("", *VIDEO_ENDINGS, *IMAGE_ENDINGS)
    for place in places:
        for ending in endings:
            if (place / f"{name}{ending}").is_file():
                return place / f"{name}{ending}"
    where = ", ".join(sorted(place.name or "." for place in places if place != folder))
    looked = f" (looked in it and in {where})" if where else ""
    raise ValueError(f"The image {name} is missing below {folder}{looked}.")


def _read_json(path: Path, split: str) -> Captioned:
    content = read_json_file(path)
    if isinstance(content, list):
        return _gather(path, content, _of_row)
    keys = set(content) if isinstance(content, dict) else set()
    for key in keys & {"images", "annotations", "videos", "sentences"}:
        if not isinstance(content[key], list) or not all(isinstance(row, dict) for row in content[key]):
            raise ValueError(f'{path}: "{key}" has to be a list of JSON objects.')
    if {"images", "annotations"} <= keys:
        return _read_coco(path, content)
    if {"videos", "sentences"} <= keys:
        return _read_msr_vtt(path, content, split)
    if "images" in keys:
        return _gather(path, [row for row in content["images"] if _split_of(row) in (None, split)], _of_karpathy_row)
    raise ValueError(
        f"{path} has none of the known layouts: COCO's (images, annotations), Karpathy's (images with sentences), "
        "MSR-VTT's (videos, sentences), or a list of rows with image and caption."
    )


def _split_of(row: Any) -> Any:
    return row.get("split") if isinstance(row, dict) else None


def _read_coco(path: Path, content: dict[str, Any]) -> Captioned:
    names: dict[Any, str] = {}
    for number, row in enumerate(content["images"], start=1):
        name = row.get("file_name", row.get("image"))
        if not isinstance(name, str) or not isinstance(row.get("id"), (int, str)):
            raise ValueError(f'{path}: image {number} needs "id", a number or text, and "file_name".')
        if row["id"] in names:
            raise ValueError(f'{path}: image {number} has the "id" {row["id"]!r} of another one.')
        names[row["id"]] = name
    order = sorted(names) if all(isinstance(key, int) for key in names) else list(names)
    found: Captioned = {names[key]: [] for key in order}
    for number, row in enumerate(content["annotations"], start=1):
        key = row.get("image_id")
        image = names.get(key) if isinstance(key, (int, str)) else None
        if image is None:
            raise ValueError(f'{path}: annotation {number} has no "image_id" of an image in the file.')
        _add(found, image, row.get("caption"), f"{path}: annotation {number}")
    _check_captions(path, found, found, "images")
    return found


def _read_msr_vtt(path: Path, content: dict[str, Any], split: str) -> Captioned:
    ids = [row.get("video_id") for row in content["videos"] if row.get("split", split) == split]
    if bad := [name for name in ids if not isinstance(name, str)]:
        raise ValueError(f'{path}: a video names no image or video: its "video_id" has to be a text, not {bad[0]!r}.')
    wanted = set(ids)
    found: Captioned = {}
    for number, row in enumerate(content["sentences"], start=1):
        if isinstance(row.get("video_id"), str) and row["video_id"] in wanted:
            _add(found, row["video_id"], row.get("caption"), f"{path}: sentence {number}")
    _check_captions(path, ids, found, "videos")
    return found


def _check_captions(path: Path, names: Iterable[str], found: Captioned, what: str) -> None:
    """Refuses images without a caption: they would be left out, or never be found."""
    without = [name for name in names if not found.get(name)]
    if without:
        raise ValueError(f"{path}: {len(without)} {what} have no caption, the first is {without[0]}.")


def _gather(path: Path, rows: Iterable[Any], read: Callable[[Any], tuple[Any, list[Any]]]) -> Captioned:
    found: Captioned = {}
    for number, row in enumerate(rows, start=1):
        place = f"{path}: row {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{place} is no JSON object.")
        name, captions = read(row)
        if not captions:
            raise ValueError(f"{place} has no caption; it needs one of {', '.join(CAPTION_COLUMNS)}.")
        for text in captions:
            _add(found, name, text, place)
    return found


def _of_row(row: dict[str, Any]) -> tuple[Any, list[Any]]:
    name = next((row[column] for column in NAME_COLUMNS if row.get(column)), None)
    captions: Any = next((row[column] for column in CAPTION_COLUMNS if row.get(column)), [])
    return name, captions if isinstance(captions, list) else [captions]


def _of_karpathy_row(row: dict[str, Any]) -> tuple[Any, list[Any]]:
    name = row.get("filename") or row.get("file_name")
    folder = row.get("filepath")
    sentences = row.get("sentences") or []
    sentences = sentences if isinstance(sentences, list) else [sentences]
    texts = [sentence.get("raw") if isinstance(sentence, dict) else sentence for sentence in sentences]
    return f"{folder}/{name}" if folder and name else name, texts


def _read_table(path: Path) -> Captioned:
    text = path.read_text(encoding="utf-8-sig")
    lines = text.split("\n")  # other ends of lines belong to captions
    try:
        separator, header = _header_of(lines[0])
    except csv.Error as error:
        raise ValueError(f"{path} is no table: {error} in its first line.") from error
    name_column = _first_known(NAME_COLUMNS, header)
    caption_column = _first_known(CAPTION_COLUMNS, header)
    if name_column is None or caption_column is None:
        raise ValueError(
            f"{path} has the columns {', '.join(header) or 'none'}; its first line needs one of "
            f"{', '.join(NAME_COLUMNS)} and one of {', '.join(CAPTION_COLUMNS)}."
        )
    found: Captioned = {}
    if len(header) == 2:  # captions may hold commas without quotes, as in the files of Flickr30K
        for number, line in enumerate(lines[1:], start=2):
            if line.strip():
                name, _, caption = line.partition(separator)
                if header[0] != name_column:
                    caption, _, name = line.rpartition(separator)
                _add(found, _unquoted(name), _unquoted(caption), f"{path}, line {number}")
        return found
    rows = csv.DictReader(io.StringIO(text, newline=""), header, strict=True, delimiter=separator)
    try:
        for row in islice(rows, 1, None):
            if any(map(str.strip, row.get(None) or ())):
                raise ValueError(
                    f"{path}, line {rows.line_num}: there are more fields than the {len(header)} columns of the first "
                    "line; a caption with a separator in it has to be in quotes."
                )
            _add(found, (row[name_column] or "").strip(), row[caption_column], f"{path}, line {rows.line_num}")
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}.") from error
    return found


def _header_of(line: str) -> tuple[str, list[str]]:
    """The separator of a table, that of `SEPARATORS` which its first line needs, and the names of its columns."""
    headers = [(one, [name.strip() for name in next(csv.reader([line], delimiter=one), [])]) for one in SEPARATORS]
    return next((found for found in headers if _first_known(NAME_COLUMNS, found[1])), headers[0])


def _first_known(names: Sequence[str], header: Sequence[str]) -> str | None:
    return next((name for name in names if name in header), None)


def _unquoted(text: str) -> str:
    """A field without its quotes; a caption that has some at both ends alone keeps them."""
    text = text.strip()
    try:
        fields = next(csv.reader([text], strict=True), []) if text.startswith('"') and text.endswith('"') else []
    except csv.Error:
        fields = []
    return fields[0] if len(fields) == 1 else text


def _add(found: Captioned, name: Any, text: Any, place: str) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"{place} names no image; it needs one of {', '.join(NAME_COLUMNS)}.")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{place} has no caption.")
    found.setdefault(name, []).append(text.strip())


__all__ = ["Captioned", "captioned_items", "read_annotations", "read_parallel"]
