"""Damaged images by every way in."""

import base64
import io
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from internvl.image_processing_internvl import InternVLImageProcessor

from ..fixtures_images import encoded
from .mutations import damaged


SETTINGS = {"size": 16, "max_num": 4, "max_image_pixels": 4_000_000}


def _encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    options |= {"append_images": [image.rotate(90), image.rotate(180)]} if "save_all" in options else {}
    return encoded(image.copy(), file_format, **options)  # saving leaves settings of its format behind


def base_files() -> dict[str, bytes]:
    """A small file of each kind that is decoded, and of some that are not: 25 in all."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    rgb = Image.fromarray(pixels)
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE)
    exif = Image.Exif()
    exif[0x0112] = 6
    more = {"save_all": True}
    return {
        "png": _encoded(rgb, "PNG", exif=exif),
        "png with alpha": _encoded(rgb.convert("RGBA"), "PNG"),
        "png with a palette": _encoded(palette, "PNG", transparency=3),
        "png of 16 bits": _encoded(Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), "PNG", transparency=257),
        "animated png": _encoded(rgb, "PNG", **more),
        "jpeg": _encoded(rgb, "JPEG", exif=exif),
        "progressive jpeg": _encoded(rgb, "JPEG", progressive=True),
        "cmyk jpeg": _encoded(rgb.convert("CMYK"), "JPEG"),
        "mpo": _encoded(rgb, "MPO", **more),
        "webp": _encoded(rgb, "WEBP"),
        "lossless webp": _encoded(rgb.convert("RGBA"), "WEBP", lossless=True),
        "animated webp": _encoded(rgb, "WEBP", **more),
        "gif": _encoded(palette, "GIF"),
        "animated gif": _encoded(rgb, "GIF", **more),
        "bmp": _encoded(rgb, "BMP"),
        "tiff": _encoded(rgb, "TIFF"),
        "tiff with lzw": _encoded(rgb, "TIFF", compression="tiff_lzw", **more),
        "tiff with jpeg": _encoded(rgb, "TIFF", compression="jpeg"),
        "fax": _encoded(rgb.convert("1"), "TIFF", compression="group4"),
        "ppm": _encoded(rgb, "PPM"),
        "avif": _encoded(rgb, "AVIF"),
        "ico": _encoded(rgb, "ICO", sizes=[(16, 16)]),
        "jpeg 2000": _encoded(rgb, "JPEG2000"),
        "eps": _encoded(rgb, "EPS"),
        "psd": b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\x14\0\0\0\x18\0\x08\0\3" + bytes(600),
    }


def _lazily(data: bytes) -> Image.Image | bytes:
    """As a caller opens it; the bytes where Pillow itself cannot."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data))
    except Exception:  # noqa: BLE001 (it is the caller's own call)
        return data


def _doors(folder: Path) -> list[Callable[[bytes], Any]]:
    path = folder / "image"

    def written(data: bytes) -> Path:
        path.write_bytes(data)
        return path

    text = lambda data: base64.b64encode(data).decode()  # noqa: E731
    return [
        written,
        lambda data: str(written(data)),
        lambda data: written(data).as_uri(),
        bytes,
        io.BytesIO,
        text,
        lambda data: f"data:image/png;base64,{text(data)}",
        lambda data: {"bytes": data, "path": None},
        lambda data: {"bytes": None, "path": str(written(data))},
        _lazily,
        lambda data: open(written(data), "rb"),
    ]


def _read(processor: InternVLImageProcessor, source: Any) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = processor(source, return_tensors="np")
    pixels = output["pixel_values"]
    is_valid = (
        pixels.shape[1:] == (3, 16, 16) and len(pixels) == sum(output["num_patches"]) and np.isfinite(pixels).all()
    )
    return None if is_valid else f"gives pixels of shape {pixels.shape}"


def inputs(seed: int, per_file: int) -> Iterator[tuple[str, Callable[[], Any], str]]:
    """Damaged versions of every file, each by the next way in."""
    processor = InternVLImageProcessor(**SETTINGS)
    with tempfile.TemporaryDirectory() as folder:
        doors = _doors(Path(folder))
        for name, whole in base_files().items():
            generator = random.Random(f"{seed}/{name}")
            for number in range(per_file):
                data = damaged(whole, generator, number)
                source = doors[number % len(doors)](data)
                yield f"{name} {number}", partial(_read, processor, source), "Image 1 of 1"


__all__ = ["base_files", "inputs"]
