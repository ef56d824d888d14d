"""Random crops, mirroring and JPEG artefacts of training images, with PIL alone.

What is drawn for an image depends on the seed, the epoch and the name of the sample, and on nothing else: not on the
number of processes and workers, not on what a resumed run has skipped.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from random import Random
from typing import Any

from PIL import Image, ImageOps


# Of a crop's width over its height, and how often one that lies in the image is looked for: as in torchvision's
# `RandomResizedCrop`, which the published code uses.
ASPECT_RATIOS = (3 / 4, 4 / 3)
TRIES = 10


def sample_random(purpose: str, seed: int, pair: Mapping[str, Any]) -> Random:
    """Random numbers of one sample in one epoch.

    Args:
        purpose: What they are for; other purposes get other numbers.
        seed: Of the run.
        pair: As from `PairStream`: `epoch`, `shard` and `key` say which sample it is.
    """
    return Random(f"{purpose}/{seed}/{pair.get('epoch', 0)}/{pair.get('shard', '')}/{pair.get('key', '')}")


def random_crop_box(width: int, height: int, scale: tuple[float, float], random: Random) -> tuple[int, int, int, int]:
    """Left, upper, right and lower edge of a random crop.

    Args:
        width: Of the image.
        height: Of the image.
        scale: Least and most area, as shares of the image's.
        random: Random numbers.

    Returns:
        The box; where no crop of the drawn shapes lies in the image, the largest one in its centre with an allowed
        aspect ratio.
    """
    least, most = ASPECT_RATIOS
    for _ in range(TRIES):
        area = width * height * random.uniform(*scale)
        ratio = math.exp(random.uniform(math.log(least), math.log(most)))
        columns, rows = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < columns <= width and 0 < rows <= height:
            left, upper = random.randint(0, width - columns), random.randint(0, height - rows)
            return left, upper, left + columns, upper + rows
    columns, rows = min(width, max(1, round(height * most))), min(height, max(1, round(width / least)))
    left, upper = (width - columns) // 2, (height - rows) // 2
    return left, upper, left + columns, upper + rows


@dataclass(frozen=True)
class Augmentation:
    """Crops and mirrors the images of pairs at random.

    Args:
        crop_scale: Least and most area of a crop, as shares of the image's; None takes whole images.
        flip_rate: Share of the images that are mirrored.
        seed: Decides what is drawn, together with the sample and its epoch.
        jpeg_quality: Lowest and highest quality of JPEG that images are stored in and read again; None leaves that
            out.
    """

    crop_scale: tuple[float, float] | None = None
    flip_rate: float = 0.0
    seed: int = 0
    jpeg_quality: tuple[int, int] | None = None

    def __call__(self, pair: Mapping[str, Any]) -> Image.Image:
        """Return the image of a pair, augmented unless it is held out; a crop is resized like any image."""
        image: Image.Image = pair["image"]
        if pair.get("is_held_out"):
            return image
        random = sample_random("augmentation", self.seed, pair)
        if self.crop_scale is not None:
            image = image.crop(random_crop_box(*image.size, self.crop_scale, random))
        if self.flip_rate and random.random() < self.flip_rate:
            image = ImageOps.mirror(image)
        if self.jpeg_quality is not None:
            file = BytesIO()
            image.convert("RGB").save(file, "JPEG", quality=random.randint(*self.jpeg_quality))
            image = Image.open(file)
            image.load()
        return image
