# Copyright 2026 The InternVL package authors
"""Safe decoding of image files: accepted formats, descriptions of other files in errors, and the limit on pixels.

Every failure is a ValueError that names the image. The number of pixels is read from the header before anything is
decoded. Pillow's process-wide limits are neither read nor changed; they apply as well.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)


# Pillow has some forty decoders. A format is listed here if it is in common use, its header gives the size of all that
# is decoded, and its decoder neither opens another image nor starts a program. This excludes EPS (runs Ghostscript),
# IPTC, ICO, ICNS, CUR, DCX, FPX, MIC and BLP (contain other images), JPEG 2000 and AVIF (the coded frame may be larger
# than the container says), and old formats that are hardly tested (PSD, FLI, FITS, SPIDER, McIdas, WMF...).
FORMATS: dict[str, type[ImageFile.ImageFile]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "MPO": JpegImagePlugin.JpegImageFile,  # several JPEG images in one file, opened as JPEG
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
}
OPENED = [name for name in FORMATS if name != "MPO"]
READABLE = "PNG, JPEG, WebP, GIF, BMP, TIFF or PPM"
# None, CCITT fax (three kinds), LZW, JPEG, deflate (two numbers), 16-bit padding, PackBits. Not allowed: old-style
# JPEG, ThunderScan and SGI Log, where most faults of libtiff are found, LZMA, which allocates as much as the file asks
# for, and WebP and Zstandard, which are rare.
TIFF_COMPRESSIONS = {1, 2, 3, 4, 5, 7, 8, 32771, 32773, 32946}
TIFF_COMPRESSION, TIFF_TILE_WIDTH, TIFF_TILE_LENGTH = 259, 322, 323
# Each scan, even of a few bytes, makes the decoder pass over the whole image, so a small file could keep it busy for
# hours. Encoders write ten to twenty. The strips of a TIFF file may overlap; they cover each pixel once per band.
MOST_SCANS = 50
MOST_PASSES = 8
JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")

_IN_MEMORY = re.compile(r" ?<_io\.[^>]*>")  # Pillow's name for bytes, with their place in memory
# Raised by Pillow's decoders on damaged data (found by fuzzing each of them), and Warning for processes that turn
# warnings into errors.
DECODER_ERRORS = (
    ArithmeticError,
    AssertionError,
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
    Warning,
    struct.error,
    zlib.error,
)

MAGIC_OF_READABLE = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAGIC_OF_OTHERS = {
    b"%PDF": "a PDF document",
    b"%!PS": "an EPS or PostScript program",
    b"\xc5\xd0\xd3\xc6": "an EPS program",
    b"8BPS": "a Photoshop document",
    b"\0\0\1\0": "an ICO icon",
    b"\0\0\2\0\0\0": "a TGA image",
    b"\0\0\x0a\0\0\0": "a TGA image",
    b"\0\0\2\0": "a CUR cursor",
    b"BLP1": "a BLP texture",
    b"BLP2": "a BLP texture",
    b"\x0a\5\1": "a PCX image",
    b"\1\xda": "an SGI image",
    b"\x59\xa6\x6a\x95": "a Sun raster image",
    b"DanM": "a Microsoft Paint image",
    b"LinS": "a Microsoft Paint image",
    b"GRIB": "a GRIB file",
    b"BUFR": "a BUFR file",
    b"II\xbc\1": "a JPEG XR image",
    b"icns": "an ICNS icon",
    b"\0\0\0\x0cjP  ": "a JPEG 2000 image",
    b"\xff\x4f\xff\x51": "a JPEG 2000 image",
    b"\0\0\0\x0cJXL ": "a JPEG XL image",
    b"\xff\x0a": "a JPEG XL image",
    b"\xd7\xcd\xc6\x9a": "a WMF drawing",
    b"SIMPLE  =": "a FITS image",
    b"qoif": "a QOI image",
    b"DDS ": "a DDS texture",
    b"gimp xcf": "a GIMP project",
    b"v/1\x01": "an OpenEXR image",
    b"#?RADIANCE": "a Radiance image",
    b"AT&TFORM": "a DjVu document",
    b"\xd0\xcf\x11\xe0": "an old Office document or FlashPix image",
    b"PK\3\4": "a ZIP archive (or a document in one)",
    b"\x1f\x8b": "gzip-compressed data",
    b"BZh": "bzip2-compressed data",
    b"\xfd7zXZ": "xz-compressed data",
    b"(\xb5/\xfd": "Zstandard-compressed data",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
    b"\x1aE\xdf\xa3": "a Matroska or WebM video",
    b"\0\0\1\xba": "an MPEG video",
    b"\0\0\1\xb3": "an MPEG video",
    b"FLV\1": "a Flash video",
    b"OggS": "an Ogg audio or video file",
    b"ID3": "an MP3 audio file",
    b"fLaC": "a FLAC audio file",
    b"\x93NUMPY": "a NumPy array file",
    b"PAR1": "a Parquet file",
    b"\x89HDF": "an HDF5 file",
    b"SQLite format": "an SQLite database",
    b"\x7fELF": "a program",
    b"MZ": "a program",
    b"\x1c\1": "an IPTC container",
    b"\x1c\2": "an IPTC container",
    b"\x1c\3": "an IPTC container",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself (`git lfs pull` fetches it)",
}
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
TEXTS = {  # the first match counts
    b"<!doctype html": "an HTML page",
    b"<html": "an HTML page",
    b"<head": "an HTML page",
    b"<body": "an HTML page",
    b"<svg": "an SVG drawing",
    b"<?xml": "an XML document",
}


@contextmanager
def decoding(name: str, advice: str = "Give a complete image file.") -> Iterator[None]:
    """Converts errors of a decoder into a ValueError that names the image."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has more pixels than Pillow decodes ({error}) Shrink the image.") from error
    except DECODER_ERRORS as error:
        reason = f"{type(error).__name__}: {_IN_MEMORY.sub('', str(error))}"
        raise ValueError(f"{name} cannot be read as an image ({reason}). {advice}") from error


