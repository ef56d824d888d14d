"""The image processor: the published grids and pixels exactly, every setting in every spelling, every kind of picture."""

import base64
import hashlib
import http.server
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin
from safetensors.torch import load_file
from transformers import CLIPImageProcessor

from internvl.image_processing_internvl import InternVLImageProcessor, _fit, choose_grid


GOLDEN = Path(__file__).parent / "golden" / "tiling"
CASE = json.loads((GOLDEN / "case.json").read_text())
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TILE = 16  # a small tile keeps the tests that look at no golden fast


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def bytes_of_tiles(processor: InternVLImageProcessor, image, **settings) -> np.ndarray:
    """(T, H, W, C) uint8: the pixels before scaling and normalisation."""
    output = processor(image, do_rescale=False, do_normalize=False, return_tensors="np", **settings)
    return output["pixel_values"].astype(np.uint8).transpose(0, 2, 3, 1)


def one_tile(image, **settings) -> np.ndarray:
    """(H, W, C) uint8 of a picture as it is."""
    (tile,) = bytes_of_tiles(InternVLImageProcessor(do_resize=False), image, **settings)
    return tile


@pytest.fixture
def processor() -> InternVLImageProcessor:
    return InternVLImageProcessor(size={"height": TILE, "width": TILE})


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "io.safetensors")


# ------------------------------------------------------------------------------------------------ the grid
def slow_grid(width: int, height: int, min_num: int, max_num: int, tile: int) -> tuple[int, int]:
    """The rule in words: of the grids with the closest ratio the smallest, unless the picture fills half of a larger."""
    grids = set()
    for limit in range(min_num, max_num + 1):
        for columns in range(1, limit + 1):
            for rows in range(1, limit + 1):
                if min_num <= columns * rows <= max_num:
                    grids.add((columns, rows))
    gaps = {grid: abs(width / height - grid[0] / grid[1]) for grid in grids}
    ordered = sorted(grids, key=lambda grid: grid[0] * grid[1])
    first, *others = [grid for grid in ordered if gaps[grid] == min(gaps.values())]
    for grid in others:
        if width * height > tile * tile * grid[0] * grid[1] / 2:
            first = grid
    return first


def test_every_row_of_the_golden_grid_table():
    table = json.loads((GOLDEN / "table.json").read_text())
    processor = InternVLImageProcessor()
    for width, height, *results in table["rows"]:
        for (min_num, max_num), (columns, rows, tiles, with_thumbnail) in zip(table["modes"], results, strict=True):
            limits = {"min_num": min_num, "max_num": max_num}
            assert choose_grid(width, height, min_num, max_num, 448) == (columns, rows)
            assert processor.get_number_of_image_patches(height, width, limits) == with_thumbnail
            limits["use_thumbnail"] = False
            assert processor.get_number_of_image_patches(height, width, limits) == tiles


def test_the_grid_equals_a_slow_reimplementation_on_ten_thousand_sizes():
    generator = np.random.default_rng(0)
    sizes = [tuple(size) for size in generator.integers(1, 3000, (8000, 2)).tolist()]
    sizes += [size for n in range(1, 600) for size in ((1, n), (n, 1))]
    # exact ties: multiples of small ratios, on both sides of the area at which the larger grid is taken
    sizes += [
        (a * step, b * step) for a in range(1, 9) for b in range(1, 9) for step in (1, 56, 112, 158, 159, 224, 448)
    ]
    sizes += [(width, 1000) for width in range(200, 1200)]
    modes = [(1, 12), (1, 6), (2, 2), (3, 7)]
    assert len(sizes) > 10_000
    for index, (width, height) in enumerate(sizes):
        min_num, max_num = modes[index % len(modes)]
        expected = slow_grid(width, height, min_num, max_num, 448)
        assert choose_grid(width, height, min_num, max_num, 448) == expected, (width, height, min_num, max_num)


def test_equally_large_grids_that_tie_follow_the_published_order():
    assert choose_grid(1280, 1024, 2, 2, 448) == slow_grid(1280, 1024, 2, 2, 448) == (2, 1)
    assert choose_grid(125, 100, 2, 2, 448) == slow_grid(125, 100, 2, 2, 448) == (1, 2)


# ------------------------------------------------------------------------------------------------ the pixels
@pytest.mark.parametrize("record", CASE["images"], ids=lambda record: record["file"])
def test_golden_tiles(record, golden):
    image, name = Image.open(GOLDEN / record["file"]), "{}x{}".format(*record["size"])
    output = InternVLImageProcessor()(image, max_num=6, return_tensors="pt")
    pixels = output["pixel_values"]
    assert output["num_patches"].tolist() == [record["tiles"]]
    assert pixels.shape == (record["tiles"], 3, 448, 448)
    expected = {
        "sub": pixels[:, :, 5::24, 5::24],
        "corner": pixels[:, :, :8, :8],
        "last_corner": pixels[:, :, -8:, -8:],
        "mean": pixels.mean((2, 3)),
        "std": pixels.std((2, 3), correction=0),
    }
    for key, value in expected.items():
        torch.testing.assert_close(value, golden[f"{name}.{key}"], atol=1e-5, rtol=0, msg=key)
    tiles = bytes_of_tiles(InternVLImageProcessor(max_num=6), image)
    digests = [hashlib.sha256(np.ascontiguousarray(tile).tobytes()).hexdigest()[:16] for tile in tiles]
    assert digests == record["sha256_uint8_hwc"]


