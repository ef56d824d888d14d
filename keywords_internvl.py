"""Keyword arguments of models: unknown ones are rejected.

`forward` methods pass their keywords on to the decoder, where a misspelt one would be ignored silently.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers.utils import TransformersKwargs

from .renaming_internvl import renamed_arguments


# Keywords that transformers, its generation and trainers, tokenizers and serving engines pass to any model.
KNOWN_KEYWORDS = frozenset(TransformersKwargs.__annotations__) | {
    "assistant_tokenizer",
    "attention_instances",  # vLLM
    "cache_position",
    "return_dict",
    "token_type_ids",  # from tokenizers that mark pairs of texts; has no meaning here
    "tokenizer",  # `generate` with `stop_strings` hands it on
    "use_cache",
}


class UnknownKeywordError(TypeError, ValueError):
    """Unknown keyword argument: a `TypeError` as Python raises, and the `ValueError` of this package for bad input."""


def refuse_unknown(keywords: Mapping[str, Any], where: str, also: Iterable[str] = ()) -> None:
    """Rejects keyword arguments that are set (not None) but unknown.

    Args:
        keywords: The `**kwargs` of a method.
        where: Name of the method, for the message.
        also: Further names that it accepts.

    Raises:
        UnknownKeywordError: If a keyword is unknown.
    """
    unknown = sorted(name for name, value in keywords.items() if value is not None and name not in KNOWN_KEYWORDS)
    if unknown := [name for name in unknown if name not in also]:
        raise UnknownKeywordError(
            f"{where} takes no keyword {', '.join(f'`{name}`' for name in unknown)}: leave it out, or see its "
            "docstring for those that it takes."
        )


__all__ = ["KNOWN_KEYWORDS", "UnknownKeywordError", "refuse_unknown", "renamed_arguments"]
