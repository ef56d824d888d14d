"""The images of samples: read from the data again, or drawn again where scenes were generated."""

from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from ..image_loading_internvl import read_image, to_pil
from ..image_processing_internvl import InternVLImageProcessor
from .data.items import Item
from .data.opening import open_data
from .generated import image_named
from .protocols.protocol import OWN_DATA, OWN_LAYOUTS, find_protocol, own_protocol


class SampleImages:
    """Finds the image of each sample of a task.

    Args:
        settings: Of the task.
        folder: That relative paths start from, besides the data.
        data: Where the data lie now, if not where `settings` say.
    """

    def __init__(self, settings: dict[str, Any], folder: Path, data: str | None = None) -> None:
        self.settings = settings
        self.folder = folder
        place = str(settings.get("data") or "")
        self.data = data or ("" if "://" in place else place)  # a report alone causes no download

    @cached_property
    def items(self) -> dict[str, Item]:
        """Those of the data, by their names; empty if the data are not there."""
        protocol, task = self.settings.get("protocol"), self.settings.get("task", "")
        if not (self.data and protocol):
            return {}
        try:
            is_own = protocol == OWN_DATA and task in OWN_LAYOUTS
            found = own_protocol(task) if is_own else find_protocol(protocol, task)
            return {item.name: item for item in open_data(found, self.data, None).items}
        except (OSError, ValueError):
            return {}

    def file_of(self, name: str) -> Path | None:
        """The file of an image; None if it is in none of its own, or not there."""
        source = self.items[name].source if name in self.items else None
        candidates = [source] if isinstance(source, Path) else []
        candidates += [Path(root, name) for root in (self.folder, self.data) if root and len(name) < 1000]
        return next((path for path in candidates if _is_file(path)), None)

    def read(self, name: str) -> Image.Image | None:
        """The image of a name; the middle frame of a video. None if it is not there, or cannot be read."""
        if (drawn := image_named(name)) is not None:
            return drawn
        try:
            if name in self.items:
                return self.items[name].read()[0]
            path = self.file_of(name)
            return read_rgb(path) if path else None
        except (OSError, ValueError):
            return None


def read_rgb(path: Path) -> Image.Image:
    """Reads an image as models see it: upright, in colour, on white.

    Raises:
        ValueError: If it cannot be read.
    """
    limit = InternVLImageProcessor.max_image_pixels
    return to_pil(read_image(path, str(path), limit), str(path), limit, True, None)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # names that no file can have
        return False