@pytest.mark.parametrize("record", CASE["images"], ids=lambda record: record["file"])
@pytest.mark.parametrize(
    ("key", "settings", "offset", "step"),
    [
        ("plain", {"resize_mode": "squash"}, 5, 24),
        ("pad2square", {"resize_mode": "pad"}, 5, 24),
        ("clip224", {"resize_mode": "crop", "size": 224}, 3, 12),
        ("retrieval224", {"resize_mode": "squash", "size": 224}, 3, 12),
    ],
)
def test_golden_single_tiles(record, key, settings, offset, step, golden):
    output = InternVLImageProcessor()(Image.open(GOLDEN / record["file"]), return_tensors="pt", **settings)
    assert output["num_patches"].tolist() == [1]
    expected = golden["{}x{}.{}.sub".format(*record["size"], key)]
    pixels = output["pixel_values"][0, :, offset::step, offset::step]
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(500, 300), (17, 90), (1, 1), (1, 700), (448, 896)])
def test_float_pixels_are_bit_identical_to_the_published_steps(size):
    """Convert, resize, cut, thumbnail, then ToTensor and Normalize in float32, one tile after the other."""
    image = picture(*size)
    columns, rows = slow_grid(*size, 1, 12, 448)
    whole = image.convert("RGB").resize((columns * 448, rows * 448))
    tiles = [whole.crop((x * 448, y * 448, x * 448 + 448, y * 448 + 448)) for y in range(rows) for x in range(columns)]
    if len(tiles) > 1:
        tiles.append(image.resize((448, 448)))
    expected = torch.stack([torch.from_numpy(np.array(tile)).permute(2, 0, 1).float().div(255) for tile in tiles])
    expected = (expected - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert torch.equal(InternVLImageProcessor()(image, return_tensors="pt")["pixel_values"], expected)


def test_a_batch_equals_its_pictures_one_by_one(processor):
    images = [picture(40, 16), picture(16, 16, 1), picture(16, 70, 2)]
    batch = processor(images, return_tensors="pt")
    alone = [processor(image, return_tensors="pt") for image in images]
    assert torch.equal(batch["pixel_values"], torch.cat([output["pixel_values"] for output in alone]))
    assert batch["num_patches"].tolist() == [int(output["num_patches"]) for output in alone]
    assert len(batch["pixel_values"]) == sum(batch["num_patches"])


# ------------------------------------------------------------------------------------------------ threads
@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of PyTorch's threads, and afterwards what it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def threads_of_pictures(monkeypatch) -> list[int]:
    """The thread in which each picture is resized; as many as there should be meet before any of them goes on."""
    threads: list[int] = []
    meeting = threading.Barrier(min(torch.get_num_threads(), 4))

    def fit(*arguments):
        threads.append(threading.get_ident())
        meeting.wait(timeout=20)
        return _fit(*arguments)

    monkeypatch.setattr("internvl.image_processing_internvl._fit", fit)
    return threads


def mixed_pictures() -> list[Any]:
    """Four pictures of several kinds and sizes, the slowest first."""
    grey, small = picture(900, 500).convert("L"), picture(30, 20, 2)
    return [grey, np.asarray(picture(16, 64, 1)) / 255, encoded(small), small.convert("RGBA")]


@pytest.mark.parametrize("settings", [{}, {"resize_mode": "crop"}, {"do_resize": False}, {"max_num": [1, 2, 3, 4]}])
@pytest.mark.parametrize("count", [2, 4, 9])
def test_pixels_and_their_order_do_not_depend_on_the_number_of_threads(
    processor, settings, count, set_threads, request
):
    set_threads(1)
    expected = processor(mixed_pictures(), **settings)
    set_threads(count)
    threads = request.getfixturevalue("threads_of_pictures")
    found = processor(mixed_pictures(), **settings)
    assert len(set(threads)) == min(count, 4), "that many threads took part"
    assert threading.get_ident() not in threads
    assert found["num_patches"] == expected["num_patches"]
    for tile, other in zip(found["pixel_values"], expected["pixel_values"], strict=True):
        np.testing.assert_array_equal(tile, other)


def test_no_threads_are_started_for_one_picture_of_one_tile_or_where_torch_has_one_thread(
    processor, set_threads, monkeypatch
):
    def start(*arguments):
        raise AssertionError("threads were started")

    monkeypatch.setattr("internvl.image_processing_internvl.ThreadPoolExecutor", start)
    set_threads(1)
    assert processor([WIDE] * 4)["num_patches"] == [5] * 4
    set_threads(4)
    assert processor(WIDE, max_num=1)["num_patches"] == [1]
    with pytest.raises(AssertionError, match="threads were started"):
        processor([WIDE] * 4)


class Prepared(torch.utils.data.Dataset):
    """What the processor makes of the same pictures, and in how many threads of its own."""

    def __init__(self, processor: InternVLImageProcessor, threads: list[int]) -> None:
        self.processor, self.threads = processor, threads

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.threads.clear()
        output = self.processor(mixed_pictures(), return_tensors="pt")
        own = threading.get_ident()
        return {**output, "others": torch.tensor(sum(thread != own for thread in self.threads))}


def test_a_forked_worker_of_a_data_loader_starts_no_threads(processor, set_threads, monkeypatch):
    threads: list[int] = []

    def fit(*arguments):
        threads.append(threading.get_ident())
        return _fit(*arguments)

    monkeypatch.setattr("internvl.image_processing_internvl._fit", fit)
    set_threads(4)
    data = Prepared(processor, threads)
    here = data[0]
    assert here["others"] == 4
    for batch in torch.utils.data.DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context="fork"):
        assert batch["others"] == 0
        assert torch.equal(batch["pixel_values"], here["pixel_values"])


