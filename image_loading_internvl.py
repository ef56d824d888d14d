# Copyright 2026 The InternVL package authors
"""Reads images from files, bytes, URLs, arrays and tensors into 8-bit PIL images, safely.

Every failure is a ValueError that names the image and describes what it is. `image_decoding_internvl.py` decides which
files are decoded, `image_download_internvl.py` which URLs are fetched. Transparent images are composited over a
background colour.

Whether paths and `file:` URLs are read is decided in `local_files_are_read`, for every function and class above.
"""

import base64
import binascii
import os
import re
import stat
from collections.abc import Callable, Mapping
from errno import EINVAL, ENAMETOOLONG
from io import BytesIO, TextIOBase
from typing import Any, BinaryIO
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
import torch
from PIL import Image, ImageColor
from transformers.image_utils import ChannelDimension

from .image_decoding_internvl import (
    check_image_size,
    decode_image,
    decoding,
    is_readable,
    load_image,
    name_content,
    open_image,
)
from .image_download_internvl import download


# About the size of an uncompressed 16-bit RGB image with the default `max_image_pixels`.
MOST_FILE_BYTES = 2**30
# How far floating-point values may leave [0, 1] through rounding errors of resizing and normalising: less than half of
# an 8-bit step.
FLOAT_TOLERANCE = 1e-3
DEFAULT_BACKGROUND = "white"
NO_BACKGROUND = "none"
MOST_NESTING = 32
# Set to 0, no code of this process reads a local file as an image: for servers that load the processor themselves.
LOCAL_FILES = "INTERNVL_ALLOW_LOCAL_FILES"
SCHEME = re.compile(r"[a-z][a-z0-9+.-]+(?=:)", re.IGNORECASE)
KINDS_OF_FILE: list[tuple[Callable[[int], bool], str]] = [
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
]

ImageSource = (
    str
    | os.PathLike
    | bytes
    | bytearray
    | memoryview
    | BinaryIO
    | Mapping[str, Any]
    | Image.Image
    | np.ndarray
    | torch.Tensor
)
Fetch = Callable[[str, str], bytes]
NestedImages = ImageSource | list[Any] | tuple[Any, ...]
Background = str | tuple[int, int, int] | list[int]


# ---------------------------------------------------------------------------------------------------- sources
def local_files_are_read(*settings: bool) -> bool:
    """Whether paths and `file:` URLs are read: every setting given and the environment must allow it."""
    return all(settings) and os.environ.get(LOCAL_FILES) in (None, "", "1")


def _check_is_file(mode: int, name: str) -> None:
    """Raises a ValueError unless it is a regular file; opening a pipe would wait for a writer."""
    if not stat.S_ISREG(mode):
        what = next((what for is_kind, what in KINDS_OF_FILE if is_kind(mode)), "no regular file")
        raise ValueError(f"{name} is {what}. Give an image file, or the bytes of one.")


