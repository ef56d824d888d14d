# Copyright 2026 The InternVL package authors
"""Reading pictures: from files, bytes, addresses, arrays and tensors to 8-bit PIL images, safely.

Every failure is a ValueError that names the picture. The number of pixels is looked up in the header before anything is
decoded. Pillow's process-wide limits are neither read nor changed; they hold besides ours.

Addresses are fetched with limits on size and time, by http and https only, and only from hosts at public addresses:
a server that lets clients name addresses must not hand them pictures of its own network. Set the environment variable
INTERNVL_ALLOW_PRIVATE_HOSTS=1 to fetch from private hosts too. Where a proxy is configured, it decides.
"""

import base64
import binascii
import ipaddress
import os
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from io import BytesIO
from typing import Any
from urllib.request import (
    AbstractHTTPHandler,
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPRedirectHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_utils import ChannelDimension


# What Pillow's decoders raise on damaged data, seen by feeding each of them damaged files.
DECODER_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    Image.DecompressionBombError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
DOWNLOAD_SECONDS = 60
DOWNLOAD_BYTES = 2**28
PRIVATE_HOSTS = "INTERNVL_ALLOW_PRIVATE_HOSTS"

ImageSource = str | os.PathLike | bytes | bytearray | memoryview | Image.Image | np.ndarray | torch.Tensor
NestedImages = ImageSource | list[Any] | tuple[Any, ...]


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turns what a decoder raises into a ValueError that names the picture."""
    try:
        yield
    except DECODER_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name} cannot be read as a picture ({reason}). Give a complete picture file.") from error


def check_image_size(width: int, height: int, name: str, max_image_pixels: int) -> None:
    """Raises a ValueError for pictures without pixels or with more than `max_image_pixels`."""
    if width * height == 0:
        raise ValueError(f"{name} has no pixels: its size is {width} x {height}.")
    if width * height > max_image_pixels:
        raise ValueError(
            f"{name} has {width} x {height} = {width * height} pixels, `max_image_pixels` is {max_image_pixels}. "
            "Shrink the picture or raise the limit."
        )


def _connect_in_public(address: tuple[str, int], *arguments: Any) -> socket.socket:
    """`socket.create_connection` that refuses hosts with any address of a private network.

    It connects to what it checked, so that a name server cannot answer otherwise the second time.
    """
    host, port = address
    found = dict.fromkeys(info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    for place in found:
        if not ipaddress.ip_address(place).is_global:
            raise OSError(f"{host} is at {place}, which is not public; {PRIVATE_HOSTS}=1 allows private hosts")
    failure = OSError(f"{host} has no address")
    for place in found:
        try:
            return socket.create_connection((str(place), port), *arguments)
        except OSError as error:
            failure = error
    raise failure


def _connection(kind: type[HTTPConnection], is_public: bool, host: str, **settings: Any) -> HTTPConnection:
    connection = kind(host, **settings)
    if is_public:
        connection._create_connection = _connect_in_public  # type: ignore[attr-defined]
    return connection


class _Handler(AbstractHTTPHandler):
    """Opens each address, and each that one redirects to, at public hosts."""

    http_request = https_request = AbstractHTTPHandler.do_request_

    def _open(self, kind: type[HTTPConnection], request: Request) -> HTTPResponse:
        is_proxied = request.has_proxy() or getattr(request, "_tunnel_host", None)
        is_public = not is_proxied and os.environ.get(PRIVATE_HOSTS) != "1"
        return self.do_open(partial(_connection, kind, is_public), request)

    def http_open(self, request: Request) -> HTTPResponse:
        """Called by urllib for http."""
        return self._open(HTTPConnection, request)

    def https_open(self, request: Request) -> HTTPResponse:
        """Called by urllib for https."""
        return self._open(HTTPSConnection, request)


def _opener() -> OpenerDirector:
    """What urllib's own opener does for http and https; that one would also follow redirects to ftp."""
    opener = OpenerDirector()
    for handler in (
        ProxyHandler,
        UnknownHandler,
        HTTPDefaultErrorHandler,
        HTTPRedirectHandler,
        HTTPErrorProcessor,
        _Handler,
    ):
        opener.add_handler(handler())
    return opener


def _download(url: str, name: str) -> bytes:
    """Body of an http(s) address, within DOWNLOAD_BYTES and DOWNLOAD_SECONDS."""
    deadline = time.monotonic() + DOWNLOAD_SECONDS
    body = bytearray()
    try:
        # Some hosts refuse the default agent of urllib.
        request = Request(url, headers={"User-Agent": "transformers"})
        with _opener().open(request, timeout=DOWNLOAD_SECONDS) as response:
            while chunk := response.read(2**16):
                body += chunk
                if len(body) > DOWNLOAD_BYTES or time.monotonic() > deadline:
                    raise OSError(f"more than {DOWNLOAD_BYTES} bytes or {DOWNLOAD_SECONDS} seconds")
    except (OSError, ValueError, HTTPException) as error:
        raise ValueError(f"{name} cannot be fetched ({type(error).__name__}: {error}).") from error
    return bytes(body)


def _decode_base64(text: str, name: str) -> bytes:
    payload = text.partition(",")[2] if text.startswith("data:image/") else text
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(
            f"{name} is neither an existing file, nor an http(s) address, nor base64 data ({error})."
        ) from error


def _decode_file(source: str | os.PathLike | bytes, name: str, max_image_pixels: int) -> Image.Image:
    """Decodes a file (its path or its bytes), turned upright as its EXIF orientation says."""
    with _decoding(name):
        handle = BytesIO(source) if isinstance(source, bytes) else open(source, "rb")  # noqa: SIM115 (closed below)
    with handle:
        if not handle.read(1):
            raise ValueError(f"{name} is empty.")
        handle.seek(0)
        with _decoding(name):
            image = Image.open(handle)  # reads the header only
        check_image_size(*image.size, name, max_image_pixels)
        if image.format == "EPS":
            raise ValueError(f"{name} is an EPS file, which is a program to run. Give a PNG or JPEG file.")
        with _decoding(name):
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    return image


def read_image(source: ImageSource, name: str, max_image_pixels: int) -> Image.Image | np.ndarray | torch.Tensor:
    """Decodes paths, addresses, base64 text and bytes; pictures that are decoded already pass through."""
    if isinstance(source, (Image.Image, np.ndarray, torch.Tensor)):
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode_file(bytes(source), name, max_image_pixels)
    if isinstance(source, os.PathLike) or (isinstance(source, str) and os.path.isfile(source)):
        return _decode_file(source, name, max_image_pixels)
    if isinstance(source, str):
        is_address = source.startswith(("http://", "https://"))
        data = _download(source, name) if is_address else _decode_base64(source, name)
        return _decode_file(data, name, max_image_pixels)
    raise ValueError(
        f"{name} must be a PIL image, an array, a tensor, a path, an address, base64 text or bytes, "
        f"got {type(source).__name__}."
    )


def flatten_images(images: NestedImages) -> list[ImageSource]:
    """Pictures of nested lists and of 4-dimensional batches, in order."""
    if isinstance(images, (list, tuple)):
        return [image for group in images for image in flatten_images(group)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


def name_images(sources: list[ImageSource]) -> list[str]:
    """What error messages call each picture: its position and, if it has one, its path or address."""
    names = []
    for index, source in enumerate(sources):
        origin = source if isinstance(source, (str, os.PathLike)) else getattr(source, "filename", "")
        origin = os.fsdecode(origin) if origin else ""
        shown = f" ({origin if len(origin) <= 200 else origin[:60] + '...'})" if origin else ""
        names.append(f"Image {index + 1} of {len(sources)}{shown}")
    return names


def read_nested_images(images: NestedImages, max_image_pixels: int) -> NestedImages:
    """`read_image` for each picture, nested as given; batches become lists, grey arrays get a channel axis."""
    names = iter(name_images(flatten_images(images)))

    def read(part: NestedImages) -> NestedImages:
        if isinstance(part, (list, tuple)):
            return [read(item) for item in part]
        if isinstance(part, (np.ndarray, torch.Tensor)) and part.ndim == 4:
            return [read(item) for item in part]
        image = read_image(part, next(names), max_image_pixels)
        if isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim == 2:
            return image[..., None]  # (H, W, C): transformers' processors count on three dimensions
        return image

    return read(images)


def _to_8_bit(array: np.ndarray, name: str) -> np.ndarray:
    """Scales to 0..255: booleans, 16 bits, and floats in [0, 1]; other integers must be in 0..255 already."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # written so that NaN fails too
            raise ValueError(
                f"{name} has floating-point values from {array.min()} to {array.max()}, expected [0, 1]. "
                "Divide by 255, or give 8-bit integers."
            )
        return np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if array.dtype.kind in "iu" and array.min() >= 0 and array.max() <= 255:
        return array.astype(np.uint8)
    raise ValueError(f"{name} has values of type {array.dtype} outside 0..255. Give 8-bit, 16-bit or [0, 1] values.")


def _is_channels_first(shape: tuple[int, ...], data_format: str | ChannelDimension | None, name: str) -> bool:
    """Whether a 3-dimensional array is (C, H, W), by its format if given, else by which end can count channels."""
    first, last = shape[0] in (1, 3, 4), shape[-1] in (1, 3, 4)
    if data_format is not None:
        first, last = (first, False) if ChannelDimension(data_format) == ChannelDimension.FIRST else (False, last)
    elif shape[0] == 1 and shape[-1] in (3, 4):
        first = False  # one row of pixels, rather than a grey picture 3 pixels wide
    if not (first or last):
        raise ValueError(f"{name} must have 1, 3 or 4 channels at the end or in front, got shape {shape}.")
    return first


def _array_to_pil(
    array: np.ndarray | torch.Tensor, input_data_format: str | ChannelDimension | None, name: str
) -> Image.Image:
    if isinstance(array, torch.Tensor):
        array = (array.float() if array.is_floating_point() else array).detach().cpu().numpy()
    if array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(f"{name} must be (H, W), (H, W, C) or (C, H, W) and not empty, got shape {array.shape}.")
    if array.ndim == 3:
        channels_first = _is_channels_first(array.shape, input_data_format, name)
        array = array.transpose(1, 2, 0) if channels_first else array  # (H, W, C)
        array = array[..., 0] if array.shape[-1] == 1 else array
    return Image.fromarray(np.ascontiguousarray(_to_8_bit(array, name)))


def _deep_to_grey(image: Image.Image, name: str) -> Image.Image:
    """Scales 16-bit and floating-point pictures; Pillow's own conversion would clip them to white."""
    array = np.asarray(image)
    if image.mode == "I":
        if array.min() < 0 or array.max() > 65535:
            raise ValueError(f"{name} has 32-bit values from {array.min()} to {array.max()}, expected 16 bits.")
        array = array.astype(np.uint16)
    return Image.fromarray(_to_8_bit(array, name))


def load_image(image: Image.Image, name: str, max_image_pixels: int) -> None:
    """Decodes a file that the caller opened, if that was not done yet; the number of pixels is checked first."""
    check_image_size(*image.size, name, max_image_pixels)
    with _decoding(name):
        image.load()


def to_pil(
    source: Image.Image | np.ndarray | torch.Tensor,
    name: str,
    max_image_pixels: int,
    do_convert_rgb: bool | None,
    input_data_format: str | ChannelDimension | None,
) -> Image.Image:
    """8-bit RGB image of a decoded picture; without `do_convert_rgb`, grey and RGBA pictures stay what they are."""
    image = source if isinstance(source, Image.Image) else _array_to_pil(source, input_data_format, name)
    load_image(image, name, max_image_pixels)
    if image.mode.startswith("I") or image.mode == "F":
        image = _deep_to_grey(image, name)
    if image.mode == "RGB" or (image.mode in ("L", "RGBA") and not do_convert_rgb):
        return image
    with _decoding(name):
        return image.convert("RGB")


__all__ = [
    "ImageSource",
    "NestedImages",
    "check_image_size",
    "flatten_images",
    "load_image",
    "name_images",
    "read_image",
    "read_nested_images",
    "to_pil",
]
