"""Keyword arguments that no model takes are refused: forward methods pass theirs on, and a misspelt one would get lost on the way."""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers.utils import TransformersKwargs


# What transformers, its generation and trainers, tokenizers and serving engines hand to any model, besides what it names itself.
KNOWN_KEYWORDS = frozenset(TransformersKwargs.__annotations__) | {
    "attention_instances",  # vLLM
    "cache_position",
    "return_dict",
    "token_type_ids",  # of tokenizers that mark pairs of texts; without a meaning here
    "use_cache",
}


class UnknownKeywordError(TypeError, ValueError):
    """What Python raises for an unknown keyword, and what this package raises for bad input."""


def refuse_unknown(keywords: Mapping[str, Any], where: str, also: Iterable[str] = ()) -> None:
    """Refuses keywords that are given (not None) but known to nobody.

    Args:
        keywords: What a method got beside its own arguments.
        where: The method, for the message.
        also: Further names that it takes.

    Raises:
        UnknownKeywordError: There is one; it is a `TypeError` and a `ValueError`.
    """
    unknown = sorted(name for name, value in keywords.items() if value is not None and name not in KNOWN_KEYWORDS)
    if unknown := [name for name in unknown if name not in also]:
        raise UnknownKeywordError(
            f"{where} takes no keyword {', '.join(f'`{name}`' for name in unknown)}: leave it out, or see its docstring for those that "
            "it takes."
        )


__all__ = ["KNOWN_KEYWORDS", "UnknownKeywordError", "refuse_unknown"]