def test_the_first_broken_picture_is_named_whichever_thread_meets_it(processor, set_threads):
    set_threads(4)
    half = encoded(picture(64, 64))[:400]
    for _ in range(5):
        with pytest.raises(ValueError, match="Image 2 of 6 "):
            processor([picture(700, 500), half, WIDE, b"", WIDE, half])


def test_pictures_that_share_an_open_file_are_loaded_one_after_the_other(
    processor, set_threads, tmp_path, monkeypatch
):
    """One object given twice, and two objects on one handle; files of their own are loaded at the same time."""
    path, loading, most = tmp_path / "picture.png", [], []
    path.write_bytes(encoded(picture(200, 100)))
    load = PngImagePlugin.PngImageFile.load_prepare

    def slowly(self):
        loading.append(self)
        time.sleep(0.05)
        most.append(len(loading))
        load(self)
        loading.pop()

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", slowly)
    expected = processor(picture(200, 100), return_tensors="pt")["pixel_values"].repeat(4, 1, 1, 1)
    set_threads(4)
    with open(path, "rb") as handle:
        once, first, second = Image.open(path), Image.open(handle), Image.open(handle)
        same = processor([once] * 4, return_tensors="pt")["pixel_values"]
        shared = processor([first, second] * 2, return_tensors="pt")["pixel_values"]
    assert len(most) == 3
    assert max(most) == 1
    own = processor([Image.open(path) for _ in range(4)], return_tensors="pt")["pixel_values"]
    assert max(most) > 1, "four files at the same time"
    for found in (same, shared, own):
        assert torch.equal(found, expected)


def test_without_return_tensors_the_outputs_are_lists(processor):
    output = processor([picture(40, 16), picture(16, 16)])
    assert isinstance(output["pixel_values"], list)
    assert output["num_patches"] == [len(output["pixel_values"]) - 1, 1]
    assert output["pixel_values"][0].shape == (3, TILE, TILE)


def test_do_resize_false_keeps_pictures_as_they_are(processor):
    image = picture(33, 20)
    np.testing.assert_array_equal(one_tile(image), np.asarray(image))
    sizes = [tile.shape for tile in processor([image, picture(9, 9)], do_resize=False)["pixel_values"]]
    assert sizes == [(3, 20, 33), (3, 9, 9)]


def test_do_convert_rgb_false_keeps_four_channels(processor):
    rgba = picture(20, 20).convert("RGBA")
    pixels = processor(rgba, do_convert_rgb=False, image_mean=[0.5] * 4, image_std=[0.5] * 4)["pixel_values"][0]
    assert pixels.shape == (4, TILE, TILE)
    with pytest.raises(ValueError, match=r"`image_mean` has 3 values, the pictures have 4 channels"):
        processor(rgba, do_convert_rgb=False)


# ------------------------------------------------------------------------------------------------ settings
WIDE = picture(128, 32)  # 4 x 1


def test_max_num_one_gives_one_tile_and_no_thumbnail(processor):
    output = processor(WIDE, max_num=1, use_thumbnail=True, return_tensors="pt")
    assert output["num_patches"].tolist() == [1]
    assert processor.get_number_of_image_patches(32, 128, {"max_num": 1}) == 1


