"""Reading images: every way in and every kind of image."""

import base64
import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from internvl.image_processing_internvl import InternVLImageProcessor

from .fixtures_images import TILE, bytes_of_tiles, encoded, one_tile, png_chunk, png_file
from .fixtures_text import make_image


WIDE = make_image(128, 32)


@pytest.fixture
def processor() -> InternVLImageProcessor:
    return InternVLImageProcessor(size={"height": TILE, "width": TILE})


# ------------------------------------------------------------------------------------------------ kinds of input
def test_all_kinds_of_input_give_the_same_pixels(processor, tmp_path):
    image = make_image(50, 30)
    array, path, data = np.array(image), tmp_path / "image.png", encoded(image)
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
        "copy of a file": Image.open(path).copy(),
        "file address": path.as_uri(),
        "file address of this host": f"file://localhost{path}",
        "percent-encoded file address": f"file://{path}".replace("image", "%69mage"),
        "file object": io.BytesIO(data),
        "file object from its position on": at_position(data),
        "row with bytes": {"bytes": data, "path": None},
        "row with bytes of a file elsewhere": {"bytes": data, "path": "no/such/file.png"},
        "row with a path": {"bytes": None, "path": str(path)},
        "row with a path alone": {"path": path},
        "data URI in capitals": f"DATA:image/png;BASE64,{text}",
        "data URI without base64": "data:image/png," + "".join(f"%{byte:02x}" for byte in data),
        "base64 in lines": base64.encodebytes(data).decode(),
    }
    expected = processor(image, return_tensors="pt")["pixel_values"]
    for kind, source in kinds.items():
        assert torch.equal(processor(source, return_tensors="pt")["pixel_values"], expected), kind
        fetched = processor.fetch_images(source)
        assert torch.equal(processor(fetched, return_tensors="pt")["pixel_values"], expected), f"fetched {kind}"


def at_position(data: bytes) -> io.BytesIO:
    handle = io.BytesIO(b"before" + data)
    handle.seek(6)
    return handle


def test_a_file_object_stays_open_and_where_it_was(processor, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(encoded(make_image(9, 9)))
    with open(path, "rb") as handle, open(path, encoding="latin-1") as text:
        for _ in range(2):
            np.testing.assert_array_equal(one_tile(handle), np.asarray(make_image(9, 9)))
        assert processor([handle] * 4)["num_patches"] == [1] * 4
        handle.read()
        with pytest.raises(ValueError, match=r"Image 1 of 1 is a file at its end.*seek\(0\)"):
            processor(handle)
        with pytest.raises(ValueError, match=r"Image 1 of 1 .*opened as text"):
            processor(text)
    with pytest.raises(ValueError, match=r"Image 1 of 1 .*closed file"):
        processor(handle)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "must hold `bytes` or a `path`"),
        ({"bytes": None, "path": None}, "must hold `bytes` or a `path`"),
        ({"url": "x.png"}, "must hold `bytes` or a `path`"),
        ({"bytes": "text"}, "holds str where"),
        ({"path": b"x"}, "holds bytes where"),
        ({"path": 5}, "holds int where"),
        ({"path": "no/such.png"}, r"\(no/such.png\) does not exist"),
        ({"bytes": b""}, "is empty"),
    ],
    ids=str,
)
def test_a_row_without_an_image_is_named(processor, row, message):
    with pytest.raises(ValueError, match=f"Image 2 of 2 .*{message}"):
        processor([WIDE, row])


def test_grey_one_row_and_batched_arrays(processor):
    grey = np.array(make_image(20, 10).convert("L"))
    expected = np.stack([grey] * 3, axis=-1)
    for array in (grey, grey[..., None], grey[None], torch.from_numpy(grey), processor.fetch_images(grey)):
        np.testing.assert_array_equal(one_tile(array), expected)
    row = np.asarray(make_image(20, 1))
    np.testing.assert_array_equal(one_tile(row), row)
    np.testing.assert_array_equal(one_tile(row.transpose(1, 0, 2)), row.transpose(1, 0, 2))
    batch = np.stack([np.asarray(make_image(20, 10, seed)) for seed in range(3)])
    assert processor(batch, do_resize=False)["num_patches"] == [1, 1, 1]
    assert len(processor.fetch_images([batch, batch])) == 2
    ambiguous = np.zeros((3, 9, 3), dtype=np.uint8)
    assert one_tile(ambiguous).shape == (9, 3, 3)
    assert one_tile(ambiguous, input_data_format="channels_last").shape == (3, 9, 3)


