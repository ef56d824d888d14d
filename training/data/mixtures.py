"""Mixture files: sources of data in JSON or YAML, with how much of each and how its images are read.

```yaml
sources:
  charts: {data: charts.jsonl, images: ../charts, weight: 2, max_tiles: 12}
  chat:   {data: [owner/chat, more.parquet], weight: 1, jpeg_quality: [75, 100]}
```

Paths are relative to the file. Meta files of the published fine-tuning code are read too: `annotation`, `root`,
`repeat_time`, `max_dynamic_patch` and `data_augment` are other names, and `sources` may be left out.
"""

import json
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import yaml

from ...rows.shards import ENDINGS
from .augmentation import Augmentation


MAX_BYTES = 2**24
YAML_ENDINGS = (".yaml", ".yml")
OTHER_NAMES = {
    "annotation": "data",
    "root": "images",
    "repeat_time": "repeat",
    "max_dynamic_patch": "max_tiles",
    "data_augment": "jpeg_quality",
}
IGNORED = ("length",)  # rows of the source, which are counted
PUBLISHED_QUALITY = (75, 100)  # of `data_augment: true`


@dataclass(frozen=True)
class MixtureSource:
    """One source of a mixture.

    Args:
        name: Of it.
        data: Files or names of data sets.
        images: Folder of the images; None takes the folder of each file.
        weight: Its share of the samples, over the sum of all weights.
        repeat: How often each of its rows is seen before those of others are seen again; a fraction takes a part.
        max_tiles: Most tiles of an image (dialogues); None takes the recipe's.
        video_frames: Fewest and most frames of a video (dialogues); None takes the recipe's.
        jpeg_quality: Lowest and highest quality of JPEG that images are stored in and read again.
        crop_scale: Least and most area of a random crop of each image, as shares of it.
        flip_rate: Share of the images that are mirrored.
    """

    name: str
    data: tuple[str, ...]
    images: str | None = None
    weight: float | None = None
    repeat: float = 1.0
    max_tiles: int | None = None
    video_frames: tuple[int, int] | None = None
    jpeg_quality: tuple[int, int] | None = None
    crop_scale: tuple[float, float] | None = None
    flip_rate: float = 0.0

    def augmentation(self, seed: int) -> Augmentation | None:
        """What is done to its images; None for nothing."""
        if self.jpeg_quality is None and self.crop_scale is None and not self.flip_rate:
            return None
        return Augmentation(self.crop_scale, self.flip_rate, seed, self.jpeg_quality)


def is_mixture(path: str | Path) -> bool:
    """Whether a file is a mixture, and no data: YAML, or one JSON object that holds sources."""
    path = Path(path)
    if path.suffix.lower() in YAML_ENDINGS:
        return True
    if path.suffix.lower() != ".json" or not path.is_file() or path.stat().st_size > MAX_BYTES:
        return False
    content = path.read_bytes()
    if not content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return False
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and (
        "sources" in found or any(isinstance(entry, dict) and "annotation" in entry for entry in found.values())
    )


def read_mixture(path: str | Path) -> tuple[MixtureSource, ...]:
    """Reads a mixture file.

    Args:
        path: Of it.

    Returns:
        The sources, in the order of the file.

    Raises:
        OSError: If it cannot be opened.
        ValueError: If it is none; the message names the source and what is wrong with it.
    """
    path = Path(path)
    entries = _entries(path)
    sources = []
    for name, entry in entries.items():
        try:
            sources.append(_source(name, entry, path.parent))
        except ValueError as error:
            raise ValueError(f"{path}, source `{name}`: {error}") from error
    with_weight = [source for source in sources if source.weight is not None]
    if with_weight and len(with_weight) < len(sources):
        missing = next(source.name for source in sources if source.weight is None)
        raise ValueError(f"{path}, source `{missing}`: other sources have a `weight`, so it needs one as well.")
    return tuple(sources)