def check_image_size(width: int, height: int, name: str, max_image_pixels: int) -> None:
    """Raises a ValueError for images without pixels or with more than `max_image_pixels`."""
    if width * height == 0:
        raise ValueError(f"{name} has no pixels: its size is {width} x {height}.")
    if width * height > max_image_pixels:
        raise ValueError(
            f"{name} has {width} x {height} = {width * height} pixels, `max_image_pixels` is {max_image_pixels}. "
            "Shrink the image or raise the limit."
        )


def is_readable(start: bytes) -> bool:
    """Whether a file with these first bytes has one of the accepted formats."""
    is_ppm = start[:1] == b"P" and start[1:2] in b"0123456fy" and start[2:3].isspace()
    is_webp = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    return is_webp or is_ppm or start.startswith(MAGIC_OF_READABLE)


def name_content(start: bytes) -> str | None:
    """Describes a file that is not decoded here by its first bytes; None if it is unknown."""
    for magic, what in MAGIC_OF_OTHERS.items():
        if start.startswith(magic):
            return what
    if start[4:8] == b"ftyp":
        brand = start[8:12]
        if brand in (b"avif", b"avis"):
            return "an AVIF image"
        return "a HEIC or HEIF image" if brand in HEIF_BRANDS else "an MP4 or QuickTime video"
    if start[:4] == b"RIFF" and start[8:12] != b"WEBP":
        return "an AVI video or WAV audio file"
    if start[257:262] == b"ustar":
        return "a tar archive"
    return _name_text(start)


def _name_text(start: bytes) -> str | None:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16
        return "text"
    try:
        start.decode()
    except UnicodeDecodeError as error:
        if error.start < len(start) - 3:  # otherwise the last character was cut
            return None
    lowered = start.lower()
    return next((what for mark, what in TEXTS.items() if mark in lowered), None if b"\0" in start else "text")


def _webp_canvas(start: bytes) -> tuple[int, int] | None:
    """Reads the canvas size of an extended WebP file; Pillow allocates the canvas on opening."""
    if start[8:16] != b"WEBPVP8X" or len(start) < 30:
        return None
    return int.from_bytes(start[24:27], "little") + 1, int.from_bytes(start[27:30], "little") + 1


def open_image(handle: BinaryIO, name: str, max_image_pixels: int) -> Image.Image:
    """Reads and checks the header of a file, from its beginning, without decoding it.

    Raises:
        ValueError: If it is not an image of a format in `FORMATS`, or too large.
    """
    start = handle.read(2**10)
    if not start:
        raise ValueError(f"{name} is empty.")
    if not is_readable(start):
        what = name_content(start) or "in no format that is known here"
        raise ValueError(f"{name} cannot be read as an image: it is {what}. Give a {READABLE} file.")
    canvas = _webp_canvas(start)
    if canvas is not None:
        check_image_size(*canvas, name, max_image_pixels)
    handle.seek(0)
    with decoding(name):
        image = Image.open(handle, formats=OPENED)
    _check_undecoded(image, name, max_image_pixels)
    return image


