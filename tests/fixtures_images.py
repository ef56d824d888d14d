"""Images to read, and what the image processor makes of them, for several test files."""

import base64
import io
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from internvl.image_processing_internvl import InternVLImageProcessor


TILE = 16  # a small tile keeps the tests that look at no golden fast


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def data_address(file: bytes | Path) -> str:
    data = file.read_bytes() if isinstance(file, Path) else file
    return "data:image/png;base64," + base64.b64encode(data).decode()


def bytes_of_tiles(processor: InternVLImageProcessor, image, **settings) -> np.ndarray:
    """(T, H, W, C) uint8: the pixels before scaling and normalisation."""
    output = processor(image, do_rescale=False, do_normalize=False, return_tensors="np", **settings)
    return output["pixel_values"].astype(np.uint8).transpose(0, 2, 3, 1)


def one_tile(image, **settings) -> np.ndarray:
    """(H, W, C) uint8 of an image as it is."""
    (tile,) = bytes_of_tiles(InternVLImageProcessor(do_resize=False), image, **settings)
    return tile


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def png_file(width: int, height: int, bits: int, colour: int, rows: bytes, before: bytes = b"") -> bytes:
    """A PNG file of these rows, each with its filter byte; `before` are chunks ahead of them."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, colour, 0, 0, 0])
    body = png_chunk(b"IDAT", zlib.compress(rows, 9)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + before + body


def bomb() -> bytes:
    """A PNG of about 4 KB whose header announces 60000 x 60000 pixels."""
    return png_file(60000, 60000, 8, 2, bytes(4_000_000))
