"""JSON files that somebody else wrote: read whole, and checked key by key before anything relies on them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


LARGEST = 1e100  # sums of squares of larger numbers have no value
SHOWN = 80  # characters of a value in messages


def read_json_file(path: str | Path) -> Any:
    """Reads a JSON file in UTF-8, with or without a byte order mark.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error


def is_finite_number(value: Any) -> bool:
    """Whether a value is a number to compute with: neither NaN, nor infinite, nor beyond all use."""
    return isinstance(value, (int, float)) and -LARGEST <= value <= LARGEST


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 2**53


KINDS: dict[str, Callable[[Any], bool]] = {
    "a text": lambda value: isinstance(value, str),
    "a list of texts": _is_list_of_texts,
    "a text or a list of texts": lambda value: isinstance(value, str) or _is_list_of_texts(value),
    "a number": is_finite_number,
    "a whole number": _is_whole,
    "a number above 0": lambda value: _is_whole(value) and value > 0,
    "true or false": lambda value: isinstance(value, bool),
    "an object": lambda value: isinstance(value, dict),
}


def check_keys(place: str, content: Mapping[str, Any], kinds: Mapping[str, str]) -> None:
    """Checks the values of some keys of a JSON object; a key may be missing, or null.

    Args:
        place: Where the object stands, for messages.
        content: The object.
        kinds: One of `KINDS` by key.

    Raises:
        ValueError: If a value is of another kind; the message names its key.
    """
    for key, kind in kinds.items():
        value = content.get(key)
        if value is not None and not KINDS[kind](value):
            shown = json.dumps(value, default=str)
            shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
            raise ValueError(f'{place}: "{key}" has to be {kind}, not {shown}.')


__all__ = ["KINDS", "check_keys", "is_finite_number", "read_json_file"]
