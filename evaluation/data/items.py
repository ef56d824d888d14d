"""Images and videos with their classes or captions, unread; and the checks that come before a model is loaded."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TypeVar, cast

from PIL import Image
from tqdm import tqdm

from ...image_loading_internvl import read_image, read_image_size
from ...image_processing_internvl import InternVLImageProcessor
from ...rows.videos import check_video, read_frames


IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
VIDEO_ENDINGS = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".flv", ".m4v", ".mpg", ".mpeg")
# What JPEG and PNG files begin and end with: those that were cut off, by a full disk or a stopped download, are met
# before hours of work, and without decoding all of them.
ENDS_BY_START = {b"\xff\xd8": b"\xff\xd9", b"\x89PNG": b"IEND"}
LENGTH_OF_TAIL = 4096


Taken = TypeVar("Taken")


@dataclass(frozen=True)
class Item:
    """An image or a video of a data set.

    Args:
        name: Of it in the data, and the id of its results.
        source: File, or the content of one.
        labels: Indices of the classes that are right; most data have one.
        captions: Texts that describe it.
    """

    name: str
    source: Path | bytes
    labels: tuple[int, ...] = ()
    captions: tuple[str, ...] = ()

    @property
    def is_video(self) -> bool:
        """Whether frames are to be read."""
        name = self.source.name if isinstance(self.source, Path) else self.name
        return name.lower().endswith(VIDEO_ENDINGS)

    def read(self, num_frames: int = 1) -> list[Image.Image]:
        """Reads the image, or so many frames of the video, the middle ones of as many intervals.

        Raises:
            ValueError: If it cannot be read.
        """
        if self.is_video:
            source = self.source if isinstance(self.source, bytes) else str(self.source)
            return read_frames(source, self.name, num_frames)
        image = read_image(self.source, self.name, InternVLImageProcessor.max_image_pixels)
        return [cast(Image.Image, image)]  # as files and their contents give it


@dataclass(frozen=True)
class EvaluationData:
    """What a task is measured on.

    Args:
        items: Images or videos.
        classes: Names of the classes that labels count.
        place: Where it lies, for messages and reports.
        templates: Of prompts, if the data bring their own; `{c}` stands for the class.
        training: What a probe is trained on.
        candidates: The classes that may be answers; empty for all.
    """

    items: Sequence[Item]
    place: str
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = field(default=())
    training: Sequence[Item] = ()
    candidates: tuple[int, ...] = ()


def check_items(items: Sequence[Item], place: str) -> None:
    """Check that items can be read, as far as that is seen without decoding them.

    Raises:
        ValueError: If there are none, a file is missing or no image, or two have one name.
    """
    if not items:
        raise ValueError(f"{place} holds no images: nothing can be measured.")
    names: set[str] = set()
    limit = InternVLImageProcessor.max_image_pixels
    for item in tqdm(items, desc="checking images", leave=False, disable=None, delay=1):
        if item.name in names:
            raise ValueError(f"{place} has {item.name} twice.")
        names.add(item.name)
        if isinstance(item.source, Path) and not item.source.is_file():
            raise ValueError(f"{place} names {item.name}, but there is no file {item.source}.")
        if item.is_video:
            check_video(item.source if isinstance(item.source, bytes) else str(item.source), item.name)
            continue
        read_image_size(item.source, item.name, limit)
        if _seems_cut_off(item.source):
            item.read()


def _seems_cut_off(source: Path | bytes) -> bool:
    """Whether a JPEG or PNG has no end near its own. One with other data behind it seems so, too."""
    with source.open("rb") if isinstance(source, Path) else BytesIO(source) as file:
        start = file.read(max(map(len, ENDS_BY_START)))
        end = next((end for known, end in ENDS_BY_START.items() if start.startswith(known)), b"")
        file.seek(-min(file.seek(0, 2), LENGTH_OF_TAIL), 2)
        return end not in file.read()


def taken(items: Iterable[Taken], limit: int | None) -> list[Taken]:
    """The items, or `limit` of them spread evenly over all, so that every class or part keeps its share."""
    found = list(items)
    if limit is None or limit >= len(found):
        return found
    return [found[place * len(found) // limit] for place in range(limit)]


__all__ = ["IMAGE_ENDINGS", "VIDEO_ENDINGS", "EvaluationData", "Item", "check_items", "taken"]