def test_floats_may_leave_their_range_by_errors_of_rounding():
    values = np.array([[-1e-7, 0.5, 1.0000002, 1.0009, -0.0009]], dtype=np.float32)
    for source in (values, values.astype(np.float64), torch.tensor(values), Image.fromarray(values)):
        (tile,) = InternVLImageProcessor(do_resize=False, do_normalize=False)(source)["pixel_values"]
        assert np.rint(tile[0, 0] * 255).tolist() == [0, 128, 255, 255, 0]


def test_floats_are_scaled_already_with_and_without_do_rescale(processor):
    array = np.asarray(make_image(20, 20)) / np.float32(255)
    rescaled = processor(array, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(array, do_rescale=False, return_tensors="pt")["pixel_values"], rescaled)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((4, 4, 3), 1.5), r"floating-point values from 1.5 to 1.5, expected \[0, 1\]"),
        (np.full((4, 4, 3), np.nan), "floating-point values"),
        (np.array([[[0.5, np.nan, 1.0]] * 2] * 2), "floating-point values"),
        (np.full((4, 4, 3), 1.002), "floating-point values"),
        (np.full((4, 4, 3), -np.inf), "floating-point values"),
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


def test_no_image_raises(processor):
    with pytest.raises(ValueError, match="`images` holds no image"):
        processor([])


# ------------------------------------------------------------------------------------------------ special images
def test_exif_orientation_turns_files_and_leaves_pil_images():
    image = make_image(30, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    data = encoded(image, exif=exif)
    upright = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(one_tile(data), upright)
    np.testing.assert_array_equal(one_tile(Image.open(io.BytesIO(data))), np.asarray(image))


def special_images() -> dict[str, Image.Image]:
    image = make_image(24, 18)
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


@pytest.mark.parametrize("kind", special_images())
def test_special_modes_become_what_the_published_convert_gives(kind):
    image = special_images()[kind]
    published = one_tile(image, background_color="none")
    np.testing.assert_array_equal(published, np.asarray(image.convert("RGB")))
    assert np.array_equal(one_tile(image), published) != image.has_transparency_data


@pytest.mark.parametrize(("kind", "file_format"), [("CMYK", "JPEG"), ("P with transparency", "PNG"), ("LA", "PNG")])
def test_special_modes_read_from_files(kind, file_format, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(encoded(special_images()[kind], file_format))
    published = np.asarray(Image.open(path).convert("RGB"))
    np.testing.assert_array_equal(one_tile(path, background_color="none"), published)


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
        image = make_image(*size)
        assert processor(image)["num_patches"] == [1 if size == (1, 1) else 13]
        for mode in ("squash", "crop"):
            (tile,) = bytes_of_tiles(processor, image, resize_mode=mode)
            assert tile.shape == (TILE, TILE, 3)
    with pytest.raises(ValueError, match=r"padded to a square, has 20000 x 20000 .* `max_image_pixels` is 178956970"):
        processor(make_image(1, 20000), resize_mode="pad")
    assert bytes_of_tiles(processor, make_image(1, 300), resize_mode="pad").shape == (1, TILE, TILE, 3)


@pytest.mark.parametrize("size", [(1, 1000), (37, 400), (400, 37)])
def test_crop_of_an_image_too_long_to_resize_whole_is_the_same_part_of_it(processor, size):
    image, settings = make_image(*size), {"resize_mode": "crop", "size": 64, "crop_size": TILE}
    whole = bytes_of_tiles(processor, image, **settings).astype(int)
    part = bytes_of_tiles(processor, image, **settings, max_image_pixels=size[0] * size[1])
    # Pillow rounds to 8 bits between its two passes, which matters most for noise such as this
    assert np.abs(part - whole).mean() < 1


# ------------------------------------------------------------------------------------------------ transparent images
def with_a_transparent_half(mode: str) -> Image.Image:
    """Red on the left; on the right a hidden red, or black, under full transparency."""
    image = Image.new("RGBA", (8, 4), (200, 0, 0, 255))
    image.paste((200, 0, 0, 0), (4, 0, 8, 4))
    if mode in ("P", "RGB", "L"):
        image = Image.new(mode, (8, 4), 1 if mode == "P" else (200, 0, 0) if mode == "RGB" else 200)
        if mode == "P":
            image.putpalette([0, 0, 0, 200, 0, 0])
        image.paste(0 if mode != "RGB" else (0, 0, 0), (4, 0, 8, 4))
        image.info["transparency"] = (0, 0, 0) if mode == "RGB" else 0
        return image
    if mode == "PA":
        palette = Image.new("P", (8, 4), 1)
        palette.putpalette([0, 0, 0, 200, 0, 0])
        palette = palette.convert("PA")
        palette.putalpha(image.getchannel("A"))
        return palette
    return image if mode == "RGBA" else image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "PA", "P", "RGB", "L"])