def _status(path: str | os.PathLike, name: str) -> os.stat_result | None:
    """Returns the status of a path, None if it does not exist."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that no file can have
        return None
    except OSError as error:
        if error.errno in (ENAMETOOLONG, EINVAL):
            return None
        raise ValueError(f"{name} cannot be opened ({error.strerror}).") from error


def _open_file(path: str | os.PathLike, name: str) -> BinaryIO:
    """Opens a regular file that is neither empty nor larger than an image may be."""
    status = _status(path, name)
    if status is None:
        raise ValueError(f"{name} does not exist: there is no such file.")
    _check_is_file(status.st_mode, name)
    if status.st_size == 0:
        raise ValueError(f"{name} is empty.")
    if status.st_size > MOST_FILE_BYTES:
        raise ValueError(f"{name} has {status.st_size} bytes, more than the {MOST_FILE_BYTES} that are read.")
    try:
        return open(path, "rb")
    except OSError as error:
        raise ValueError(f"{name} cannot be opened ({error.strerror}).") from error


def _path_of_file_address(address: str) -> str:
    """Returns the path of a `file:` URL of this machine."""
    parts = urlsplit(address)
    if parts.netloc.lower() not in ("", "localhost"):
        raise ValueError(f"it lies on the host `{parts.netloc}`, and only files of this machine are read")
    return url2pathname(parts.path)


def _decode_base64(text: str, name: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name} is damaged base64 text ({error}).") from error


def _is_base64_of_a_file(text: str) -> bool:
    """Whether a text starts like the base64 text of an image, or of another file known by its first bytes."""
    start = "".join(text[:2000].split())[:1000]
    try:
        decoded = base64.b64decode(start[: len(start) // 4 * 4], validate=True)
    except (binascii.Error, ValueError):
        return False
    return is_readable(decoded) or name_content(decoded) not in (None, "text")


def _read_data_address(address: str, name: str) -> bytes:
    """Decodes a `data:` URL."""
    head, comma, body = address.partition(",")
    if not comma:
        raise ValueError(f"{name} is a data address without data: there is no comma in it.")
    try:
        data = unquote_to_bytes(body)
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is no data address: it holds half of a surrogate pair.") from error
    return _decode_base64(data.decode("latin-1"), name) if head.lower().endswith(";base64") else data


def _read_text(text: str, name: str, allow_local_files: bool, fetch: Fetch | None) -> bytes | BinaryIO:
    """Opens or decodes what a URL, a path or a base64 text refers to."""
    found = SCHEME.match(text)
    scheme = found[0].lower() if found else ""
    if scheme in ("http", "https"):
        return (fetch or download)(text, name)
    if scheme == "data":
        return _read_data_address(text, name)
    if scheme == "file" and allow_local_files:
        try:
            text = _path_of_file_address(text)
        except (ValueError, OSError) as error:
            raise ValueError(f"{name} is no file that is read here: {error}.") from error
    elif scheme and scheme != "file" and text[len(scheme) :].startswith("://"):
        raise ValueError(f"{name} is a `{scheme}` address; http, https, file and data are read. Download it first.")
    elif _is_base64_of_a_file(text) and not (allow_local_files and _status(text, name)):
        return _decode_base64(text, name)
    if not allow_local_files:
        raise ValueError(
            f"{name} is refused: local files are not read here. Give an address, or base64 text of an image."
        )
    if scheme != "file" and not _status(text, name):
        raise ValueError(
            f"{name} does not exist: there is no such file. It is no http(s) address and no base64 text of an image "
            "either."
        )
    return _open_file(text, name)


def _read_row(row: Mapping[str, Any], name: str) -> Any:
    """Returns the bytes of a file in a row of `datasets`, or its path if there are no bytes."""
    given = {key: value for key, value in row.items() if value is not None}
    source = given.get("bytes", given.get("path"))
    if row.keys() - {"bytes", "path"} or source is None:
        raise ValueError(
            f"{name} is a dictionary; it must hold `bytes` or a `path` and nothing else, it holds {list(given)}."
        )
    is_valid = isinstance(source, (bytes, bytearray, memoryview)) == ("bytes" in given)
    if not is_valid or not isinstance(source, (bytes, bytearray, memoryview, str, os.PathLike)):
        raise ValueError(f"{name} is a dictionary that holds {type(source).__name__} where bytes or a path belong.")
    return source


def _check_is_open(handle: Any, name: str) -> None:
    """Raises a ValueError for files that are closed, opened as text or not regular files."""
    if getattr(handle, "closed", False) is True:
        raise ValueError(f"{name} is a closed file. Open it again.")
    if isinstance(handle, TextIOBase):
        raise ValueError(f"{name} is a file that was opened as text: open it with mode 'rb'.")
    try:
        descriptor = handle.fileno()
    except (AttributeError, OSError, ValueError):  # in memory, or closed
        descriptor = None
    if isinstance(descriptor, int):
        _check_is_file(os.fstat(descriptor).st_mode, name)


def _read_file_object(handle: Any, name: str) -> bytes:
    """Reads a file object from its position on, and restores the position; the file stays open."""
    _check_is_open(handle, name)
    with decoding(name, "Give a file that is open for reading."):
        is_seekable = handle.seekable() if hasattr(handle, "seekable") else False
        position = handle.tell() if is_seekable else 0
        content = bytearray()
        while len(content) <= MOST_FILE_BYTES:
            chunk = handle.read(2**20)
            if not isinstance(chunk, (bytes, bytearray, memoryview)):
                raise ValueError(f"`read` gives {type(chunk).__name__} in place of bytes")
            if not chunk:
                break
            content += chunk
        if is_seekable:
            handle.seek(position)
    if len(content) > MOST_FILE_BYTES:
        raise ValueError(f"{name} has more than the {MOST_FILE_BYTES} bytes that are read.")
    if not content and position:
        raise ValueError(f"{name} is a file at its end: nothing is left to read. Call `seek(0)` first.")
    return bytes(content)


def _find(source: Any, name: str, allow_local_files: bool, fetch: Fetch | None = None) -> bytes | BinaryIO:
    """Returns the bytes of a source, or its opened file."""
    allow_local_files = local_files_are_read(allow_local_files)
    if isinstance(source, Mapping):
        source = _read_row(source, name)
    if isinstance(source, str):
        return _read_text(source, name, allow_local_files, fetch)
    if isinstance(source, os.PathLike):
        if not allow_local_files:
            raise ValueError(f"{name} is refused: local files are not read here.")
        return _open_file(source, name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if hasattr(source, "read"):
        return _read_file_object(source, name)
    raise ValueError(
        f"{name} must be a PIL image, an array, a tensor, a path, an address, base64 text, bytes, an open file or "
        f"a dictionary of `bytes` and `path`, got {type(source).__name__}."
    )


def read_image(
    source: ImageSource, name: str, max_image_pixels: int, allow_local_files: bool = True, fetch: Fetch | None = None
) -> Image.Image | np.ndarray | torch.Tensor:
    """Decodes a file in any form; PIL images, arrays and tensors pass through.

    Args:
        source: A path, URL (http, https, file or data), base64 text, bytes, open binary file, dictionary of `bytes`
            and `path` (a row of `datasets`), or an image that passes through.
        name: Name of the image in errors.
        max_image_pixels: Largest width times height that is decoded.
        allow_local_files: Whether paths and `file:` URLs are read, if the environment allows it.
        fetch: Gets an http(s) URL and the name, and returns the bytes; `download` by default.

    Raises:
        ValueError: If it cannot be read; the message describes what it is.
    """
    if isinstance(source, (Image.Image, np.ndarray, torch.Tensor)):
        return source
    found = _find(source, name, allow_local_files, fetch)
    with BytesIO(found) if isinstance(found, bytes) else found as handle:
        return decode_image(handle, name, max_image_pixels)


def read_image_size(
    source: ImageSource, name: str, max_image_pixels: int, allow_local_files: bool = True
) -> tuple[int, int]:
    """Reads (width, height) from the header of a file without decoding it; see `read_image`."""
    if isinstance(source, Image.Image):
        return source.size
    found = _find(source, name, allow_local_files)
    with BytesIO(found) if isinstance(found, bytes) else found as handle:
        return open_image(handle, name, max_image_pixels).size


# ---------------------------------------------------------------------------------------------------- nesting
def flatten_images(images: NestedImages, depth: int = 0) -> list[ImageSource]:
    """Flattens nested lists and 4-dimensional batches into one list of images."""
    if isinstance(images, (list, tuple)):
        if depth > MOST_NESTING:
            raise ValueError(
                f"The images lie in more than {MOST_NESTING} lists of lists. Give them in one list, or one per sample."
            )
        return [image for group in images for image in flatten_images(group, depth + 1)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


def group_images(images: NestedImages | None) -> tuple[list[list[ImageSource]], bool]:
    """Groups nested images by sample. Returns one group and False if they are not nested."""
    if images is None:
        return [[]], False
    if isinstance(images, (list, tuple)) and any(
        group is None or isinstance(group, (list, tuple)) for group in images
    ):
        return [flatten_images(group or []) for group in images], True
    return [flatten_images(images)], False


def name_images(sources: list[ImageSource]) -> list[str]:
    """Names each image for error messages: its position and, if known, its path or URL."""
    names = []
    for index, source in enumerate(sources):
        origin = source.get("path") if isinstance(source, Mapping) else getattr(source, "filename", source)
        origin = os.fsdecode(origin) if isinstance(origin, (str, os.PathLike)) else ""
        origin = origin[:201].encode("utf-8", "backslashreplace").decode()  # some file names are not UTF-8
        # Control characters would move the cursor or start a new line in a log.
        origin = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in origin)
        shown = f" ({origin if len(origin) <= 200 else origin[:60] + '...'})" if origin else ""
        names.append(f"Image {index + 1} of {len(sources)}{shown}")
    return names


def read_nested_images(
    images: NestedImages, max_image_pixels: int, allow_local_files: bool = True, fetch: Fetch | None = None
) -> NestedImages:
    """Applies `read_image` to nested images; batches become lists, grey arrays get a channel axis."""
    names = iter(name_images(flatten_images(images)))

    def read(part: NestedImages) -> NestedImages:
        if isinstance(part, (list, tuple)):
            return [read(item) for item in part]
        if isinstance(part, (np.ndarray, torch.Tensor)) and part.ndim == 4:
            return [read(item) for item in part]
        image = read_image(part, next(names), max_image_pixels, allow_local_files, fetch)
        if isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim == 2:
            return image[..., None]  # (H, W, C): transformers' processors expect three dimensions
        return image

    return read(images)


# ---------------------------------------------------------------------------------------------------- pixels
def _to_8_bit(array: np.ndarray, name: str) -> np.ndarray:
    """Scales booleans, 16-bit integers and floats in [0, 1] to 0..255; other integers must be in 0..255 already."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "f":
        if not (array.min() >= -FLOAT_TOLERANCE and array.max() <= 1 + FLOAT_TOLERANCE):  # NaN fails too
            raise ValueError(
                f"{name} has floating-point values from {array.min()} to {array.max()}, expected [0, 1]. "
                "Divide by 255, or give 8-bit integers."
            )
        return np.rint(np.clip(array.astype(np.float32), 0, 1) * 255).astype(np.uint8)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if array.dtype.kind in "iu" and array.min() >= 0 and array.max() <= 255:
        return array.astype(np.uint8)
    raise ValueError(f"{name} has values of type {array.dtype} outside 0..255. Give 8-bit, 16-bit or [0, 1] values.")


