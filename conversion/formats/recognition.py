"""Which layout a source has, by its content."""

from ..readers.source import Source
from .format import Layout
from .hub_formats import HUB_LAYOUTS
from .llava_formats import LLAVA_LAYOUTS
from .native_settings import NATIVE_LAYOUTS
from .raw_formats import RAW_LAYOUTS


# The first that matches is taken, so that one with more parts stands before one with fewer.
LAYOUTS = (*LLAVA_LAYOUTS, *HUB_LAYOUTS, *NATIVE_LAYOUTS, *RAW_LAYOUTS)


def recognise(source: Source) -> Layout:
    """The layout of a source.

    Args:
        source: An opened source.

    Returns:
        The layout.

    Raises:
        ValueError: If no layout fits; the message says what is supported.
    """
    for layout in LAYOUTS:
        if layout.matches(source):
            return layout
    has_config = f"`model_type` {source.config.get('model_type')!r}" if source.config else "no config.json"
    names = ", ".join(list(source.tensors)[:3])
    raise ValueError(
        f"The layout of `{source.folder}` is unknown: it has {has_config} and {len(source.tensors)} tensors ({names}...). Supported: "
        f"{'; '.join(map(_describe, LAYOUTS))}."
    )


def _describe(layout: Layout) -> str:
    keys = f"config.json with `{'` or `'.join(layout.config_keys)}`, " if layout.config_keys else ""
    return f"{layout.name} ({keys}tensors {', '.join(layout.tensor_names)})"