@pytest.mark.parametrize(
    ("background", "colour"),
    [(None, (255, 255, 255)), ("black", (0, 0, 0)), ("#0a141e", (10, 20, 30)), ([1, 2, 3], (1, 2, 3))],
    ids=str,
)
def test_a_transparent_image_is_read_over_the_chosen_background(mode, background, colour):
    """By default white; per call, at construction, and out of files as well."""
    image = with_a_transparent_half(mode)
    settings = {} if background is None else {"background_color": background}
    sources = [image]
    if mode not in ("RGBa", "PA"):  # which no file holds
        options = {"transparency": image.info["transparency"]} if "transparency" in image.info else {}
        sources += [encoded(image, **options), Image.open(io.BytesIO(encoded(image, **options)))]
    for source in sources:
        processor = InternVLImageProcessor(do_resize=False, **settings)
        for tile in (one_tile(source, **settings), *bytes_of_tiles(processor, source)):
            assert (tile[:, 4:] == colour).all(), "what is transparent"
            assert (tile[:, :4] != colour).any(), "what is opaque"
            np.testing.assert_array_equal(tile[:, :4], np.asarray(image.convert("RGBA"))[:, :4, :3])


@pytest.mark.parametrize("kind", ["array", "float array", "channels first", "tensor"])
def test_arrays_of_four_channels_are_read_over_the_background(kind):
    rgba = np.asarray(with_a_transparent_half("RGBA").resize((10, 6), Image.Resampling.NEAREST))
    sources = {
        "array": rgba,
        "float array": rgba / 255,
        "channels first": rgba.transpose(2, 0, 1),
        "tensor": torch.tensor(rgba).permute(2, 0, 1),
    }
    for background, colour in (("white", (255, 255, 255)), ("lime", (0, 255, 0)), ("none", (200, 0, 0))):
        settings = {"do_resize": False, "do_normalize": False, "background_color": background}
        (tile,) = InternVLImageProcessor(**settings)(sources[kind])["pixel_values"]
        np.testing.assert_array_equal(np.rint(tile[:, 0, 9] * 255), colour)
        np.testing.assert_array_equal(np.rint(tile[:, 0, 0] * 255), (200, 0, 0))


def test_a_transparent_16_bit_value_is_read_over_the_background():
    values = np.array([[0, 30000, 65535]], dtype=np.uint16)
    data = encoded(Image.fromarray(values), transparency=30000)
    assert one_tile(data)[0, :, 0].tolist() == [0, 255, 255]
    assert one_tile(data, background_color="#0000ff")[0].tolist() == [[0, 0, 0], [0, 0, 255], [255, 255, 255]]
    assert one_tile(data, background_color="none")[0, :, 0].tolist() == [0, 117, 255]


def test_a_transparent_16_bit_colour_is_read_over_the_background():
    pixels = struct.pack(">9H", 0x1234, 0x5678, 0x9ABC, 0x3400, 0x7800, 0xBC00, 0xFFFF, 0, 0)
    key = png_chunk(b"tRNS", struct.pack(">3H", 0x1234, 0x5678, 0x9ABC))
    (row,) = one_tile(png_file(3, 1, 16, 2, b"\0" + pixels, key))
    assert row.tolist() == [[255, 255, 255], [0x34, 0x78, 0xBC], [255, 0, 0]]


def test_half_transparent_pixels_are_mixed_and_opaque_ones_keep_their_bytes():
    rgba = make_image(24, 18).convert("RGBA")
    np.testing.assert_array_equal(one_tile(rgba), np.asarray(make_image(24, 18)))
    grey = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert (one_tile(grey) == 127).all()
    assert one_tile(grey, do_convert_rgb=False, image_mean=[0.5] * 4, image_std=[0.5] * 4).shape == (2, 2, 4)


def test_the_background_is_saved_where_it_was_set(tmp_path):
    InternVLImageProcessor().save_pretrained(tmp_path)
    assert "background" not in (tmp_path / "preprocessor_config.json").read_text()
    InternVLImageProcessor(background_color=[1, 2, 3]).save_pretrained(tmp_path)
    processor = InternVLImageProcessor.from_pretrained(tmp_path, do_resize=False)
    (tile,) = bytes_of_tiles(processor, with_a_transparent_half("RGBA"))
    assert (tile[:, 4:] == (1, 2, 3)).all()