def _is_channels_first(shape: tuple[int, ...], data_format: str | ChannelDimension | None, name: str) -> bool:
    """Whether an array is (C, H, W): by `data_format` if given, else by which axis can hold the channels."""
    first, last = shape[0] in (1, 3, 4), shape[-1] in (1, 3, 4)
    if data_format is not None:
        first, last = (first, False) if ChannelDimension(data_format) == ChannelDimension.FIRST else (False, last)
    elif shape[0] == 1 and shape[-1] in (3, 4):
        first = False  # one row of pixels rather than a grey image 3 or 4 pixels wide
    if not (first or last):
        raise ValueError(f"{name} must have 1, 3 or 4 channels at the end or in front, got shape {shape}.")
    return first


def _array_to_pil(
    array: np.ndarray | torch.Tensor,
    input_data_format: str | ChannelDimension | None,
    name: str,
    max_image_pixels: int,
) -> Image.Image:
    shape = tuple(array.shape)
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"{name} must be (H, W), (H, W, C) or (C, H, W) and not empty, got shape {shape}.")
    channels_first = len(shape) == 3 and _is_channels_first(shape, input_data_format, name)
    height, width = shape[1:] if channels_first else shape[:2]
    check_image_size(width, height, name, max_image_pixels)
    if isinstance(array, torch.Tensor):
        with decoding(name, "Give a dense tensor that holds its values."):
            array = (array.float() if array.is_floating_point() else array).detach().cpu().numpy()
    if array.ndim == 3:
        array = array.transpose(1, 2, 0) if channels_first else array  # (H, W, C)
        array = array[..., 0] if array.shape[-1] == 1 else array
    return Image.fromarray(np.ascontiguousarray(_to_8_bit(array, name)))