def _check_undecoded(image: Image.Image, name: str, max_image_pixels: int) -> None:
    """Raises a ValueError if loading this image would run a decoder that is not allowed, or exceed the limit."""
    decoder = FORMATS.get(image.format or "")
    if decoder is None or not isinstance(image, decoder):
        raise ValueError(
            f"{name} is an image of format {image.format} that is not decoded yet. Only {READABLE} files are decoded "
            "here: convert it, or call its `load()` first if you trust it."
        )
    check_image_size(*image.size, name, max_image_pixels)
    boxes = [box for _, box, *_ in image.tile if box is not None]
    covered = sum((right - left) * (lower - upper) for left, upper, right, lower in boxes)
    if covered > MOST_PASSES * image.width * image.height:
        raise ValueError(f"{name} cannot be read as an image: its parts cover it more than {MOST_PASSES} times.")
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        _check_jpeg(image, name, max_image_pixels)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_tiff(image, name, max_image_pixels)


def _check_jpeg(image: JpegImagePlugin.JpegImageFile, name: str, max_image_pixels: int) -> None:
    if image.decoderconfig:
        scale = image.decoderconfig[0]  # set by `draft`: the file is this many times larger
        check_image_size(image.width * scale, image.height * scale, name, max_image_pixels)
    with decoding(name):
        position = image.fp.tell()
        image.fp.seek(image.tile[0].offset)
        data = image.fp.read()
        image.fp.seek(position)
    if _count_scans(data) > MOST_SCANS:
        raise ValueError(
            f"{name} is a JPEG file of more than {MOST_SCANS} scans, which is not decoded here. Save it anew."
        )


def _count_scans(data: bytes) -> int:
    """Counts the scans of the first JPEG image in these bytes."""
    scans, place = 0, 2
    while (found := JPEG_MARKER.search(data, place)) and found[1] != b"\xd9":
        scans += found[1] == b"\xda"
        place = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return scans


def _check_tiff(image: TiffImagePlugin.TiffImageFile, name: str, max_image_pixels: int) -> None:
    compression = image.tag_v2.get(TIFF_COMPRESSION, 1)
    if compression not in TIFF_COMPRESSIONS:
        raise ValueError(
            f"{name} is a TIFF file of compression {image.info.get('compression', compression)}, which is not decoded "
            "here. Save it with LZW or deflate."
        )
    width, length = (image.tag_v2.get(tag, 1) for tag in (TIFF_TILE_WIDTH, TIFF_TILE_LENGTH))
    if not (isinstance(width, int) and isinstance(length, int)):
        raise ValueError(f"{name} cannot be read as an image: its tiles have no size.")
    check_image_size(width, length, f"A tile of {name}", max_image_pixels)


def _is_decoded(image: ImageFile.ImageFile) -> bool:
    pixels = getattr(image, "_im", None)
    return pixels is not None and not image.tile and getattr(pixels, "size", image.size) == image.size


def load_image(image: Image.Image, name: str, max_image_pixels: int) -> None:
    """Decodes a PIL image that is not loaded yet, with the checks of `open_image`."""
    with decoding(name, "Open it anew."):  # its file may be closed
        is_decoded = not isinstance(image, ImageFile.ImageFile) or _is_decoded(image)
    if not is_decoded:
        _check_undecoded(image, name, max_image_pixels)
    check_image_size(*image.size, name, max_image_pixels)
    _load_checked(image, name, max_image_pixels)


def _load_checked(image: Image.Image, name: str, max_image_pixels: int) -> None:
    """Decodes what passed the checks already; the size in the header may be another than the decoder's."""
    with decoding(name):
        image.load()
    check_image_size(*image.size, name, max_image_pixels)


def decode_image(handle: BinaryIO, name: str, max_image_pixels: int) -> Image.Image:
    """Decodes a file and applies its EXIF orientation; see `open_image`."""
    image = open_image(handle, name, max_image_pixels)
    _load_checked(image, name, max_image_pixels)
    with decoding(name):
        ImageOps.exif_transpose(image, in_place=True)
    return image
