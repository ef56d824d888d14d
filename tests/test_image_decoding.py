"""Decoding images: formats, pixel limits, broken and hostile files, and what is said of all that is no image."""

import base64
import io
import os
import socket
import struct
import subprocess
import time
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin, TiffImagePlugin

from internvl.image_processing_internvl import InternVLImageProcessor

from .fixtures_images import TILE, bomb, encoded, one_tile
from .fixtures_text import make_image


WIDE = make_image(128, 32)


@pytest.fixture
def processor() -> InternVLImageProcessor:
    return InternVLImageProcessor(size={"height": TILE, "width": TILE})


# ------------------------------------------------------------------------------------------------ broken and hostile
def long_text_chunk() -> bytes:
    """A PNG whose text chunk unpacks to more than Pillow accepts."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    return encoded(make_image(4, 4), pnginfo=info)


def broken_files() -> dict[str, bytes]:
    whole = encoded(make_image(64, 64))
    return {
        "bomb.png": bomb(),
        "truncated.png": whole[: len(whole) // 2],
        "truncated.jpg": encoded(make_image(64, 64), "JPEG")[:900],
        "empty.png": b"",
        "header_only.png": whole[:20],
        "text.png": b"this is not an image\n" * 20,
        "long_text.png": long_text_chunk(),
        "program.eps": encoded(make_image(8, 8), "EPS"),
    }


@pytest.mark.parametrize("name", broken_files())
def test_broken_files_raise_with_their_name_and_position(processor, name, tmp_path):
    data = broken_files()[name]
    assert len(data) < 20_000
    path = tmp_path / name
    path.write_bytes(data)
    limits = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_CHUNK
    for source in (path, str(path)):
        with pytest.raises(ValueError, match=f"Image 2 of 3 .*{name}"):
            processor([WIDE, source, WIDE])
    for source in (data, "data:image/png;base64," + base64.b64encode(data).decode()):
        with pytest.raises(ValueError, match=r"Image 1 of 1"):
            processor(source)
        with pytest.raises(ValueError, match="Image 1 of 2"):
            processor.fetch_images([source, WIDE])
    assert limits == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_CHUNK)


def test_a_truncated_file_that_the_caller_opened_is_named(processor, tmp_path):
    path = tmp_path / "half.png"
    path.write_bytes(broken_files()["truncated.png"])
    with pytest.raises(ValueError, match=r"Image 1 of 1 \(.*half.png\) cannot be read as an image"):
        processor(Image.open(path))


def test_the_pixel_limit_is_checked_before_decoding(processor, monkeypatch):
    data = encoded(make_image(40, 30))

    def decode(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", decode)
    message = r"Image 1 of 1 has 40 x 30 = 1200 pixels, `max_image_pixels` is 1199"
    with pytest.raises(ValueError, match=message):
        processor(data, max_image_pixels=1199)
    with pytest.raises(ValueError, match=message):
        processor(Image.open(io.BytesIO(data)), max_image_pixels=1199)
    processor.max_image_pixels = 1199
    with pytest.raises(ValueError, match=message):
        processor.fetch_images(data)


def test_the_own_pixel_limit_holds_where_the_process_has_lifted_that_of_pillow(processor, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ValueError, match=r"60000 x 60000 = 3600000000 pixels"):
        processor(bomb())


WHAT_PEOPLE_GIVE = {
    "document.pdf": (b"%PDF-1.7\n%\xe2\xe3", "a PDF document"),
    "page.html": (b"<!DOCTYPE html>\n<html><body><svg></svg>", "an HTML page"),
    "drawing.svg": (b"<?xml version='1.0'?>\n<svg xmlns='x'>", "an SVG drawing"),
    "feed.xml": (b"<?xml version='1.0'?>\n<feed>", "an XML document"),
    "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC or HEIF image"),
    "coded.avif": (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1", "an AVIF image"),
    "film.mp4": (b"\0\0\0\x20ftypisom\0\0\2\0", "an MP4 or QuickTime video"),
    "film.webm": (b"\x1aE\xdf\xa3\x9fB\x86", "a Matroska or WebM video"),
    "film.avi": (b"RIFF\0\0\0\0AVI LIST", "an AVI video"),
    "archive.zip": (b"PK\3\4\x14\0", "a ZIP archive"),
    "archive.gz": (b"\x1f\x8b\x08\0", "gzip-compressed data"),
    "archive.tar": (b"name".ljust(257, b"\0") + b"ustar\x0000", "a tar archive"),
    "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
    "notes.txt": ("für später\n".encode() * 90, "text"),
    "wide.txt": ("wide text".encode("utf-16"), "text"),
    "rows.json": (b'{"a": 1}', "text"),
    "program.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "an EPS or PostScript program"),
    "unknown.bin": (bytes(range(128, 256)), "in no format that is known here"),
    "nothing.png": (b"", "is empty"),
}


@pytest.mark.parametrize("name", WHAT_PEOPLE_GIVE)
def test_a_refusal_says_what_the_thing_is(processor, name, tmp_path):
    data, what = WHAT_PEOPLE_GIVE[name]
    path = tmp_path / name
    path.write_bytes(data)
    for source in (path, str(path), data, io.BytesIO(data), {"bytes": data, "path": None}):
        with pytest.raises(ValueError, match=f"Image 1 of 1.* {what}"):
            processor(source)
    with pytest.raises(ValueError, match=f"Image 1 of 1 .* {what}"):
        processor("data:image/png;base64," + base64.b64encode(data).decode())


@pytest.mark.parametrize("as_text", [False, True])
def test_pipes_folders_sockets_and_devices_are_named_without_being_opened(processor, tmp_path, as_text):
    pipe, listener = tmp_path / "pipe", socket.socket(socket.AF_UNIX)
    os.mkfifo(pipe)
    listener.bind(str(tmp_path / "socket"))
    kinds = {
        tmp_path: "a folder",
        pipe: "a pipe",
        tmp_path / "socket": "a socket",
        Path("/dev/zero"): "a device",
    }
    (tmp_path / "link").symlink_to(pipe)
    kinds[tmp_path / "link"] = "a pipe"
    with listener:
        for path, what in kinds.items():
            for source in (str(path) if as_text else path, path.as_uri(), {"path": str(path)}):
                with pytest.raises(ValueError, match=rf"Image 2 of 2 \(.*\) is {what}"):
                    processor([WIDE, source])


def test_file_objects_of_pipes_and_devices_are_not_read(processor):
    reading, writing = os.pipe()
    with open(reading, "rb") as pipe, open(writing, "wb"), open("/dev/zero", "rb") as zeros:
        for handle, what in ((pipe, "a pipe"), (zeros, "a device")):
            with pytest.raises(ValueError, match=f"Image 1 of 1 .*is {what}"):
                processor(handle)


@pytest.mark.parametrize(
    "source",
    [
        "no/such/file",  # which is base64 of nine bytes
        "no/such/file.png",
        "C:\\images\\a.png",
        "~/image.png",
        "image",
        "x" * 5000,
        "x" * 300 + ".png",
        "\0.png",
        "\ud800.png",
        "",
        " ",
        "file:///no/such/file.png",
        "file:///no/such%00file.png",
        "file:",
        Path("no/such/file.png"),
        Path("x" * 300),
        Path("\0"),
        "README.md/image.png",
    ],
    ids=lambda source: repr(source)[:30],
)
def test_a_wrong_path_is_no_such_file(processor, source):
    with pytest.raises(ValueError, match=r"Image 1 of 1.* does not exist: there is no such file") as caught:
        processor(source)
    assert "damaged" not in str(caught.value)
    str(caught.value).encode()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s3://bucket/image.png", "is a `s3` address"),
        ("ftp://host/image.png", "is a `ftp` address"),
        ("file://otherhost/image.png", "lies on the host `otherhost`"),
        ("data:image/png;base64", "data address without data"),
        ("data:image/png;base64,????", "damaged base64"),
        ("iVBORw0KGgo=!", "damaged base64"),
        (base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(3000)).decode() + "=!", "damaged base64"),
        (base64.b64encode(b"%PDF-1.7 and so on" * 9).decode(), "it is a PDF document"),
    ],
)
def test_addresses_and_base64_texts_that_hold_no_image_are_named(processor, source, message):
    with pytest.raises(ValueError, match=f"Image 1 of 1 .*{message}"):
        processor(source)


# ------------------------------------------------------------------------------------------------ formats
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO"])
def test_the_formats_that_people_have_are_read_by_every_way_in(processor, file_format, tmp_path):
    options = {"save_all": True, "append_images": [make_image(50, 30, 1)]} if file_format == "MPO" else {}
    data, path = encoded(make_image(50, 30), file_format, **options), tmp_path / "image"
    path.write_bytes(data)
    assert Image.open(path).format == file_format
    expected = processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
    text = base64.b64encode(data).decode()
    for source in (path, data, text, io.BytesIO(data), Image.open(path), Image.open(path).copy()):
        assert torch.equal(processor(source, return_tensors="pt")["pixel_values"], expected)


def iptc(content: bytes, width: int, height: int) -> bytes:
    """An IPTC container of a small image, with another file for its content."""

    def record(group: int, number: int, body: bytes) -> bytes:
        return bytes([0x1C, group, number]) + len(body).to_bytes(2, "big") + body

    fields = [(60, b"\1\0"), (65, b"\0"), (20, width.to_bytes(2, "big")), (30, height.to_bytes(2, "big"))]
    head = b"".join(record(3, number, body) for number, body in [*fields, (120, b"\5")])
    return head + record(8, 10, content)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@lru_cache
def files_of_other_formats() -> dict[str, bytes]:
    names = ["AVIF", "DDS", "DIB", "EPS", "ICNS", "ICO", "IM", "JPEG2000", "PCX", "QOI", "SGI", "SPIDER", "TGA", "XBM"]
    images = {"XBM": make_image(16, 16).convert("1"), "SPIDER": make_image(16, 16).convert("F")}
    files = {name: encoded(images.get(name, make_image(16, 16)), name) for name in names}
    return {**files, "IPTC": iptc(EPS, 10, 10)}


@pytest.mark.parametrize("name", files_of_other_formats())
def test_other_formats_are_refused_and_nothing_is_started(processor, name, tmp_path, monkeypatch):
    """Also in PIL images that are not loaded yet. A Ghostscript that leaves a mark is first in the search path."""
    mark, program, path = tmp_path / "started", tmp_path / "gs", tmp_path / "image"
    program.write_text(f"#!/bin/sh\ntouch {mark}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    data = files_of_other_formats()[name]
    path.write_bytes(data)

    def start(*arguments, **settings):
        raise AssertionError("a program is started")

    monkeypatch.setattr(subprocess, "Popen", start)
    for source in (path, data, io.BytesIO(data), "data:image/png;base64," + base64.b64encode(data).decode()):
        with pytest.raises(ValueError, match=r"Image 1 of 1 .*Give a PNG, JPEG"):
            processor(source)
    opened = Image.open(path)
    for source in (
        (opened, Image.open(io.BytesIO(data))) if name != "ICO" else ()
    ):  # which Pillow decodes as it opens it
        with pytest.raises(ValueError, match=f"Image 1 of 1 .* of format {opened.format} that is not decoded yet"):
            processor(source)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["JPEG2000", "TGA", "AVIF"])
def test_other_formats_that_the_caller_has_decoded_pass(processor, name):
    opened = Image.open(io.BytesIO(files_of_other_formats()[name]))
    with pytest.raises(ValueError, match="call its `load\\(\\)` first"):
        processor(opened)
    opened.load()
    expected = processor(opened.copy(), return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(opened, return_tensors="pt")["pixel_values"], expected)


def test_a_decoder_in_the_clothes_of_another_format_is_refused(processor):
    opened = Image.open(io.BytesIO(files_of_other_formats()["TGA"]))
    opened.format = "PNG"
    with pytest.raises(ValueError, match="not decoded yet"):
        processor(opened)


# ------------------------------------------------------------------------------------------------ pixel limits
def tiff_with_large_tiles() -> bytes:
    """10 x 10 pixels in one tile of 40000 x 40000."""
    entries = [
        (256, 3, 10),
        (257, 3, 10),
        (258, 3, 8),
        (259, 3, 8),
        (262, 3, 1),
        (277, 3, 1),
        (322, 4, 40000),
        (323, 4, 40000),
        (324, 4, 8),
        (325, 4, 8),
    ]
    body = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return (
        b"II*\0" + struct.pack("<I", 16) + zlib.compress(b"")[:8] + struct.pack("<H", len(entries)) + body + bytes(4)
    )


def webp_with_large_canvas() -> bytes:
    data = bytearray(encoded(make_image(8, 8), "WEBP", save_all=True, append_images=[make_image(8, 8, 1)]))
    assert data[12:16] == b"VP8X"
    data[24:30] = (16000).to_bytes(3, "little") * 2
    return bytes(data)


def gif_with_a_frame_beyond_its_screen() -> bytes:
    data = bytearray(encoded(make_image(8, 8), "GIF"))
    frame = data.index(b",\0\0\0\0")
    data[frame + 5 : frame + 9] = struct.pack("<HH", 60000, 60000)
    return bytes(data)


def png_with_two_headers() -> bytes:
    first, second = encoded(make_image(8, 8)), bomb()
    return first[:33] + second[8:]


LARGER_THAN_THEY_SAY = {
    "tile": tiff_with_large_tiles,
    "canvas": webp_with_large_canvas,
    "frame": gif_with_a_frame_beyond_its_screen,
    "header": png_with_two_headers,
}


@pytest.mark.parametrize("kind", LARGER_THAN_THEY_SAY)
def test_the_pixel_limit_holds_for_what_is_decoded(processor, kind, monkeypatch):
    """Where the process has lifted Pillow's own limit as well; the address space bounds what decoding would take."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ValueError, match=r"Image 1 of 1.*`max_image_pixels` is"):
        processor(LARGER_THAN_THEY_SAY[kind]())