def _deep_to_grey(image: Image.Image, name: str) -> Image.Image:
    """Scales 16-bit and floating-point images to 8 bits; Pillow's conversion would clip them to white."""
    array = np.asarray(image)
    key = image.info.get("transparency")  # the value of transparent pixels
    alpha = None if not isinstance(key, int) else Image.fromarray(np.where(array == key, 0, 255).astype(np.uint8))
    if image.mode == "I":
        if array.min() < 0 or array.max() > 65535:
            raise ValueError(f"{name} has 32-bit values from {array.min()} to {array.max()}, expected 16 bits.")
        array = array.astype(np.uint16)
    grey = Image.fromarray(_to_8_bit(array, name))
    return grey if alpha is None else Image.merge("LA", (grey, alpha))


def parse_background(background: Background) -> tuple[int, int, int] | None:
    """Converts a colour name, "#rrggbb" or three numbers to (R, G, B), and "none" to None."""
    if isinstance(background, str):
        if background == NO_BACKGROUND:
            return None
        try:
            *colour, alpha = (*ImageColor.getrgb(background), 255)[:4]
        except ValueError as error:
            raise ValueError(f"`background_color` names no colour: {error}.") from error
        if alpha != 255:
            raise ValueError(f"`background_color` must be opaque, got {background!r}.")
        background = colour
    is_list = isinstance(background, (list, tuple)) and len(background) == 3
    if not is_list or not all(type(value) is int and 0 <= value <= 255 for value in background):
        raise ValueError(
            "`background_color` must be a colour's name, #rrggbb, three whole numbers from 0 to 255, or "
            f'"{NO_BACKGROUND}", got {background!r}.'
        )
    red, green, blue = background
    return red, green, blue


