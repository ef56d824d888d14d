"""Textured images, each unlike the others: noise, gradients, and mixtures of turned crops of photographs; and what
becomes of them where images are copied.
"""

import io
from functools import cache

import numpy as np
from PIL import Image


CHANGES = ("jpeg", "resize", "crop", "flip")


@cache
def photographs() -> list[Image.Image]:
    """The sample images of scikit-learn."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(image) for image in load_sample_images().images]


def _noise(rng: np.random.Generator, side: int) -> np.ndarray:
    """Independent pixels, or smooth spots with some noise over them."""
    if rng.random() < 0.5:
        return np.clip(rng.normal(128, 50, (side, side, 3)), 0, 255)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
    return np.clip(smooth + rng.normal(0, 20, (side, side, 3)), 0, 255)


def _gradient(rng: np.random.Generator, side: int) -> np.ndarray:
    """A sum of a few long waves of colour."""
    y, x = np.mgrid[0:side, 0:side] / side
    values = np.zeros((side, side, 3))
    for _ in range(rng.integers(2, 5)):
        angle, waves, phase = rng.uniform(0, 2 * np.pi), rng.uniform(0.25, 1.25), rng.uniform(0, 2 * np.pi)
        wave = np.sin(2 * np.pi * waves * (x * np.cos(angle) + y * np.sin(angle)) + phase)
        values += wave[..., None] * rng.uniform(-1, 1, 3)
    values -= values.min()
    return 255 * values / max(values.max(), 1e-6)


def _turned_crop(rng: np.random.Generator, side: int) -> np.ndarray:
    """A part of a photograph, turned, with its channels in any order."""
    image = photographs()[rng.integers(len(photographs()))]
    half = int(rng.integers(35, 100))
    reach = int(1.5 * half)
    x, y = int(rng.integers(reach, image.width - reach)), int(rng.integers(reach, image.height - reach))
    around = image.crop((x - reach, y - reach, x + reach, y + reach))
    turned = around.rotate(rng.uniform(0, 360), Image.Resampling.BICUBIC)
    box = (reach - half, reach - half, reach + half, reach + half)
    crop = turned.crop(box).resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(crop).astype(float)[..., rng.permutation(3)]


def _mixture(rng: np.random.Generator, side: int) -> np.ndarray:
    """Two of these over each other."""
    weight = rng.uniform(0.4, 0.6)
    return weight * _turned_crop(rng, side) + (1 - weight) * _turned_crop(rng, side)


def texture(seed: int) -> Image.Image:
    """An image of one of the three kinds, in turn; the same seed gives the same image."""
    rng = np.random.default_rng(seed)
    side = int(rng.integers(64, 128))
    return Image.fromarray((_noise, _gradient, _mixture)[seed % 3](rng, side).astype(np.uint8))


def as_jpeg(image: Image.Image, quality: int) -> bytes:
    """The image as a JPEG file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def as_png(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def changed(image: Image.Image, seed: int) -> tuple[str, bytes]:
    """A near duplicate, by one of `CHANGES`: JPEG of quality 40 to 95, half to twice the size, cropped by a tenth of
    each side at most, or mirrored."""
    rng = np.random.default_rng([seed, 1])
    kind = CHANGES[rng.integers(4)]
    if kind == "jpeg":
        return kind, as_jpeg(image, int(rng.integers(40, 95)))
    if kind == "resize":
        scale = rng.uniform(0.5, 2)
        size = (int(image.width * scale), int(image.height * scale))
        return kind, as_png(image.resize(size, Image.Resampling.BICUBIC))
    if kind == "flip":
        return kind, as_png(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    (width, height), (cut_x, cut_y) = image.size, rng.uniform(0, 0.1, 2)
    left, top = rng.uniform(0, cut_x), rng.uniform(0, cut_y)
    box = (left * width, top * height, (1 - cut_x + left) * width, (1 - cut_y + top) * height)
    return kind, as_png(image.crop(tuple(round(edge) for edge in box)))
