"""All formats: which one a source has, and which one a result is written in."""

from ..readers.source import Source
from ..repository.result import Result
from .format import Format
from .llava_formats import LLAVA_FORMATS
from .native_format import NATIVE_FORMATS
from .own_format import OWN_FORMATS, OwnFormat
from .published_format import PUBLISHED_FORMATS
from .raw_formats import RAW_FORMATS


# The first that matches is taken, so that one with more parts stands before one with fewer.
FORMATS: tuple[Format, ...] = (*LLAVA_FORMATS, *OWN_FORMATS, *PUBLISHED_FORMATS, *NATIVE_FORMATS, *RAW_FORMATS)
# Values of `--to`; the first is the default.
TARGETS: dict[str, tuple[OwnFormat, ...]] = {
    formats[0].to: formats for formats in (OWN_FORMATS, PUBLISHED_FORMATS, NATIVE_FORMATS)
}


def recognise(source: Source) -> Format:
    """Finds the format of a source.

    Raises:
        ValueError: If no format matches; the message lists those that are supported.
    """
    for candidate in FORMATS:
        if candidate.matches(source):
            return candidate
    has_config = f"`model_type` {source.config.get('model_type')!r}" if source.config else "no config.json"
    names = ", ".join(list(source.tensors)[:3])
    raise ValueError(
        f"The layout of `{source.folder}` is unknown: it has {has_config} and {len(source.tensors)} tensors "
        f"({names}...). Supported: {'; '.join(candidate.describe() for candidate in FORMATS)}."
    )


def find_target(to: str, result: Result) -> OwnFormat:
    """Finds the format in which `to`, one of `TARGETS`, writes a kind of model.

    Raises:
        ValueError: If it has no place for such a model.
    """
    candidates = TARGETS[to]
    for candidate in candidates:
        if candidate.result.model_class is result.model_class:
            return candidate
    kinds = " and ".join(dict.fromkeys(candidate.result.kind for candidate in candidates))
    raise ValueError(
        f"This model cannot be written as {candidates[0].title}: it has no place for a {result.model_class.__name__}, "
        f"only for {kinds} models."
    )