def _over(background: tuple[int, int, int], image: Image.Image) -> Image.Image:
    """Composites a transparent image over the background; opaque pixels keep their values."""
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # 16-bit PNG, of which Pillow reads the upper 8 bits
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in key)
    rgba = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(rgba, mask=rgba)
    return canvas


def to_pil(
    source: Image.Image | np.ndarray | torch.Tensor,
    name: str,
    max_image_pixels: int,
    do_convert_rgb: bool | None,
    input_data_format: str | ChannelDimension | None,
    background: Background = DEFAULT_BACKGROUND,
) -> Image.Image:
    """Converts an image to 8-bit RGB; without `do_convert_rgb`, grey images stay grey and RGBA images keep alpha.

    Transparent images are composited over `background`; "none" drops alpha, which uncovers the colours below.
    """
    if isinstance(source, Image.Image):
        image = source
    else:
        image = _array_to_pil(source, input_data_format, name, max_image_pixels)
    load_image(image, name, max_image_pixels)
    if image.mode.startswith("I") or image.mode == "F":
        image = _deep_to_grey(image, name)
    if image.mode in ("La", "RGBa"):  # premultiplied, which Pillow converts to few other modes
        image = image.convert(image.mode.upper())
    if image.mode == "RGBA" and not do_convert_rgb:
        return image
    colour = parse_background(background)
    mode = "L" if image.mode in ("L", "LA", "La") and not do_convert_rgb else "RGB"
    with decoding(name):
        if colour is not None and image.has_transparency_data:
            image = _over(colour, image)
        return image if image.mode == mode else image.convert(mode)