@pytest.mark.parametrize(
    ("settings", "tiles"),
    [
        ({}, 5),
        ({"max_num": 2}, 3),
        ({"max_patches": 2}, 3),
        ({"max_dynamic_patch": 2, "max_num": 2}, 3),
        ({"min_num": 5}, 13),
        ({"min_patches": 5, "max_num": 5}, 6),
        ({"min_dynamic_patch": 5, "max_dynamic_patch": 5}, 6),
        ({"use_thumbnail": False}, 4),
        ({"max_num": None}, 5),
        ({"crop_to_patches": True}, 5),
        ({"crop_to_patches": False}, 1),
        ({"resize_mode": "squash"}, 1),
        ({"resize_mode": "crop"}, 1),
        ({"resize_mode": "pad"}, 1),
        ({"do_center_crop": True}, 1),
        ({"size": 128}, 5),
        ({"do_resize": False}, 1),
    ],
    ids=str,
)
def test_settings_per_call_are_honoured_and_counted_alike(processor, settings, tiles):
    assert processor(WIDE, **settings)["num_patches"] == [tiles]
    assert processor.get_number_of_image_patches(32, 128, settings) == tiles
    assert processor(WIDE)["num_patches"] == [5], "a call must not change the processor"


@pytest.mark.parametrize("settings", [{"max_num": 3}, {"max_patches": 3}, {"max_dynamic_patch": 3}], ids=str)
def test_every_spelling_works_at_construction_and_as_attribute(settings):
    processor = InternVLImageProcessor(size=TILE, **settings)
    assert processor.max_num == processor.max_patches == processor.max_dynamic_patch == 3
    processor.max_patches = 2
    assert processor(WIDE)["num_patches"] == [3]
    processor.crop_to_patches = False
    assert processor.resize_mode == "squash"
    assert processor(WIDE)["num_patches"] == [1]


def test_settings_per_picture(processor):
    images = [WIDE, [WIDE, WIDE], WIDE]
    settings = {"max_patches": [1, 2, 4, 4], "min_num": [1, 2, 1, 4], "use_thumbnail": [True, True, False, True]}
    assert processor(images, **settings)["num_patches"] == [1, 3, 4, 5]
    with pytest.raises(ValueError, match=r"`max_num` has 2 values for 3 pictures"):
        processor([WIDE] * 3, max_num=[1, 2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_num": 6, "max_patches": 7}, "`max_patches=7` contradicts `max_num=6`"),
        ({"min_patches": 1, "min_dynamic_patch": 2}, "`min_dynamic_patch=2` contradicts `min_num=1`"),
        ({"crop_to_patches": True, "resize_mode": "pad"}, "`crop_to_patches=True` contradicts `resize_mode='pad'`"),
        ({"do_center_crop": True, "crop_to_patches": True}, "`do_center_crop=True` contradicts"),
        ({"max_num": 0}, "`max_num` must be a whole number from 1 to 256, got 0"),
        ({"max_num": 10**9}, "`max_num` must be a whole number from 1 to 256"),
        ({"min_num": True}, "`min_num` must be a whole number"),
        ({"max_num": "six"}, "`max_num` must be a whole number"),
        ({"max_num": [2.5]}, "`max_num` must be a whole number"),
        ({"min_num": 5, "max_num": 4}, "`min_num` must not exceed `max_num`, got 5 and 4"),
        ({"use_thumbnail": 1}, "`use_thumbnail` must be True or False"),
        ({"resize_mode": "stretch"}, "`resize_mode` must be one of tiles, squash, crop, pad, got 'stretch'"),
        ({"max_image_pixels": 0}, "`max_image_pixels` must be a whole number"),
        ({"size": {"longest_edge": 5}}, "`size` must hold a positive `height` and `width`"),
        ({"size": {"height": 16, "width": 32}}, "`resize_mode='tiles'` needs a square `size`"),
        ({"resize_mode": "crop", "crop_size": 17}, "`crop_size` must lie within `size` \\(16\\)"),
    ],
    ids=str,
)
def test_invalid_and_contradicting_settings_raise(processor, settings, message):
    with pytest.raises(ValueError, match=message):
        processor(WIDE, **settings)
    with pytest.raises(ValueError, match=message):
        InternVLImageProcessor(**{"size": TILE, **settings})


def test_squash_takes_sizes_that_are_not_square(processor):
    output = processor(WIDE, resize_mode="squash", size={"height": 8, "width": 24})
    assert output["pixel_values"][0].shape == (3, 8, 24)


# ------------------------------------------------------------------------------------------------ kinds of input
def test_all_kinds_of_input_give_the_same_pixels(processor, tmp_path):
    image = picture(50, 30)
    array, path, data = np.array(image), tmp_path / "picture.png", encoded(image)
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    kinds = {
        "array (H, W, C)": array,
        "array (C, H, W)": array.transpose(2, 0, 1),
        "tensor (C, H, W)": torch.from_numpy(array).permute(2, 0, 1),
        "float tensor": torch.from_numpy(array).permute(2, 0, 1) / 255,
        "double array": array / 255,
        "64-bit integers": array.astype(np.int64),
        "16 bits": array.astype(np.uint16) * 257,
        "batch of one": array[None],
        "path": path,
        "path as text": str(path),
        "bytes": data,
        "bytearray": bytearray(data),
        "base64": text,
        "data URI": f"data:image/png;base64,{text}",
        "nested": [[image]],
        "tuple": (image,),
        "file not loaded yet": Image.open(path),
    }
    expected = processor(image, return_tensors="pt")["pixel_values"]
    for kind, source in kinds.items():
        assert torch.equal(processor(source, return_tensors="pt")["pixel_values"], expected), kind
        fetched = processor.fetch_images(source)
        assert torch.equal(processor(fetched, return_tensors="pt")["pixel_values"], expected), f"fetched {kind}"


