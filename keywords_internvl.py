"""Keyword arguments: unknown ones are rejected, and renamed ones are read under their old name, with a warning.

`forward` methods pass their keywords on to the decoder, where a misspelt one would be ignored silently.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from functools import wraps
from typing import Any, TypeVar

from transformers.utils import TransformersKwargs


Target = TypeVar("Target", bound=Callable[..., Any])

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


def _warn_renamed(where: str, old: str, new: str, stacklevel: int) -> None:
    warnings.warn(f"{where}: `{old}` is now called `{new}`. Use the new name.", FutureWarning, stacklevel=stacklevel)


def with_new_names(
    keywords: Mapping[str, Any], renamed: Mapping[str, str], where: str, old_wins: bool = False
) -> dict[str, Any]:
    """Renames old keyword arguments or keys of a configuration, with a `FutureWarning` for each.

    Args:
        keywords: Arguments or keys; some may have old names.
        renamed: Maps old names to new ones.
        where: What these names belong to, for messages.
        old_wins: Take the value of the old name if both are given, instead of raising.

    Raises:
        TypeError: If one is given under both names.
    """
    settings = {name: value for name, value in keywords.items() if name not in renamed}
    for old, new in renamed.items():
        if old not in keywords:
            continue
        if new in settings and not old_wins:
            raise TypeError(f"{where} got both `{old}` and `{new}`, which is its new name. Give `{new}` only.")
        _warn_renamed(where, old, new, stacklevel=4)  # the caller of the function with these keywords
        settings[new] = keywords[old]
    return settings


def renamed_arguments(**renamed: str) -> Callable[[Target], Target]:
    """Makes a function or class take keyword arguments under their old names: `@renamed_arguments(old="new")`.

    On a class it also makes attributes of the old names. It stands above `@dataclass`, and on each dataclass that is
    derived from one; there an old name given beside the new one wins, as `dataclasses.replace` passes both.
    """

    def decorate(target: Target) -> Target:
        if not isinstance(target, type):
            return _taking_old_names(target, renamed, target.__qualname__, False)  # type: ignore[return-value]
        own = target.__init__  # type: ignore[misc]
        target.__init__ = _taking_old_names(own, renamed, target.__qualname__, is_dataclass(target))  # type: ignore[misc]
        for old, new in renamed.items():
            attribute = renamed_attribute(new)
            attribute.__set_name__(target, old)
            setattr(target, old, attribute)
        return target

    return decorate


def _taking_old_names(
    function: Callable[..., Any], renamed: Mapping[str, str], where: str, old_wins: bool
) -> Callable[..., Any]:
    @wraps(function)
    def take(*arguments: Any, **keywords: Any) -> Any:
        if not renamed.keys().isdisjoint(keywords):
            keywords = with_new_names(keywords, renamed, f"`{where}`", old_wins)
        return function(*arguments, **keywords)

    return take


class renamed_attribute:
    """Reads and sets an attribute under its old name; in a class body, `old = renamed_attribute("new")`."""

    def __init__(self, new: str) -> None:
        self.new = new

    def __set_name__(self, owner: type, old: str) -> None:
        self.old, self.where = old, f"`{owner.__qualname__}`"

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:  # read from the class, as tools do that list its attributes
            return self
        _warn_renamed(self.where, self.old, self.new, stacklevel=3)
        return getattr(instance, self.new)

    def __set__(self, instance: Any, value: Any) -> None:
        _warn_renamed(self.where, self.old, self.new, stacklevel=3)
        setattr(instance, self.new, value)


def renamed_names(module: Mapping[str, Any], **renamed: str) -> Callable[[str], Any]:
    """Makes a `__getattr__` for the old public names of a module: `__getattr__ = renamed_names(globals(), old="new")`."""

    def find(name: str) -> Any:
        if name not in renamed:
            raise AttributeError(f"module {module['__name__']!r} has no attribute {name!r}")
        _warn_renamed(f"`{module['__name__']}`", name, renamed[name], stacklevel=3)
        return module[renamed[name]]

    return find


__all__ = [
    "KNOWN_KEYWORDS",
    "UnknownKeywordError",
    "refuse_unknown",
    "renamed_arguments",
    "renamed_attribute",
    "renamed_names",
    "with_new_names",
]
