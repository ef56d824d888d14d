# Copyright 2026 The InternVL package authors
"""Converts images to pixel tensors for every InternVL configuration.

An image becomes one or more square tiles. `resize_mode` selects how: "tiles" is the dynamic tiling of InternVL-Chat,
"squash" the plain resize of retrieval, "crop" the shortest-side resize and centre crop of classification, "pad" the
pad-to-square of the LLaVA code base. Pillow does all the work, so that the 8-bit pixels equal those of the published
code; torchvision is neither needed nor used. The images of one call share as many threads as PyTorch uses within an
operation (`torch.set_num_threads`, `OMP_NUM_THREADS`; 1 in DataLoader workers).

Not covered: videos (pass the frames as images).

Shapes: T tiles of the whole call, C channels, H and W pixels.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import lru_cache, partial
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling, SizeDict
from transformers.processing_utils import Unpack
from transformers.utils import TensorType

from .image_decoding_internvl import check_image_size, load_image
from .image_download_internvl import download
from .image_loading_internvl import (
    DEFAULT_BACKGROUND,
    ImageSource,
    NestedImages,
    flatten_images,
    local_files_are_read,
    name_images,
    read_image,
    read_nested_images,
    to_pil,
)
from .image_settings_internvl import (
    LOADING_SETTINGS,
    MOST_TILES,
    TILE_SETTINGS,
    InternVLImageProcessorKwargs,
    alias_of,
    canonical_settings,
    check_settings,
    fixed_sizes,
    switch_of,
    tile_limits,
)


MOST_OUTPUT_PIXELS = MOST_TILES * 448 * 448


@lru_cache(maxsize=64)
def _candidate_grids(min_num: int, max_num: int) -> tuple[tuple[int, int], ...]:
    """Lists all (columns, rows) with min_num to max_num tiles, fewest tiles first."""
    # Grids of equal size keep the order in which CPython iterates over a set filled in this order, as in the published
    # code: with min_num = max_num = 2, the 1 x 2 and the 2 x 1 grid tie on 5:4 images.
    grids = {
        (columns, rows)
        for limit in range(min_num, max_num + 1)
        for columns in range(1, limit + 1)
        for rows in range(1, min(limit, max_num // columns) + 1)
        if min_num <= columns * rows
    }
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def choose_grid(width: int, height: int, min_num: int, max_num: int, tile_size: int) -> tuple[int, int]:
    """Chooses the grid (columns, rows) whose aspect ratio is closest to the image's, as the published code does.

    Among equally close grids, a larger one is taken only if the image has more than half of its pixels.
    """
    aspect_ratio, area = width / height, width * height
    best, smallest_gap = (1, 1), float("inf")
    for columns, rows in _candidate_grids(min_num, max_num):
        gap = abs(aspect_ratio - columns / rows)
        has_pixels = area > 0.5 * tile_size * tile_size * columns * rows
        if gap < smallest_gap or (gap == smallest_gap and has_pixels):
            best, smallest_gap = (columns, rows), gap
    return best


# ---------------------------------------------------------------------------------------------------- threads
def _in_threads(work: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
    """Maps `work` over the arguments in threads; results keep their order and the first error in order is raised."""
    threads = min(torch.get_num_threads(), len(arguments[0]))
    if threads < 2:
        return list(map(work, *arguments))
    # Pillow and NumPy release the GIL while they compute. A pool kept for later calls would not survive a fork.
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, *arguments))


def _loading_locks(sources: list[ImageSource]) -> list[Lock]:
    """Gives one lock to PIL images that are the same object or share an open file, whose position moves on loading."""
    locks: dict[int, Lock] = defaultdict(Lock)
    return [locks[id(getattr(source, "fp", None) or source)] for source in sources]


# ---------------------------------------------------------------------------------------------------- resizing
def _pixels(image: Image.Image) -> np.ndarray:
    """Copies an image to an array (C, H, W)."""
    bands = image.getbands()
    pixels = np.empty((len(bands), image.height, image.width), dtype=np.uint8)
    for plane, band in zip(pixels, bands, strict=True):
        plane[...] = np.frombuffer(image.tobytes("raw", band), dtype=np.uint8).reshape(plane.shape)
    return pixels


def _cut_into_tiles(
    image: Image.Image, grid: tuple[int, int], side: int, use_thumbnail: bool, resample: int
) -> list[np.ndarray]:
    """Returns the tiles row by row, then the thumbnail; the tiles are views of one resized image."""
    columns, rows = grid
    canvas = _pixels(image.resize((columns * side, rows * side), resample))
    tiles = [
        canvas[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
        for row in range(rows)
        for column in range(columns)
    ]
    if use_thumbnail and len(tiles) > 1:
        tiles.append(_pixels(image.resize((side, side), resample)))
    return tiles


def _resize_and_crop(
    image: Image.Image, shortest_edge: int, crop_size: SizeDict, resample: int, max_image_pixels: int
) -> Image.Image:
    """Resizes the shortest side and crops the centre; sizes and offsets are rounded as in torchvision."""
    scale = min(image.size)
    width, height = (int(shortest_edge * length / scale) for length in image.size)
    left, top = round((width - crop_size.width) / 2), round((height - crop_size.height) / 2)
    right, bottom = left + crop_size.width, top + crop_size.height
    if width * height <= max_image_pixels:
        return image.resize((width, height), resample).crop((left, top, right, bottom))
    # A 1 x 20000 image would grow to 224 x 4480000: resize only the kept part, which is equal up to rounding.
    across, down = image.width / width, image.height / height
    return image.resize(
        (right - left, bottom - top), resample, box=(left * across, top * down, right * across, bottom * down)
    )


def _pad_to_square(image: Image.Image, background: tuple[int, ...], name: str, max_image_pixels: int) -> Image.Image:
    """Centres the image on a square of the background colour."""
    side = max(image.size)
    check_image_size(side, side, f"{name}, padded to a square,", max_image_pixels)
    canvas = Image.new(image.mode, (side, side), background if len(background) > 1 else background[0])
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def _check_output(tiles: int, size: SizeDict, name: str) -> None:
    """Raises a ValueError for tiles that need more memory than `MOST_TILES` of the published size."""
    height, width = size.height or size.shortest_edge, size.width or size.shortest_edge
    if tiles * height * width > MOST_OUTPUT_PIXELS:
        raise ValueError(
            f"{name} would become {tiles} tile(s) of {height} x {width} pixels, more than {MOST_OUTPUT_PIXELS} pixels "
            "in all. Give a smaller `size` or `max_num`."
        )


def _fit(
    image: Image.Image, name: str, limits: tuple[int, int, bool], settings: Mapping[str, Any]
) -> list[np.ndarray]:
    """Converts one image to tiles (C, H, W) according to `resize_mode`."""
    mode, size, resample, max_pixels = (
        settings[key] for key in ("resize_mode", "size", "resample", "max_image_pixels")
    )
    _check_output(1, size, name)
    if mode == "crop":
        shortest_edge = size.shortest_edge if settings["do_resize"] else min(image.size)
        return [_pixels(_resize_and_crop(image, shortest_edge, settings["crop_size"], resample, max_pixels))]
    if not settings["do_resize"]:
        return [_pixels(image)]
    if mode == "tiles":
        min_num, max_num, use_thumbnail = limits
        grid = choose_grid(*image.size, min_num, max_num, size.height)
        _check_output(grid[0] * grid[1], size, name)
        return _cut_into_tiles(image, grid, size.height, use_thumbnail, resample)
    if mode == "pad":
        mean = np.broadcast_to(settings["image_mean"], len(image.getbands()))
        image = _pad_to_square(image, tuple(int(value * 255) for value in mean), name, max_pixels)
    if image.size != (size.width, size.height):  # Pillow would copy it
        image = image.resize((size.width, size.height), resample)
    return [_pixels(image)]


def _to_float(
    tiles: list[np.ndarray], divisors: list[float], settings: Mapping[str, Any]
) -> list[np.ndarray] | np.ndarray:
    """Scales and normalises tiles (C, H, W) into one array (T, C, H, W), or a list if their sizes differ."""
    if len({tile.shape for tile in tiles}) > 1:
        return _in_threads(lambda tile, divisor: _to_float([tile], [divisor], settings)[0], tiles, divisors)
    output = np.empty((len(tiles), *tiles[0].shape), dtype=np.float32)
    mean, std = (_per_channel(settings[key], key, len(tiles[0])) for key in ("image_mean", "image_std"))

    def fill(values: np.ndarray, tile: np.ndarray, divisor: float) -> None:
        # The three float32 steps of torchvision's ToTensor and Normalize, in place. Fusing two changes the last bits.
        values[...] = tile
        values /= np.float32(divisor)
        if settings["do_normalize"]:
            values -= mean
            values /= std

    _in_threads(fill, list(output), tiles, divisors)
    return output


def _per_channel(value: float | tuple[float, ...], name: str, channels: int) -> np.ndarray:
    """Shapes a mean or deviation as (C, 1, 1)."""
    values = np.atleast_1d(np.asarray(value, dtype=np.float32))
    if len(values) not in (1, channels):
        raise ValueError(f"`{name}` has {len(values)} values, the images have {channels} channels. Give one for each.")
    return values[:, None, None]


class InternVLImageProcessor(PilBackend):
    """Converts images to the tiles that InternVL models take.

    `resize_mode` selects how an image becomes square tiles of `size`:

    - "tiles" (default): a grid of `min_num` to `max_num` tiles whose aspect ratio is closest to the image's, row by
      row, followed by a thumbnail of the whole image if there is more than one tile and `use_thumbnail` is set.
    - "squash": one tile, resized without keeping the aspect ratio (retrieval).
    - "crop": shortest side resized to `size`, then a centre crop of `crop_size` (classification), rounded as in
      torchvision. `CLIPImageProcessor` does the same with the saved file, except that its crop may lie one pixel
      further left or up if an odd number of pixels is cut off.
    - "pad": centred on a square of the mean colour, then resized (LLaVA code base).

    With `do_resize=False` an image is one tile of its own size (after the centre crop in mode "crop").

    An image is a PIL image, an array or tensor ((H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels), a path, the
    bytes of a file, an open binary file (read from its position on), an http(s), file or data URL, a base64 text, or a
    row `{"bytes": ..., "path": ...}` of `datasets`. Images are given alone, in lists, in nested lists or as
    4-dimensional batches. Special cases:

    - Formats: PNG, JPEG (also MPO), WebP, GIF, BMP, TIFF and PPM are decoded, from every source and in PIL images that
      are not loaded yet. Any other format raises a ValueError that names it. No external program is started.
    - EXIF orientation: files, bytes and URLs are turned upright, as in transformers. PIL images are left as they are,
      as in the published code.
    - Transparency (alpha, palettes, PNG's transparent colour): composited over `background_color`, white by default.
      "none" drops alpha, uncovering the colours below, as the published `convert("RGB")` does. Opaque images have the
      same bytes either way.
    - CMYK, YCbCr etc.: Pillow's `convert("RGB")`, without colour profiles.
    - 16 bits (PIL modes "I;16" and "I", arrays of uint16) are scaled to 8 bits: 65535 becomes 255. Other integers must
      be in 0..255. One bit becomes 0 and 255.
    - Floats (PIL mode "F", arrays, tensors) must be in [0, 1] up to rounding errors and are rounded to 8 bits.
      `do_rescale` has no effect on such arrays and tensors, because they are scaled already.
    - Animations: the first frame of files, the current frame of PIL images.
    - Local files: with `allow_local_files=False`, or INTERNVL_ALLOW_LOCAL_FILES=0 in the environment, paths and file
      URLs raise a ValueError without being looked at. A setting of one call cannot allow them again.
    - URLs of private networks (also through a host name, a tunnel or a redirect) raise a ValueError, unless the
      environment variable INTERNVL_ALLOW_PRIVATE_HOSTS is 1. A download may take 60 seconds in all.
    - Broken, empty or truncated data, files that are not images, and images of more than `max_image_pixels` (checked
      before decoding) raise a ValueError with the position of the image, its path or URL, and a description.

    `pixel_values` is (T, 3, H, W) for all images together, `num_patches` the number of tiles per image.
    """

    _auto_class = "AutoImageProcessor"  # makes `save_pretrained` copy the code into the folder
    valid_kwargs = InternVLImageProcessorKwargs
    model_input_names = ["pixel_values", "num_patches"]

    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 448, "width": 448}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    resize_mode = "tiles"
    min_num = 1
    max_num = 12
    use_thumbnail = True
    max_image_pixels = 178_956_970  # Pillow's own limit for an error, twice its `MAX_IMAGE_PIXELS`
    background_color = DEFAULT_BACKGROUND
    allow_local_files = True

    min_patches = min_dynamic_patch = alias_of("min_num")
    max_patches = max_dynamic_patch = alias_of("max_num")
    crop_to_patches = switch_of("crop_to_patches")
    do_center_crop = switch_of("do_center_crop")

    def __init__(self, **kwargs: Unpack[InternVLImageProcessorKwargs]) -> None:
        super().__init__(**canonical_settings(kwargs, type(self).resize_mode))
        tile_limits(1, vars(self))

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> "InternVLImageProcessor":
        """Builds a processor from a saved dictionary; `kwargs` override it under any alias."""
        saved = canonical_settings(image_processor_dict, cls.resize_mode)
        return super().from_dict(saved, **canonical_settings(kwargs, saved.get("resize_mode", cls.resize_mode)))

    def to_dict(self) -> dict[str, Any]:
        """Returns the dictionary to save, which `CLIPImageProcessor` reads too."""
        saved = {**super().to_dict(), "do_center_crop": self.do_center_crop}
        for name in LOADING_SETTINGS:
            if saved[name] == getattr(type(self), name):
                del saved[name]
        return saved

    def fetch_images(
        self, image_url_or_urls: NestedImages, max_seconds: float | None = None, max_bytes: int | None = None
    ) -> NestedImages:
        """Decodes paths, URLs, base64 text and bytes, also nested, to PIL images; the rest and the nesting stay.

        Args:
            image_url_or_urls: The images.
            max_seconds: Longest download of an http(s) URL; see `image_download_internvl.download`.
            max_bytes: Largest one.

        Raises:
            ValueError: If an image cannot be read; the message names it.
        """
        fetch = None
        if max_seconds is not None or max_bytes is not None:
            fetch = partial(download, max_seconds=max_seconds, max_bytes=max_bytes)
        return read_nested_images(image_url_or_urls, self.max_image_pixels, self.allow_local_files, fetch)

    def preprocess(
        self, images: NestedImages, *args: Any, **kwargs: Unpack[InternVLImageProcessorKwargs]
    ) -> BatchFeature:
        """Converts one or more images to tiles.

        Args:
            images: One image or nested lists, see the class.
            *args: Unused.
            **kwargs: Settings of this call, see `InternVLImageProcessorKwargs`.

        Returns:
            `pixel_values` (T, 3, H, W) float32 and `num_patches`, one count per image; lists if `return_tensors` is
            not given.

        Raises:
            ValueError: If a setting is invalid or contradicts another, or an image cannot be read.
        """
        unknown = sorted(kwargs.keys() - self.valid_kwargs.__annotations__.keys())
        if unknown:
            raise ValueError(
                f"`{'`, `'.join(unknown)}` is no setting of `{type(self).__name__}`: leave it out, or see "
                f"`{self.valid_kwargs.__name__}`."
            )
        return super().preprocess(images, *args, **canonical_settings(kwargs, self.resize_mode))

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Counts the tiles of an upright image of a given size, including the thumbnail."""
        settings = self._settings_of_sizes(images_kwargs or {})
        ((min_num, max_num, use_thumbnail),) = tile_limits(1, settings)
        if settings["resize_mode"] != "tiles" or not settings["do_resize"]:
            return 1
        columns, rows = choose_grid(width, height, min_num, max_num, settings["size"].height)
        return columns * rows + int(use_thumbnail and columns * rows > 1)

    def get_fixed_size(self, images_kwargs: dict[str, Any] | None = None) -> tuple[int, int] | None:
        """Returns the (width, height) that whole images are resized to, or None where it depends on the image.

        Raises:
            ValueError: If a setting is invalid, or the size asks for too much memory.
        """
        settings = self._settings_of_sizes(images_kwargs or {})
        if settings["resize_mode"] != "squash" or not settings["do_resize"]:
            return None
        _check_output(1, settings["size"], "An image")
        return settings["size"].width, settings["size"].height

    def _settings_of_sizes(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Completes the settings of one call that decide the number and size of tiles."""
        settings = canonical_settings(settings, self.resize_mode)
        for name in ("resize_mode", "size", "crop_size", "do_resize", *TILE_SETTINGS, "max_image_pixels"):
            settings.setdefault(name, getattr(self, name, None))
        return self._standardize_kwargs(**settings)

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        """Completes and checks the settings of the processor or of one call."""
        check_settings(kwargs)
        mode = kwargs["resize_mode"]
        kwargs = super()._standardize_kwargs(**kwargs)
        size, crop_size = fixed_sizes(mode, kwargs["size"], kwargs["crop_size"])
        return {**kwargs, "do_center_crop": mode == "crop", "size": size, "crop_size": crop_size}

    def _prepare_image_like_inputs(self, images: NestedImages, *args: Any, **kwargs: Any) -> list[ImageSource]:
        """Flattens the images. `_preprocess` decodes each when it is needed, so that few are in memory at a time."""
        return flatten_images(images)

    def _preprocess(
        self, images: list[ImageSource], return_tensors: str | TensorType | None = None, **settings: Any
    ) -> BatchFeature:
        """Converts all images to tiles in one tensor."""
        if not images:
            raise ValueError("`images` holds no image. Give at least one.")
        limits, max_pixels = tile_limits(len(images), settings), settings["max_image_pixels"]
        # A request to a server may choose settings: it can close the processor to local files, and not open it.
        reads_files = local_files_are_read(self.allow_local_files, settings["allow_local_files"])

        def prepare(source: ImageSource, name: str, limit: tuple[int, int, bool], loading: Lock) -> list[np.ndarray]:
            with loading if isinstance(source, Image.Image) or hasattr(source, "read") else nullcontext():
                image = read_image(source, name, max_pixels, reads_files)
                if isinstance(source, Image.Image):
                    load_image(source, name, max_pixels)
            options = (settings[key] for key in ("do_convert_rgb", "input_data_format", "background_color"))
            return _fit(to_pil(image, name, max_pixels, *options), name, limit, settings)

        tiles = _in_threads(prepare, images, name_images(images), limits, _loading_locks(images))
        num_patches = [len(of_image) for of_image in tiles]
        divisor = 1 / settings["rescale_factor"] if settings["do_rescale"] else 1.0
        divisors = [
            255.0 if isinstance(source, (np.ndarray, torch.Tensor)) and "float" in str(source.dtype) else divisor
            for source in images
        ]
        flat_tiles = [tile for of_image in tiles for tile in of_image]
        pixel_values = _to_float(flat_tiles, np.repeat(divisors, num_patches).tolist(), settings)
        if return_tensors is None:
            pixel_values = list(pixel_values)
        return BatchFeature(
            data={"pixel_values": pixel_values, "num_patches": num_patches}, tensor_type=return_tensors
        )


__all__ = ["InternVLImageProcessor", "InternVLImageProcessorKwargs", "choose_grid"]
