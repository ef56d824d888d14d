"""The image processor: published grids and pixels exactly, every setting under every alias, every kind of image."""

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file
from transformers import CLIPImageProcessor

from internvl.image_processing_internvl import InternVLImageProcessor, _fit, choose_grid

from .fixtures_images import TILE, bytes_of_tiles, encoded, one_tile
from .fixtures_processes import run_elsewhere
from .fixtures_text import make_image


GOLDEN = Path(__file__).parent / "golden" / "tiling"
CASE = json.loads((GOLDEN / "case.json").read_text())
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def processor() -> InternVLImageProcessor:
    return InternVLImageProcessor(size={"height": TILE, "width": TILE})


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "io.safetensors")


# ------------------------------------------------------------------------------------------------ the grid
@cache
def slow_grids(min_num: int, max_num: int) -> list[tuple[int, int]]:
    grids = set()
    for limit in range(min_num, max_num + 1):
        for columns in range(1, limit + 1):
            for rows in range(1, limit + 1):
                if min_num <= columns * rows <= max_num:
                    grids.add((columns, rows))
    return sorted(grids, key=lambda grid: grid[0] * grid[1])


def slow_grid(width: int, height: int, min_num: int, max_num: int, tile: int) -> tuple[int, int]:
    """The rule in words: of the grids with the closest ratio the smallest, unless the image fills half of a larger."""
    grids = slow_grids(min_num, max_num)
    gaps = {grid: abs(width / height - grid[0] / grid[1]) for grid in grids}
    closest = min(gaps.values())
    first, *others = [grid for grid in grids if gaps[grid] == closest]
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
    image = make_image(*size)
    columns, rows = slow_grid(*size, 1, 12, 448)
    whole = image.convert("RGB").resize((columns * 448, rows * 448))
    tiles = [whole.crop((x * 448, y * 448, x * 448 + 448, y * 448 + 448)) for y in range(rows) for x in range(columns)]
    if len(tiles) > 1:
        tiles.append(image.resize((448, 448)))
    expected = torch.stack([torch.from_numpy(np.array(tile)).permute(2, 0, 1).float().div(255) for tile in tiles])
    expected = (expected - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert torch.equal(InternVLImageProcessor()(image, return_tensors="pt")["pixel_values"], expected)


def test_a_batch_equals_its_images_one_by_one(processor):
    images = [make_image(40, 16), make_image(16, 16, 1), make_image(16, 70, 2)]
    batch = processor(images, return_tensors="pt")
    alone = [processor(image, return_tensors="pt") for image in images]
    assert torch.equal(batch["pixel_values"], torch.cat([output["pixel_values"] for output in alone]))
    assert batch["num_patches"].tolist() == [int(output["num_patches"]) for output in alone]
    assert len(batch["pixel_values"]) == sum(batch["num_patches"])


# ------------------------------------------------------------------------------------------------ threads
@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of PyTorch's threads and restores it afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def threads_of_images(monkeypatch) -> list[int]:
    """The thread in which each image is resized; as many as there should be meet before any of them goes on."""
    threads: list[int] = []
    meeting = threading.Barrier(min(torch.get_num_threads(), 4))

    def fit(*arguments):
        threads.append(threading.get_ident())
        meeting.wait(timeout=20)
        return _fit(*arguments)

    monkeypatch.setattr("internvl.image_processing_internvl._fit", fit)
    return threads


def mixed_images() -> list[Any]:
    """Four images of several kinds and sizes, the slowest first."""
    grey, small = make_image(900, 500).convert("L"), make_image(30, 20, 2)
    return [grey, np.asarray(make_image(16, 64, 1)) / 255, encoded(small), small.convert("RGBA")]


@pytest.mark.parametrize("settings", [{}, {"resize_mode": "crop"}, {"do_resize": False}, {"max_num": [1, 2, 3, 4]}])
@pytest.mark.parametrize("count", [2, 4, 9])
def test_pixels_and_their_order_do_not_depend_on_the_number_of_threads(
    processor, settings, count, set_threads, request
):
    set_threads(1)
    expected = processor(mixed_images(), **settings)
    set_threads(count)
    threads = request.getfixturevalue("threads_of_images")
    found = processor(mixed_images(), **settings)
    assert len(set(threads)) == min(count, 4), "that many threads took part"
    assert threading.get_ident() not in threads
    assert found["num_patches"] == expected["num_patches"]
    for tile, other in zip(found["pixel_values"], expected["pixel_values"], strict=True):
        np.testing.assert_array_equal(tile, other)


def test_no_threads_are_started_for_one_image_of_one_tile_or_where_torch_has_one_thread(
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
    """Features of the same images, and the number of other threads that took part."""

    def __init__(self, processor: InternVLImageProcessor, threads: list[int]) -> None:
        self.processor, self.threads = processor, threads

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.threads.clear()
        output = self.processor(mixed_images(), return_tensors="pt")
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


def test_the_first_broken_image_is_named_whichever_thread_meets_it(processor, set_threads):
    set_threads(4)
    half = encoded(make_image(64, 64))[:400]
    for _ in range(5):
        with pytest.raises(ValueError, match="Image 2 of 6 "):
            processor([make_image(700, 500), half, WIDE, b"", WIDE, half])


def test_images_that_share_an_open_file_are_loaded_one_after_the_other(processor, set_threads, tmp_path, monkeypatch):
    """One object given twice, and two objects on one handle; separate files are loaded at the same time."""
    path, loading, most = tmp_path / "image.png", [], []
    path.write_bytes(encoded(make_image(200, 100)))
    load = PngImagePlugin.PngImageFile.load_prepare

    def slowly(self):
        loading.append(self)
        time.sleep(0.05)
        most.append(len(loading))
        load(self)
        loading.pop()

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", slowly)
    expected = processor(make_image(200, 100), return_tensors="pt")["pixel_values"].repeat(4, 1, 1, 1)
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
    output = processor([make_image(40, 16), make_image(16, 16)])
    assert isinstance(output["pixel_values"], list)
    assert output["num_patches"] == [len(output["pixel_values"]) - 1, 1]
    assert output["pixel_values"][0].shape == (3, TILE, TILE)


def test_do_resize_false_keeps_images_as_they_are(processor):
    image = make_image(33, 20)
    np.testing.assert_array_equal(one_tile(image), np.asarray(image))
    sizes = [tile.shape for tile in processor([image, make_image(9, 9)], do_resize=False)["pixel_values"]]
    assert sizes == [(3, 20, 33), (3, 9, 9)]


def test_do_convert_rgb_false_keeps_four_channels(processor):
    rgba = make_image(20, 20).convert("RGBA")
    pixels = processor(rgba, do_convert_rgb=False, image_mean=[0.5] * 4, image_std=[0.5] * 4)["pixel_values"][0]
    assert pixels.shape == (4, TILE, TILE)
    with pytest.raises(ValueError, match=r"`image_mean` has 3 values, the images have 4 channels"):
        processor(rgba, do_convert_rgb=False)


# ------------------------------------------------------------------------------------------------ settings
WIDE = make_image(128, 32)  # 4 x 1


@pytest.mark.parametrize(
    ("settings", "tiles"),
    [
        ({}, 5),
        ({"max_num": 1, "use_thumbnail": True}, 1),
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


def test_settings_per_image(processor):
    images = [WIDE, [WIDE, WIDE], WIDE]
    settings = {"max_patches": [1, 2, 4, 4], "min_num": [1, 2, 1, 4], "use_thumbnail": [True, True, False, True]}
    assert processor(images, **settings)["num_patches"] == [1, 3, 4, 5]
    with pytest.raises(ValueError, match=r"`max_num` has 2 values for 3 images"):
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
        ({"allow_local_files": [False]}, "`allow_local_files` must be True or False"),
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
    image = make_image(90, 50)
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
    image = make_image(*size)
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
from transformers import AutoImageProcessor
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
        for code in root.glob("image_*_internvl.py"):
            shutil.copy(code, path.parent)
    folders = [str(tmp_path / name) for name in ("flat", "nested", "saved")]
    result = json.loads(run_elsewhere(tmp_path, "-c", LOAD, *folders).splitlines()[-1])
    assert result == {"names": ["InternVLImageProcessor"] * 2, "counts": [4, 3, 3]}