NO_COLOURS = ["no colour", "#12", "#ffffff80", "rgb(300, 0, 0)", (1, 2), (1, 2, 256), (1.5, 2, 3), 7, True]


@pytest.mark.parametrize("background", [*NO_COLOURS, np.array([1, 2, 3]), torch.tensor([1, 2, 3])])
def test_what_is_no_colour_is_refused(processor, background):
    for call in (
        lambda: processor(WIDE, background_color=background),
        lambda: InternVLImageProcessor(background_color=background),
    ):
        with pytest.raises(ValueError, match=r"`background_color` (must be|names no colour)"):
            call()


# ----------------------------------------------------------------------------------------------- what errors speak of
def test_files_that_cannot_be_read_are_named(processor, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(encoded(make_image(9, 9)))
    with open(path, encoding="utf-8") as text:  # whose first byte is no text
        for source in (text, io.StringIO("text")):
            with pytest.raises(ValueError, match=r"Image 1 of 1 .*opened as text.*'rb'"):
                processor(source)
    closed = Image.open(path)
    closed.load()
    closed.close()
    with pytest.raises(ValueError, match=r"Image 1 of 1 .*closed image"):
        processor(closed)


def test_control_characters_of_a_name_are_escaped(processor):
    with pytest.raises(ValueError, match=r"Image 1 of 1 \(a\\n\\x1b\.png\) does not exist"):
        processor("a\n\x1b.png")


def test_an_image_beyond_the_limit_of_pillow_is_told_so(processor):
    with pytest.raises(ValueError, match=r"more pixels than Pillow decodes.*Shrink"):
        processor(b"P6 100000 100000 255\n")


def test_grey_images_stay_grey_over_the_background():
    """Without `do_convert_rgb`, for every kind of transparency."""
    settings = {
        "do_convert_rgb": False,
        "image_mean": [0],
        "image_std": [1],
        "max_num": 1,
        "size": {"height": 9, "width": 9},
    }
    grey = InternVLImageProcessor(**settings)
    key = Image.new("L", (9, 9), 77)
    key.info["transparency"] = 77
    deep = Image.new("I;16", (9, 9), 77)
    deep.info["transparency"] = 77
    alpha = Image.new("LA", (9, 9), (77, 0))
    for image in (key, deep, alpha, alpha.convert("La")):
        for colour, value in (("white", 255), ("black", 0)):
            pixels = grey(image, background_color=colour, return_tensors="pt")["pixel_values"]
            assert pixels.shape == (1, 1, 9, 9)
            torch.testing.assert_close(pixels, torch.full_like(pixels, value / 255))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bacground_color": "red"}, "`bacground_color` is no setting"),
        ({"image_std": [0, 1, 1]}, "`image_std` must not be 0"),
        ({"rescale_factor": 0}, "`rescale_factor` must not be 0"),
        ({"image_mean": "x"}, "`image_mean` must be a number"),
        ({"do_resize": "no"}, "`do_resize` must be True or False"),
        ({"size": "x"}, "`size` must be"),
        ({"size": {"height": 10**9, "width": 10**9}}, r"Image 1 of 1 would become 1 tile"),
        ({"size": {"height": 4000, "width": 4000}, "min_num": 12}, r"Image 1 of 1 would become 12 tile"),
        ({"data_format": "channels_last"}, "`data_format` can be"),
        ({"do_pad": True}, "`do_pad` pads nothing here"),
        ({"pad_size": {"height": 99, "width": 99}}, "`pad_size` pads nothing here"),
    ],
)
def test_settings_that_cannot_be_met_are_named(processor, settings, message):
    with pytest.raises(ValueError, match=message):
        processor(make_image(9, 9), **settings)


def test_whole_numbers_serve_as_mean_and_deviation(processor):
    whole, broken = ({"image_mean": [kind(0)] * 3, "image_std": [kind(1)] * 3} for kind in (int, float))
    image = make_image(9, 9)
    assert torch.equal(
        processor(image, **whole, return_tensors="pt")["pixel_values"],
        processor(image, **broken, return_tensors="pt")["pixel_values"],
    )


@pytest.mark.parametrize(
    ("file_format", "named"),
    [("TGA", "a TGA image"), ("PCX", "a PCX image"), ("SGI", "an SGI image"), ("BLP", "a BLP")],
)
def test_rare_formats_are_named_by_their_first_bytes(processor, file_format, named):
    buffer = io.BytesIO()
    make_image(9, 9).convert("P" if file_format == "BLP" else "RGB").save(buffer, file_format)
    with pytest.raises(ValueError, match=named):
        processor(buffer.getvalue())
