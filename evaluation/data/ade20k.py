"""The layout of ADE20K: `images/{training,validation}/*.jpg`, `annotations/{training,validation}/*.png`.

An annotation has one class per pixel, from 1 on; 0 is no class. Other data in the same layout is read alike.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch

from ...image_loading_internvl import read_image, read_image_size, to_pil


NUM_CLASSES = 150
NAMES_FILE = "objectInfo150.txt"
FOLDER = "ADEChallengeData2016"  # as the archive has it
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
IGNORED = 255  # of pixels without a class
MAX_PIXELS = 178_956_970


@dataclass(frozen=True)
class SegmentedImage:
    """An image and its annotation.

    Args:
        name: Without folder and suffix.
        image: File of the image.
        annotation: File of its classes.
    """

    name: str
    image: Path
    annotation: Path

    @classmethod
    def at(cls, image: Path) -> "SegmentedImage":
        """Returns the image of a file in the layout, with its annotation."""
        split = image.parent
        return cls(image.stem, image, split.parents[1] / "annotations" / split.name / f"{image.stem}.png")

    def read_pixels(self) -> torch.Tensor:
        """Reads the image, (3, height, width), uint8.

        Raises:
            ValueError: If it cannot be read.
        """
        name = f"The image {self.image}"
        image = to_pil(read_image(self.image, name, MAX_PIXELS), name, MAX_PIXELS, True, None)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def check_annotation(self) -> None:
        """Checks, as far as headers say, that the annotation is an image of the size of its own.

        Raises:
            ValueError: If it is none.
        """
        names = f"The image {self.image}", f"The annotation {self.annotation}"
        files = self.image, self.annotation
        sizes = [read_image_size(file, name, MAX_PIXELS) for file, name in zip(files, names, strict=True)]
        if sorted(sizes[0]) != sorted(sizes[1]):  # the image may lie on its side
            shown = [f"{width} x {height}" for width, height in sizes]
            raise ValueError(f"{names[0]} is {shown[0]} pixels large, and its annotation {shown[1]}.")

    def read_labels(self, num_classes: int) -> torch.Tensor:
        """Reads the class indices (height, width) from 0 on, `IGNORED` where there is no class.

        Raises:
            ValueError: If it cannot be read, or has other values than 0 to `num_classes`.
        """
        name = f"The annotation {self.annotation}"
        image = read_image(self.annotation, name, MAX_PIXELS)
        values = np.array(image)
        if values.ndim != 2:
            raise ValueError(f"{name} needs one number per pixel, a class, but is an image of mode {image.mode}.")
        if values.max(initial=0) > num_classes:
            raise ValueError(f"{name} has class {values.max()}, but there are {num_classes}.")
        return torch.from_numpy(np.where(values == 0, IGNORED, values.astype(np.int64) - 1))


def _folder_of(root: str | Path) -> Path:
    root = Path(root)
    inner = root / FOLDER
    return inner if inner.is_dir() and not (root / "images").is_dir() else root


def segmented_images(root: str | Path, split: str) -> list[SegmentedImage]:
    """Finds the images of a split, "training" or "validation", by name.

    Raises:
        OSError: If a folder or an annotation is missing, or there is no image.
    """
    root = _folder_of(root)
    images, annotations = root / "images" / split, root / "annotations" / split
    for folder in (images, annotations):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is not there: segmentation reads the layout of ADE20K, images/{split}/*.jpg and "
                f"annotations/{split}/*.png."
            )
    found = [SegmentedImage.at(path) for path in sorted(images.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
    if not found:
        raise FileNotFoundError(f"{images} has no images ({', '.join(IMAGE_SUFFIXES)}).")
    there = {path.name for path in annotations.iterdir()}
    missing = [item.annotation for item in found if item.annotation.name not in there]
    if missing:
        raise FileNotFoundError(f"{missing[0]} is not there, and {len(missing) - 1} other annotations are missing.")
    return found


def class_names(root: str | Path) -> list[str]:
    """Returns the names of the classes, from `objectInfo150.txt`; where it is missing there are 150 without a name.

    Raises:
        ValueError: If the file is no such table.
    """
    path = _folder_of(root) / NAMES_FILE
    if not path.is_file():
        return [f"class {number}" for number in range(1, NUM_CLASSES + 1)]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8: {error}.") from error
    rows = [re.split(r"\t+| {2,}", line.strip()) for line in lines if line.strip()]
    if len(rows) < 2 or not all(row[0] == str(number) for number, row in enumerate(rows[1:], start=1)):
        raise ValueError(f"{path} needs a line of titles and then a line for each class: number, ..., name, by tabs.")
    return [row[-1].split(",")[0] for row in rows[1:]]


def random_part(items: Sequence[SegmentedImage], fraction: float, seed: int = 0) -> list[SegmentedImage]:
    """Draws a share of the images, for few-shot training; the order stays.

    Raises:
        ValueError: If the share is not above 0 and at most 1, or is no whole image.
    """
    number = int(len(items) * fraction) if 0 < fraction <= 1 else 0
    if not number:
        raise ValueError(f"`fraction` {fraction:g} of {len(items)} images is none: give one in (0, 1] that is.")
    chosen = Random(seed).sample(range(len(items)), number)
    return [items[index] for index in sorted(chosen)]


__all__ = ["SegmentedImage", "class_names", "random_part", "segmented_images"]
