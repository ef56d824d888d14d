"""Segmentation of an image of any size by a window that slides over it, as the published code tests (mmsegmentation).

The image is resized to a short side of one window, keeping its shape, and its other side to whole patches; scores of
overlapping windows are averaged, resized to the image and compared.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


CLASSES_AT_A_TIME = 16  # of scores at the size of the image


@dataclass(frozen=True)
class SlidingWindow:
    """How the window slides.

    Args:
        size: Its side in pixels.
        stride: Pixels from one window to the next; 504 and 322 are published.
        multiple: Both sides of the resized image are multiples of it: the patch size.

    Raises:
        ValueError: If the sizes do not fit.
    """

    size: int = 504
    stride: int = 322
    multiple: int = 14

    def __post_init__(self) -> None:
        if self.size % self.multiple or not 0 < self.stride <= self.size:
            raise ValueError(
                f"A window of {self.size} pixels with stride {self.stride} must hold whole patches of {self.multiple} "
                "pixels, and its stride may not be longer than it is."
            )

    def starts(self, length: int) -> list[int]:
        """Where windows begin on a side: `stride` apart, the last one at the end."""
        number = max(length - self.size + self.stride - 1, 0) // self.stride + 1
        return [max(min(index * self.stride, length - self.size), 0) for index in range(number)]


def resize_pixels(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resizes (channels, height, width) bilinearly without antialias and rounds, as the published code's OpenCV."""
    resized = F.interpolate(pixels[None].float(), size=(height, width), mode="bilinear", align_corners=False)
    return resized[0].round()


def scaled_size(height: int, width: int, short: float, long: float) -> tuple[int, int]:
    """The largest size of the same shape whose sides are at most `short` and `long` (mmcv's `imrescale`)."""
    scale = min(long / max(height, width), short / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def fit_to_window(pixels: torch.Tensor, window: SlidingWindow) -> torch.Tensor:
    """Resizes an image (3, height, width) so that its short side is that of the window, in two steps as published."""
    height, width = pixels.shape[-2:]
    long = window.size * max(height, width) / min(height, width)
    pixels = resize_pixels(pixels, *scaled_size(height, width, window.size, long))
    sides = [-(-side // window.multiple) * window.multiple for side in pixels.shape[-2:]]
    return resize_pixels(pixels, sides[0], sides[1])


@torch.inference_mode()
def window_scores(model: Any, pixel_values: torch.Tensor, window: SlidingWindow, batch_size: int = 8) -> torch.Tensor:
    """Averages the scores of a segmentation model over the windows of one image.

    Args:
        model: Returns `logits` (B, classes, any height, any width) for (B, 3, height, width).
        pixel_values: (3, height, width), normalised, of the model's type and device.
        window: The window.
        batch_size: Windows at a time.

    Returns:
        Scores (classes, height, width).
    """
    height, width = pixel_values.shape[-2:]
    size = window.size
    places = [(top, left) for top in window.starts(height) for left in window.starts(width)]
    total = times = pixel_values.new_zeros(height, width, dtype=torch.float32)
    for start in range(0, len(places), batch_size):
        part = places[start : start + batch_size]
        crops = torch.stack([pixel_values[:, top : top + size, left : left + size] for top, left in part])
        logits = model(pixel_values=crops).logits.float()
        scores = F.interpolate(logits, size=crops.shape[-2:], mode="bilinear", align_corners=False)
        if start == 0:
            total = scores.new_zeros(scores.shape[1], height, width)
        for (top, left), found in zip(part, scores, strict=True):
            total[:, top : top + size, left : left + size] += found
            times[top : top + size, left : left + size] += 1
    return total / times


def best_classes(scores: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Returns the class of every pixel (height, width) of an image from scores of another size.

    As many scores as the image has pixels fit no memory for large images and many classes, so that they are compared a
    few classes at a time.
    """
    best = scores.new_full((height, width), -torch.inf)
    found = torch.zeros(height, width, dtype=torch.long, device=scores.device)
    for start in range(0, len(scores), CLASSES_AT_A_TIME):
        part = scores[None, start : start + CLASSES_AT_A_TIME]
        resized = F.interpolate(part, size=(height, width), mode="bilinear", align_corners=False)[0]
        value, index = resized.max(dim=0)
        found = torch.where(value > best, index + start, found)
        best = torch.maximum(best, value)
    return found


__all__ = ["SlidingWindow", "best_classes", "fit_to_window", "resize_pixels", "scaled_size", "window_scores"]
