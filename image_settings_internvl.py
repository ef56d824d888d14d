# Copyright 2026 The InternVL package authors
"""Settings of the image processor: aliases in published configurations and transformers, defaults, and checks."""

from collections.abc import Mapping
from typing import Any

from transformers.image_utils import ChannelDimension, SizeDict
from transformers.processing_utils import ImagesKwargs

from .image_loading_internvl import DEFAULT_BACKGROUND, Background, parse_background


RESIZE_MODES = ("tiles", "squash", "crop", "pad")
# Aliases of settings in the published configurations (`*_dynamic_patch`) and in transformers (`*_patches`).
ALIASES = {
    "min_patches": "min_num",
    "min_dynamic_patch": "min_num",
    "max_patches": "max_num",
    "max_dynamic_patch": "max_num",
}
# Booleans of transformers and the mode that each stands for.
SWITCHES = {"crop_to_patches": "tiles", "do_center_crop": "crop"}
FLOATS = ("image_mean", "image_std", "rescale_factor")
BOOLEANS = ("allow_local_files", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize")
TILE_SETTINGS = ("min_num", "max_num", "use_thumbnail")
# 256 tiles of 448 x 448 pixels take 617 MB in float32; published checkpoints use 40 at most. Clients of a server may
# choose the number.
MOST_TILES = 256
# Saved only if they differ from the defaults.
LOADING_SETTINGS = ("background_color", "allow_local_files")
OWN_SETTINGS = (*TILE_SETTINGS, *ALIASES, *SWITCHES, "resize_mode", "max_image_pixels", *LOADING_SETTINGS)


class InternVLImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Settings of `InternVLImageProcessor` in addition to those of every image processor.

    `min_num`, `max_num` and `use_thumbnail` may be lists with one value per image.

    Attributes:
        resize_mode: "tiles", "squash", "crop" or "pad".
        min_num: Smallest number of tiles without the thumbnail. Aliases: `min_patches`, `min_dynamic_patch`.
        max_num: Largest number of tiles without the thumbnail. Aliases: `max_patches`, `max_dynamic_patch`.
        use_thumbnail: Whether a thumbnail of the whole image follows its tiles if there is more than one.
        crop_to_patches: True means `resize_mode="tiles"`, False any other mode ("squash" instead of "tiles").
        max_image_pixels: Largest width times height that is decoded.
        background_color: Background of transparent images: a colour name, "#rrggbb", three numbers from 0 to 255, or
            "none", which drops alpha and uncovers the colours below, as the published code does.
        allow_local_files: Whether paths and `file:` URLs are read. A server whose clients name images should load the
            processor with False, which no call can undo.
    """

    resize_mode: str | None
    min_num: int | list[int] | None
    max_num: int | list[int] | None
    use_thumbnail: bool | list[bool] | None
    min_patches: int | list[int] | None
    max_patches: int | list[int] | None
    min_dynamic_patch: int | list[int] | None
    max_dynamic_patch: int | list[int] | None
    crop_to_patches: bool | None
    max_image_pixels: int | None
    background_color: Background | None
    allow_local_files: bool | None


def alias_of(name: str) -> property:
    """Property that reads and sets the attribute `name` under an alias."""
    return property(lambda self: getattr(self, name), lambda self, value: setattr(self, name, value))


def switch_of(name: str) -> property:
    """Property for a boolean of transformers that stands for one of the modes."""

    def assign(self: Any, value: bool) -> None:
        self.resize_mode = canonical_settings({name: value}, self.resize_mode).get("resize_mode", self.resize_mode)

    return property(lambda self: self.resize_mode == SWITCHES[name], assign)


def canonical_settings(settings: Mapping[str, Any], current_mode: str) -> dict[str, Any]:
    """Resolves aliases, turns switches into a `resize_mode`, and drops None."""
    settings = {key: value for key, value in settings.items() if value is not None or key not in OWN_SETTINGS}
    for alias, name in ALIASES.items():
        value = settings.pop(alias, None)
        if value is not None and settings.setdefault(name, value) != value:
            raise ValueError(f"`{alias}={value}` contradicts `{name}={settings[name]}`. Give one of them.")
    mode, fallback = settings.pop("resize_mode", None), None
    for switch, meant in SWITCHES.items():
        value = settings.pop(switch, None)
        if value is not None and mode is not None and bool(value) != (mode == meant):
            raise ValueError(f"`{switch}={value}` contradicts `resize_mode={mode!r}`. Give one of them.")
        if value:
            mode = meant
        elif value is not None and current_mode == meant:
            fallback = "squash"
    for name in FLOATS:
        if settings.get(name) is not None:
            settings[name] = _as_floats(settings[name], name)
    mode = mode or fallback
    settings = settings if mode is None else {**settings, "resize_mode": mode}
    check_settings(settings)
    return settings


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _as_floats(value: Any, name: str) -> float | list[float]:
    """Converts numbers to float: the base class rejects the integers 0 and 1 where it expects floats."""
    try:
        return [float(item) for item in value] if isinstance(value, (list, tuple)) else float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` must be a number, or a list with one for each channel, got {value!r}.") from error


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raises a ValueError for invalid values of this package's settings; settings may be missing."""
    if settings.get("resize_mode", "tiles") not in RESIZE_MODES:
        raise ValueError(f"`resize_mode` must be one of {', '.join(RESIZE_MODES)}, got {settings['resize_mode']!r}.")
    for name, largest in (("min_num", MOST_TILES), ("max_num", MOST_TILES), ("max_image_pixels", float("inf"))):
        for value in _as_list(settings.get(name, 1)):
            if type(value) is not int or not 1 <= value <= largest:
                raise ValueError(f"`{name}` must be a whole number from 1 to {largest}, got {value!r}.")
    for name, value in [
        *((name, settings[name]) for name in BOOLEANS if settings.get(name) is not None),
        *(("use_thumbnail", each) for each in _as_list(settings.get("use_thumbnail", True))),
    ]:
        if type(value) is not bool:
            raise ValueError(f"`{name}` must be True or False, got {value!r}.")
    _check_base_settings(settings)
    parse_background(settings.get("background_color", DEFAULT_BACKGROUND))


def _check_base_settings(settings: Mapping[str, Any]) -> None:
    """Checks settings of every image processor that the base class accepts or reports unclearly."""
    for name in ("image_std", "rescale_factor"):
        if settings.get(name) is not None and 0 in _as_list(settings[name]):
            raise ValueError(f"`{name}` must not be 0, got {settings[name]!r}.")
    size = settings.get("size")
    if not isinstance(size, (int, list, tuple, Mapping, SizeDict, type(None))):
        raise ValueError(f"`size` must be a number or a dict with `height` and `width`, got {size!r}.")
    for name in ("do_pad", "pad_size"):
        if settings.get(name):
            raise ValueError(f"`{name}` pads nothing here: images become tiles of one size. See `resize_mode='pad'`.")
    if settings.get("data_format") not in (None, ChannelDimension.FIRST):
        raise ValueError(f"`data_format` can be `channels_first` only, got {settings['data_format']!r}.")


def tile_limits(count: int, settings: Mapping[str, Any]) -> list[tuple[int, int, bool]]:
    """Returns (min_num, max_num, use_thumbnail) of each image."""
    columns = []
    for name in TILE_SETTINGS:
        values = _as_list(settings[name])
        if isinstance(settings[name], (list, tuple)) and len(values) != count:
            raise ValueError(f"`{name}` has {len(values)} values for {count} images. Give one, or one per image.")
        columns.append(values if len(values) == count else values * count)
    limits = list(zip(*columns, strict=True))
    for min_num, max_num, _ in limits:
        if min_num > max_num:
            raise ValueError(f"`min_num` must not exceed `max_num`, got {min_num} and {max_num}.")
    return limits


def fixed_sizes(mode: str, size: SizeDict, crop_size: SizeDict | None) -> tuple[SizeDict, SizeDict | None]:
    """Returns `size` and `crop_size` in the form with which CLIPImageProcessor does the same as `mode`."""
    height, width = size.height or size.shortest_edge, size.width or size.shortest_edge
    if type(height) is not int or type(width) is not int or height < 1 or width < 1:
        raise ValueError(f"`size` must hold a positive `height` and `width`, or a `shortest_edge`, got {dict(size)}.")
    if mode != "squash" and height != width:
        raise ValueError(f"`resize_mode={mode!r}` needs a square `size`, got {dict(size)}.")
    if mode != "crop":
        return SizeDict(height=height, width=width), crop_size
    crop_size = crop_size or SizeDict(height=height, width=width)
    if not (0 < (crop_size.height or 0) <= height and 0 < (crop_size.width or 0) <= width):
        raise ValueError(f"`crop_size` must lie within `size` ({height}), got {dict(crop_size)}.")
    return SizeDict(shortest_edge=height), crop_size
