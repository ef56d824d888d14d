"""Images with classes per pixel, cropped and distorted at random as the published code does (mmsegmentation)."""

from collections.abc import Sequence
from functools import lru_cache
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from ...evaluation.data.ade20k import IGNORED, SegmentedImage
from ...evaluation.sliding_window import resize_pixels, scaled_size


SCALES = (0.5, 2.0)  # of the crop's side, to which the short side of an image is resized
LONGEST = 4  # times that, of the long side
LARGEST_SHARE = 0.75  # of a crop that one class should have
CROP_TRIALS = 10
BRIGHTNESS, CONTRAST, SATURATION = 32.0, (0.5, 1.5), (0.5, 1.5)
HUE = 18 / 180 * 256  # of PIL's circle of 256


def _between(low: float, high: float, rng: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=rng))


def _is_heads(rng: torch.Generator) -> bool:
    return bool(torch.rand((), generator=rng) < 0.5)


def resize_randomly(
    pixels: torch.Tensor, labels: torch.Tensor, side: int, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Resizes an image (3, height, width) and its labels (height, width), keeping their shape."""
    ratio = _between(*SCALES, rng)
    height, width = labels.shape
    height, width = scaled_size(height, width, int(side * ratio), int(LONGEST * side * ratio))
    nearest = F.interpolate(labels[None, None].float(), size=(height, width), mode="nearest")[0, 0]
    return resize_pixels(pixels, height, width), nearest.long()


def crop_randomly(
    pixels: torch.Tensor, labels: torch.Tensor, side: int, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops to at most `side` pixels, and tries to find a crop of which no class has more than three quarters."""
    height, width = labels.shape
    for _ in range(CROP_TRIALS):
        top, left = (int(torch.randint(max(x - side, 0) + 1, (), generator=rng)) for x in (height, width))
        place = (slice(top, top + side), slice(left, left + side))
        areas = torch.bincount(labels[place][labels[place] != IGNORED])
        if (areas > 0).sum() > 1 and areas.max() < LARGEST_SHARE * areas.sum():
            break
    return pixels[:, place[0], place[1]], labels[place]


def distort(pixels: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Changes brightness, contrast, saturation and hue of (3, height, width) in 0..255, each half of the time."""
    if _is_heads(rng):
        pixels = (pixels + _between(-BRIGHTNESS, BRIGHTNESS, rng)).clamp(0, 255)
    contrast_first = _is_heads(rng)
    contrast = _between(*CONTRAST, rng) if _is_heads(rng) else 1.0
    if contrast_first:
        pixels = (pixels * contrast).clamp(0, 255)
    saturation = _between(*SATURATION, rng) if _is_heads(rng) else 1.0
    hue = _between(-HUE, HUE, rng) if _is_heads(rng) else 0.0
    if saturation != 1 or hue:
        image = Image.fromarray(pixels.permute(1, 2, 0).to(torch.uint8).numpy()).convert("HSV")
        values = np.array(image).astype(np.float32)
        values[..., 0] = np.mod(values[..., 0] + round(hue), 256)
        values[..., 1] = np.clip(values[..., 1] * saturation, 0, 255)
        image = Image.fromarray(values.astype(np.uint8), "HSV").convert("RGB")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    return pixels if contrast_first else (pixels * contrast).clamp(0, 255)


class SegmentationCrops(Dataset):
    """The random crops of a run, in their order: pass after pass over the images, each in an order of its own.

    Each is drawn by its number alone, so that a resumed run goes on with the same crops.

    Args:
        items: The images.
        number: Of crops in all.
        num_classes: Number of classes.
        side: Side of the crops in pixels; what an image lacks is padded with mean colour and no class.
        mean: Of the colours, 0 to 1.
        deviation: Of the colours.
        seed: Decides all.
    """

    def __init__(
        self,
        items: Sequence[SegmentedImage],
        number: int,
        num_classes: int,
        side: int,
        mean: Sequence[float],
        deviation: Sequence[float],
        seed: int = 0,
    ) -> None:
        self.items = list(items)
        self.number = number
        self.num_classes = num_classes
        self.side = side
        self.mean, self.deviation = (torch.tensor(values).view(3, 1, 1) for values in (mean, deviation))
        self.seed = seed

    def __len__(self) -> int:
        return self.number

    def item_of(self, index: int) -> SegmentedImage:
        """Returns the image of a crop."""
        number, place = divmod(index, len(self.items))
        return self.items[_order(len(self.items), self.seed, number)[place]]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`pixel_values` (3, side, side) and `labels` (side, side)."""
        item, rng = self.item_of(index), torch.Generator().manual_seed((self.seed << 32) + index)
        pixels, labels = item.read_pixels(), item.read_labels(self.num_classes)
        if pixels.shape[-2:] != labels.shape:
            raise ValueError(f"The image {item.image} and its annotation differ in size.")
        pixels, labels = crop_randomly(*resize_randomly(pixels, labels, self.side, rng), self.side, rng)
        if _is_heads(rng):
            pixels, labels = pixels.flip(-1), labels.flip(-1)
        values = (distort(pixels, rng) / 255 - self.mean) / self.deviation
        padding = (0, self.side - labels.shape[1], 0, self.side - labels.shape[0])
        return {"pixel_values": F.pad(values, padding), "labels": F.pad(labels, padding, value=IGNORED)}


@lru_cache(maxsize=2)
def _order(length: int, seed: int, number: int) -> list[int]:
    """The order of the images in a pass over them."""
    return Random(f"segmentation/{seed}/{number}").sample(range(length), length)


__all__ = ["SegmentationCrops"]