def _entries(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has more than the {MAX_BYTES} bytes of a mixture file.")
    text = path.read_text(encoding="utf-8")
    try:
        found = yaml.safe_load(text) if path.suffix.lower() in YAML_ENDINGS else json.loads(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no mixture file: {error}") from error
    if isinstance(found, dict) and "sources" in found:
        if others := [str(key) for key in found if key != "sources"]:
            raise ValueError(f"{path} has `{others[0]}` beside `sources`, which nothing reads.")
        found = found["sources"]
    if isinstance(found, list):
        found = {str(number): entry for number, entry in enumerate(found, start=1)}
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path} must hold `sources`: a list of them, or an object with their names.")
    return {str(name): entry for name, entry in found.items()}


def _source(name: str, entry: Any, folder: Path) -> MixtureSource:
    if not isinstance(entry, dict):
        raise ValueError(f"it must be an object with `data`, got {_shown(entry)}.")
    settings: dict[str, Any] = {}
    for key, value in entry.items():
        if key in IGNORED or value is None:
            continue
        name_here, checked = _checked(str(key), value)
        if name_here in settings:
            raise ValueError(f"`{key}` is given twice, the other time as `{name_here}`.")
        if checked is not None:
            settings[name_here] = checked
    if "data" not in settings:
        raise ValueError("`data` is missing: a file, or a list of them.")
    if "weight" in settings and "repeat" in settings:
        raise ValueError("it has a `weight` and a `repeat`: give one of them.")
    data = tuple(_located(file, folder) for file in settings.pop("data"))
    if "images" in settings:
        settings["images"] = str(folder / settings["images"])
    return MixtureSource(name, data, **settings)


def _checked(key: str, value: Any) -> tuple[str, Any]:
    """The field of `MixtureSource` that a key means, and its value there."""
    if key == "data_augment":
        if not isinstance(value, bool):
            raise ValueError(f"`{key}` must be true or false, got {_shown(value)}.")
        value = list(PUBLISHED_QUALITY) if value else None
    name = OTHER_NAMES.get(key, key)
    if name not in CHECKS:
        raise ValueError(f"`{key}` is not known; known are {', '.join(CHECKS)}.")
    return name, None if value is None else CHECKS[name](key, value)


def _located(file: str, folder: Path) -> str:
    """A file beside the mixture file; names of the Hub and addresses stay."""
    if "://" in file:
        return file
    place = folder / file
    is_pattern = place.parent.is_dir() and not {"*", "?"}.isdisjoint(file)
    is_there = is_pattern or place.exists() or (folder / file.partition(":")[0]).exists()
    return str(place) if is_there or Path(file).suffix.lower() in ENDINGS else file


# --------------------------------------------------------------------------------------------------------- the values
def _shown(value: Any) -> str:
    """A value in a few characters; aliases of YAML make some that no memory could hold if they were written out."""
    return reprlib.repr(value)[:80]


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _texts(key: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"`{key}` must be a file or a list of files, got {_shown(value)}.")
    return tuple(texts)


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"`{key}` must be a folder, got {_shown(value)}.")
    return value


def _above_zero(key: str, value: Any) -> float:
    if not _is_number(value) or not 0 < value < float("inf"):
        raise ValueError(f"`{key}` must be a number above 0, got {_shown(value)}.")
    return float(value)


def _share(key: str, value: Any) -> float:
    if not _is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"`{key}` must be a number from 0 to 1, got {_shown(value)}.")
    return float(value)


def _positive(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{key}` must be a whole number from 1 on, got {_shown(value)}.")
    return value


def _range(least: float, most: float, kind: type = int) -> Callable[[str, Any], tuple[Any, Any]]:
    def check(key: str, value: Any) -> tuple[Any, Any]:
        pair = [value, value] if _is_number(value) else value
        is_pair = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(_is_number, pair))
        if not is_pair or not least <= pair[0] <= pair[1] <= most or any(kind(end) != end for end in pair):
            raise ValueError(f"`{key}` must be two rising numbers from {least} to {most}, got {_shown(value)}.")
        return kind(pair[0]), kind(pair[1])

    return check


CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    "data": _texts,
    "images": _text,
    "weight": _above_zero,
    "repeat": _above_zero,
    "max_tiles": _positive,
    "video_frames": _range(1, 1024),
    "jpeg_quality": _range(1, 100),
    "crop_scale": _range(1e-4, 1, float),
    "flip_rate": _share,
}