def test_grey_one_row_and_batched_arrays(processor):
    grey = np.array(picture(20, 10).convert("L"))
    expected = np.stack([grey] * 3, axis=-1)
    for array in (grey, grey[..., None], grey[None], torch.from_numpy(grey), processor.fetch_images(grey)):
        np.testing.assert_array_equal(one_tile(array), expected)
    row = np.asarray(picture(20, 1))
    np.testing.assert_array_equal(one_tile(row), row)
    np.testing.assert_array_equal(one_tile(row.transpose(1, 0, 2)), row.transpose(1, 0, 2))
    batch = np.stack([np.asarray(picture(20, 10, seed)) for seed in range(3)])
    assert processor(batch, do_resize=False)["num_patches"] == [1, 1, 1]
    assert len(processor.fetch_images([batch, batch])) == 2
    ambiguous = np.zeros((3, 9, 3), dtype=np.uint8)
    assert one_tile(ambiguous).shape == (9, 3, 3)
    assert one_tile(ambiguous, input_data_format="channels_last").shape == (3, 9, 3)


def test_floats_are_taken_as_scaled_whatever_do_rescale_says(processor):
    array = np.asarray(picture(20, 20)) / np.float32(255)
    rescaled = processor(array, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(array, do_rescale=False, return_tensors="pt")["pixel_values"], rescaled)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((4, 4, 3), 1.5), r"floating-point values from 1.5 to 1.5, expected \[0, 1\]"),
        (np.full((4, 4, 3), np.nan), "floating-point values"),
        (np.full((4, 4, 3), -1), r"outside 0\.\.255"),
        (np.full((4, 4, 3), 256), r"outside 0\.\.255"),
        (np.zeros((5, 5, 5), dtype=np.uint8), "must have 1, 3 or 4 channels"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "not empty"),
        (np.zeros((2, 2, 2, 2, 2), dtype=np.uint8), "must be \\(H, W\\)"),
        (torch.zeros(4), "must be \\(H, W\\)"),
        (Image.new("RGB", (0, 5)), "has no pixels: its size is 0 x 5"),
        (7, "must be a PIL image, an array, a tensor, a path"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_arrays_raise_with_their_position(processor, array, message):
    with pytest.raises(ValueError, match=f"Image 2 of 2.*{message}"):
        processor([WIDE, array])


def test_no_picture_raises(processor):
    with pytest.raises(ValueError, match="`images` holds no picture"):
        processor([])


# ------------------------------------------------------------------------------------------------ special pictures
def test_exif_orientation_turns_files_and_leaves_pil_images():
    image = picture(30, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    data = encoded(image, exif=exif)
    upright = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(one_tile(data), upright)
    np.testing.assert_array_equal(one_tile(Image.open(io.BytesIO(data))), np.asarray(image))


def special_pictures() -> dict[str, Image.Image]:
    image = picture(24, 18)
    alpha = Image.fromarray(np.random.default_rng(1).integers(0, 256, (18, 24), dtype=np.uint8))
    rgba, la = image.convert("RGBA"), image.convert("LA")
    rgba.putalpha(alpha)
    la.putalpha(alpha)
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE)
    palette.info["transparency"] = 0
    return {
        "RGBA": rgba,
        "LA": la,
        "P with transparency": palette,
        "L": image.convert("L"),
        "1": image.convert("1"),
        "CMYK": image.convert("CMYK"),
        "YCbCr": image.convert("YCbCr"),
    }


@pytest.mark.parametrize("kind", special_pictures())
def test_special_modes_become_what_the_published_convert_gives(kind):
    image = special_pictures()[kind]
    np.testing.assert_array_equal(one_tile(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(("kind", "file_format"), [("CMYK", "JPEG"), ("P with transparency", "PNG"), ("LA", "PNG")])
def test_special_modes_read_from_files(kind, file_format, tmp_path):
    path = tmp_path / "picture"
    path.write_bytes(encoded(special_pictures()[kind], file_format))
    np.testing.assert_array_equal(one_tile(path), np.asarray(Image.open(path).convert("RGB")))


def test_16_bits_are_scaled_instead_of_clipped(tmp_path):
    values = np.array([[0, 128, 257, 32768, 65535]], dtype=np.uint16)
    expected = np.rint(values / 257).astype(np.uint8)
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    image.save(tmp_path / "deep.png")
    for source in (image, image.convert("I"), tmp_path / "deep.png", values):
        np.testing.assert_array_equal(one_tile(source)[..., 0], expected)
    with pytest.raises(ValueError, match="32-bit values from -1 to -1, expected 16 bits"):
        one_tile(Image.new("I", (2, 2), -1))
    np.testing.assert_array_equal(one_tile(Image.new("F", (1, 1), 0.5)), [[[128, 128, 128]]])
    with pytest.raises(ValueError, match=r"floating-point values from 200\.0 to 200\.0"):
        one_tile(Image.new("F", (2, 2), 200.0))


def test_animations_give_their_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    path = tmp_path / "animation.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(one_tile(path), np.asarray(frames[0]))
    animation = Image.open(path)
    animation.seek(1)
    np.testing.assert_array_equal(one_tile(animation), np.asarray(frames[1].convert("RGB")))


def test_extreme_shapes_have_a_result_in_every_mode(processor):
    for size in ((1, 1), (1, 20000), (20000, 1)):
        image = picture(*size)
        assert processor(image)["num_patches"] == [1 if size == (1, 1) else 13]
        for mode in ("squash", "crop"):
            (tile,) = bytes_of_tiles(processor, image, resize_mode=mode)
            assert tile.shape == (TILE, TILE, 3)
    with pytest.raises(ValueError, match=r"padded to a square, has 20000 x 20000 .* `max_image_pixels` is 178956970"):
        processor(picture(1, 20000), resize_mode="pad")
    assert bytes_of_tiles(processor, picture(1, 300), resize_mode="pad").shape == (1, TILE, TILE, 3)


@pytest.mark.parametrize("size", [(1, 1000), (37, 400), (400, 37)])
def test_crop_of_a_picture_too_long_to_resize_whole_is_the_same_part_of_it(processor, size):
    image, settings = picture(*size), {"resize_mode": "crop", "size": 64, "crop_size": TILE}
    whole = bytes_of_tiles(processor, image, **settings).astype(int)
    part = bytes_of_tiles(processor, image, **settings, max_image_pixels=size[0] * size[1])
    # Pillow rounds to 8 bits between its two passes, which matters most for noise such as this
    assert np.abs(part - whole).mean() < 1


# ------------------------------------------------------------------------------------------------ broken and hostile
def bomb() -> bytes:
    """A PNG of about 4 KB whose header announces 60000 x 60000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = (60000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    body = zlib.compress(bytes(4_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def long_text_chunk() -> bytes:
    """A PNG whose text chunk unpacks to more than Pillow accepts."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    return encoded(picture(4, 4), pnginfo=info)


def broken_files() -> dict[str, bytes]:
    whole = encoded(picture(64, 64))
    return {
        "bomb.png": bomb(),
        "truncated.png": whole[: len(whole) // 2],
        "truncated.jpg": encoded(picture(64, 64), "JPEG")[:900],
        "empty.png": b"",
        "header_only.png": whole[:20],
        "text.png": b"this is not a picture\n" * 20,
        "long_text.png": long_text_chunk(),
        "program.eps": encoded(picture(8, 8), "EPS"),
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
        with pytest.raises(ValueError, match="Image 1 of 1"):
            processor(source)
        with pytest.raises(ValueError, match="Image 1 of 2"):
            processor.fetch_images([source, WIDE])
    assert limits == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_CHUNK)


def test_a_truncated_file_that_the_caller_opened_is_named(processor, tmp_path):
    path = tmp_path / "half.png"
    path.write_bytes(broken_files()["truncated.png"])
    with pytest.raises(ValueError, match=r"Image 1 of 1 \(.*half.png\) cannot be read as a picture"):
        processor(Image.open(path))


def test_the_pixel_limit_is_checked_before_decoding(processor, monkeypatch):
    data = encoded(picture(40, 30))

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


@pytest.mark.parametrize("source", ["no/such/file.png", Path("no/such/file.png"), "bm90IGEgcGljdHVyZQ==", "."])
def test_names_that_lead_nowhere_raise(processor, source):
    with pytest.raises(ValueError, match="Image 1 of 1"):
        processor(source)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_files_of_many_formats_raise_value_errors_only(processor):
    generator = np.random.default_rng(0)
    failures = 0
    for file_format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO"):
        whole = encoded(picture(20, 20), file_format)
        for _ in range(40):
            data = bytearray(whole)
            for position in generator.integers(0, min(len(data), 200), 8):
                data[position] = generator.integers(0, 256)
            try:
                processor(bytes(data[: generator.integers(1, len(data) + 1)]), max_image_pixels=10_000)
            except ValueError:
                failures += 1
    assert failures > 200


# ------------------------------------------------------------------------------------------------ addresses
class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `pages`, turns `moves` to other addresses; all else is missing."""

    pages: ClassVar[dict[str, bytes]] = {}
    moves: ClassVar[dict[str, str]] = {}
    hosts: ClassVar[list[str]] = []

    def do_GET(self):
        self.hosts.append(self.headers["Host"])
        body, moved = self.pages.get(self.path), self.moves.get(self.path)
        self.send_response(302 if moved else 404 if body is None else 200)
        if moved:
            self.send_header("Location", moved)
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    Handler.pages = {"/good.png": encoded(picture(50, 30)), "/bomb.png": bomb(), "/empty.png": b""}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    home = f"http://127.0.0.1:{server.server_port}"
    Handler.moves = {
        "/moved.png": "/good.png",
        "/inwards.png": f"{home}/good.png",
        "/files.png": "ftp://pictures.test/",
    }
    yield home
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost,pictures.test")
    monkeypatch.delenv("INTERNVL_ALLOW_PRIVATE_HOSTS", raising=False)


@pytest.fixture
def private_hosts(no_proxy, monkeypatch):
    monkeypatch.setenv("INTERNVL_ALLOW_PRIVATE_HOSTS", "1")


@pytest.mark.usefixtures("private_hosts")
def test_addresses_are_fetched(processor, address):
    fetched = bytes_of_tiles(processor, f"{address}/good.png")
    np.testing.assert_array_equal(fetched, bytes_of_tiles(processor, picture(50, 30)))


@pytest.mark.usefixtures("private_hosts")
@pytest.mark.parametrize("page", ["bomb.png", "empty.png", "missing.png"])
def test_bad_addresses_are_named(processor, address, page):
    with pytest.raises(ValueError, match=f"Image 2 of 2 .*127.0.0.1.*{page}"):
        processor([WIDE, f"{address}/{page}"])


@pytest.mark.usefixtures("private_hosts")
def test_downloads_are_limited_in_size(processor, address, monkeypatch):
    monkeypatch.setattr("internvl.image_loading_internvl.DOWNLOAD_BYTES", 100)
    with pytest.raises(ValueError, match="more than 100 bytes"):
        processor(f"{address}/good.png")


@pytest.fixture
def public_name(address, monkeypatch, no_proxy) -> str:
    """The server's address by a name that resolves to a public address, from which connections are turned to it."""
    resolve, connect = socket.getaddrinfo, socket.create_connection

    def fake_resolve(host, port, *arguments, **settings):
        return resolve("8.8.8.8" if host == "pictures.test" else host, port, *arguments, **settings)

    def fake_connect(place, *arguments):
        return connect(("127.0.0.1" if place[0] == "8.8.8.8" else place[0], place[1]), *arguments)

    monkeypatch.setattr(socket, "getaddrinfo", fake_resolve)
    monkeypatch.setattr(socket, "create_connection", fake_connect)
    return address.replace("127.0.0.1", "pictures.test")


@pytest.mark.usefixtures("no_proxy")
@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "127.1", "127.0.0.%31", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"]
)
def test_private_hosts_are_refused_before_a_connection_is_made(processor, address, host):
    Handler.hosts.clear()
    with pytest.raises(
        ValueError, match=r"Image 2 of 2 .* which is not public; INTERNVL_ALLOW_PRIVATE_HOSTS=1 allows"
    ):
        processor([WIDE, address.replace("127.0.0.1", host) + "/good.png"])
    assert Handler.hosts == []


HOSTS = ["10.0.0.1", "172.16.5.4", "192.168.1.1", "169.254.169.254", "100.64.0.1", "[fd00::1]"]


@pytest.mark.usefixtures("no_proxy")
@pytest.mark.parametrize("address_inside", [*(f"http://{host}" for host in HOSTS), "https://10.0.0.1"])
def test_private_ranges_are_refused_by_both_protocols(processor, address_inside):
    with pytest.raises(ValueError, match="which is not public"):
        processor(f"{address_inside}/picture.png")


def test_public_hosts_and_their_redirects_are_fetched_but_not_inwards_nor_by_ftp(processor, public_name):
    Handler.hosts.clear()
    for page in ("good.png", "moved.png"):
        np.testing.assert_array_equal(
            bytes_of_tiles(processor, f"{public_name}/{page}"), bytes_of_tiles(processor, picture(50, 30))
        )
    assert len(Handler.hosts) == 3
    with pytest.raises(ValueError, match=r"127\.0\.0\.1 is at 127\.0\.0\.1, which is not public"):
        processor(f"{public_name}/inwards.png")
    with pytest.raises(ValueError, match="ftp"):
        processor(f"{public_name}/files.png")
    assert len(Handler.hosts) == 5
    assert all(host.startswith("pictures.test") for host in Handler.hosts)


def test_a_proxy_decides_for_itself(processor, address, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", address)
    Handler.pages["http://10.0.0.1/good.png"] = Handler.pages["/good.png"]
    fetched = bytes_of_tiles(processor, "http://10.0.0.1/good.png")
    np.testing.assert_array_equal(fetched, bytes_of_tiles(processor, picture(50, 30)))


# ------------------------------------------------------------------------------------------------ saving and loading
VARIANTS = [
    {},
    {"size": 224, "resize_mode": "crop"},
    {"size": 256, "crop_size": 224, "resize_mode": "crop"},
    {"size": 224, "resize_mode": "squash"},
    {"resize_mode": "pad", "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]},
    {"max_num": 6, "min_num": 2, "use_thumbnail": False, "max_image_pixels": 10**6, "do_rescale": False},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_a_round_trip_keeps_everything(settings, tmp_path):
    processor = InternVLImageProcessor(**settings)
    processor.save_pretrained(tmp_path)
    reloaded = InternVLImageProcessor.from_pretrained(tmp_path)
    assert reloaded.to_dict() == processor.to_dict()
    for name in settings.keys() - {"size", "crop_size"}:
        expected = tuple(settings[name]) if isinstance(settings[name], list) else settings[name]
        assert getattr(reloaded, name) == expected
    image = picture(90, 50)
    first, second = (p(image, return_tensors="pt")["pixel_values"] for p in (processor, reloaded))
    assert torch.equal(first, second)
    assert f'"resize_mode": "{processor.resize_mode}"' in repr(processor)


def test_from_pretrained_arguments_take_precedence_in_any_spelling(tmp_path):
    InternVLImageProcessor(max_num=6, resize_mode="crop", size=224).save_pretrained(tmp_path)
    loaded = InternVLImageProcessor.from_pretrained(tmp_path, max_patches=3, crop_to_patches=True)
    assert (loaded.max_num, loaded.resize_mode, loaded.do_center_crop) == (3, "tiles", False)
    assert dict(loaded.size) == {"height": 224, "width": 224}
    assert InternVLImageProcessor.from_pretrained(tmp_path).resize_mode == "crop"


def test_a_published_preprocessor_file_means_the_centre_crop(tmp_path):
    published = {
        "crop_size": 224,
        "do_center_crop": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "size": 224,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    processor = InternVLImageProcessor.from_pretrained(tmp_path)
    assert processor.resize_mode == "crop"
    assert dict(processor.size) == {"shortest_edge": 224}
    assert processor(WIDE)["pixel_values"][0].shape == (3, 224, 224)


def test_a_file_of_transformers_own_internvl_means_tiles(tmp_path):
    native = {"crop_to_patches": True, "min_patches": 1, "max_patches": 6, "size": {"height": TILE, "width": TILE}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(native))
    processor = InternVLImageProcessor.from_pretrained(tmp_path)
    assert (processor.resize_mode, processor.min_num, processor.max_num) == ("tiles", 1, 6)


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"resize_mode": "crop", "size": 224}, (224, 300)),
        ({"resize_mode": "crop", "size": 224}, (333, 777)),
        ({"resize_mode": "crop", "size": 256, "crop_size": 224}, (900, 500)),
        ({"resize_mode": "squash", "size": 224}, (900, 500)),
        ({}, (448, 448)),
    ],
    ids=str,
)
def test_clip_image_processor_reads_the_saved_file_alike(settings, size, tmp_path):
    """The published InternViT and InternVL-14B cards load the folder with this class."""
    processor = InternVLImageProcessor(**settings)
    processor.save_pretrained(tmp_path)
    image = picture(*size)
    clip = CLIPImageProcessor.from_pretrained(tmp_path)
    pixels = clip(images=image, return_tensors="pt").pixel_values
    expected = processor(image, return_tensors="pt")["pixel_values"]
    if clip.backend == "pil":
        torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)
    else:  # torchvision resizes otherwise, by a few levels of 255 for noise such as this
        assert pixels.shape == expected.shape
        assert (pixels - expected).abs().mean() < 0.01


LOAD = """
import json, sys
# transformers 5.12 and 5.16 hide this class at their top level where torchvision is missing
from transformers.models.auto.image_processing_auto import AutoImageProcessor
processor = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True, max_num=3)
again = AutoImageProcessor.from_pretrained(sys.argv[2], trust_remote_code=True)
assert type(processor).__module__.startswith("transformers_modules"), type(processor)
again.save_pretrained(sys.argv[3])
saved = AutoImageProcessor.from_pretrained(sys.argv[3], trust_remote_code=True)
assert saved.to_dict() == again.to_dict()
from PIL import Image
counts = [int(p(Image.new("RGB", (1344, 448)), return_tensors="pt").num_patches) for p in (processor, again, saved)]
print(json.dumps({"names": [type(p).__name__ for p in (processor, again)], "counts": counts}))
"""


def test_auto_image_processor_loads_a_copied_folder_in_a_fresh_process(root, tmp_path):
    """By `preprocessor_config.json` and by the block nested in `processor_config.json`; saving there is complete."""
    auto_map = {"AutoImageProcessor": "image_processing_internvl.InternVLImageProcessor"}
    settings = {**InternVLImageProcessor(max_num=2).to_dict(), "auto_map": auto_map}
    files = {
        "flat/preprocessor_config.json": settings,
        "nested/processor_config.json": {"processor_class": "InternVLProcessor", "image_processor": settings},
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir()
        path.write_text(json.dumps(content))
        for code in ("image_processing_internvl.py", "image_loading_internvl.py"):
            shutil.copy(root / code, path.parent)
    folders = [str(tmp_path / name) for name in ("flat", "nested", "saved")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, *folders]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == {"names": ["InternVLImageProcessor"] * 2, "counts": [4, 3, 3]}


def test_the_names_that_serving_engines_keep_are_listed():
    assert InternVLImageProcessor.model_input_names == ["pixel_values", "num_patches"]