def test_a_jpeg_that_the_caller_drafted_counts_as_what_is_decoded(processor):
    image = Image.open(io.BytesIO(encoded(make_image(800, 800), "JPEG")))
    image.draft("RGB", (100, 100))
    assert image.size == (100, 100)
    with pytest.raises(ValueError, match="has 800 x 800"):
        processor(image, max_image_pixels=100_000)
    assert processor(image, max_image_pixels=640_000, max_num=1)["num_patches"] == [1]


def test_frames_that_the_caller_went_to_are_checked(processor):
    data = encoded(make_image(8, 8), "TIFF", save_all=True, append_images=[make_image(90, 90)])
    image = Image.open(io.BytesIO(data))
    assert processor(image, max_image_pixels=100)["num_patches"] == [1]
    image.seek(1)
    with pytest.raises(ValueError, match="has 90 x 90"):
        processor(image, max_image_pixels=100)


def jpeg_of_many_scans() -> bytes:
    """Each of its 5,000 scans takes 53 bytes, and all pixels once more."""
    data = encoded(Image.new("RGB", (4000, 4000), (90, 120, 10)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * 5000 + data[-2:]


def tiff_of_overlapping_strips() -> bytes:
    """Two strips, 20,000 times over, at the same place of the file."""
    side, strips = 2000, 40_000
    entries = [
        (256, 4, 1, side),
        (257, 4, 1, side),
        (258, 3, 1, 8),
        (262, 3, 1, 1),
        (273, 4, strips, 8 + side * side),
        (278, 4, 1, side - 1),
    ]
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    offsets = struct.pack("<I", 8) * strips
    head = b"II*\0" + struct.pack("<I", 8 + side * side + len(offsets))
    return head + bytes(side * side) + offsets + struct.pack("<H", len(entries)) + body + bytes(4)


@pytest.mark.parametrize(
    ("make", "message"),
    [(jpeg_of_many_scans, "more than 50 scans"), (tiff_of_overlapping_strips, "parts cover it more than 8 times")],
)
def test_a_small_file_that_would_keep_a_decoder_busy_for_hours_is_refused_at_once(processor, make, message):
    data, start = make(), time.monotonic()
    for source in (data, Image.open(io.BytesIO(data))):
        with pytest.raises(ValueError, match=rf"Image 1 of 1 .*{message}"):
            processor(source)
    assert time.monotonic() - start < 5


def planar_tiff(image: Image.Image) -> bytes:
    """The red band, then the green, then the blue one."""
    bands = [band.tobytes() for band in image.split()]
    size, start = len(bands[0]), 8 + 6 + 2 + 12
    entries = [
        (256, 3, 1, image.width),
        (257, 3, 1, image.height),
        (258, 3, 3, 8),
        (262, 3, 1, 2),
        (273, 4, 3, 16),
        (277, 3, 1, 3),
        (278, 3, 1, image.height),
        (284, 3, 1, 2),
    ]
    head = b"II*\0" + struct.pack("<I", start + 3 * size) + struct.pack("<HHHxx", 8, 8, 8)
    head += struct.pack("<III", *(start + band * size for band in range(3)))
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return head + b"".join(bands) + struct.pack("<H", len(entries)) + body + bytes(4)


def test_progressive_and_planar_images_with_all_their_parts_are_read():
    """Ten scans for each of the three frames; three strips of bands, each as large as the image."""
    more = [make_image(64, 64, seed) for seed in (1, 2)]
    for data in (
        encoded(make_image(64, 64), "JPEG", progressive=True),
        encoded(make_image(64, 64), "MPO", save_all=True, append_images=more * 20, progressive=True),
        planar_tiff(make_image(64, 64)),
        encoded(make_image(64, 64), "TIFF", tiffinfo={278: 1}),
    ):
        np.testing.assert_array_equal(one_tile(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("shape", [(10**6, 10**6, 3), (3, 10**6, 10**6), (10**6, 10**6)])
def test_arrays_and_tensors_have_the_pixel_limit_too(processor, shape):
    for source in (np.broadcast_to(np.uint8(0), shape), torch.zeros(()).expand(shape)):
        with pytest.raises(ValueError, match="has 1000000 x 1000000"):
            processor(source)


def test_tensors_without_storage_are_named(processor):
    for source in (torch.zeros(3, 4, 4, device="meta"), torch.zeros(3, 4, 4).to_sparse(), torch.zeros(4, 4, 3) * 1j):
        with pytest.raises(ValueError, match=r"Image 1 of 1 "):
            processor(source)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4", "raw"])
def test_the_compressions_of_tiff_that_people_have_are_read(processor, compression):
    image = make_image(20, 20).convert("1") if compression == "group4" else make_image(20, 20)
    data = encoded(image, "TIFF", compression=compression)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(one_tile(data), expected)


@pytest.mark.parametrize("compression", ["lzma", "zstd", "webp", "tiff_sgilog", "tiff_thunderscan"])
def test_rare_compressions_of_tiff_are_refused_by_name(processor, compression):
    """Written over the number of a common one: nothing is decoded."""
    number = {v: k for k, v in TiffImagePlugin.COMPRESSION_INFO.items()}[compression]
    data = encoded(make_image(20, 20), "TIFF", compression="tiff_lzw")
    entry = struct.pack("<HHI", 259, 3, 1)
    data = data.replace(entry + struct.pack("<H", 5), entry + struct.pack("<H", number))
    for source in (data, Image.open(io.BytesIO(data))):
        with pytest.raises(ValueError, match=f"TIFF file of compression {compression}"):
            processor(source)


def test_a_file_of_more_bytes_than_any_image_is_refused(processor, tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    path.write_bytes(encoded(make_image(8, 8)))
    os.truncate(path, 2**36)  # holds nothing: 64 GiB on no disk
    with pytest.raises(ValueError, match="has 68719476736 bytes, more than"):
        processor(path)
    monkeypatch.setattr("internvl.image_loading_internvl.MOST_FILE_BYTES", 2**20)
    with open(path, "rb") as handle, pytest.raises(ValueError, match="has more than the 1048576 bytes"):
        processor(handle)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_files_of_many_formats_raise_value_errors_only(processor):
    generator = np.random.default_rng(0)
    failures = 0
    for file_format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        whole = encoded(make_image(20, 20), file_format)
        for _ in range(40):
            data = bytearray(whole)
            for position in generator.integers(0, min(len(data), 200), 8):
                data[position] = generator.integers(0, 256)
            try:
                processor(bytes(data[: generator.integers(1, len(data) + 1)]), max_image_pixels=10_000)
            except ValueError:
                failures += 1
    assert failures > 200
