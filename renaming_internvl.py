"""Renamed arguments, attributes, module names and options are read under their old names, with a `FutureWarning`.

Nothing here imports torch or transformers, because command lines use it before they wait for them.
"""

import argparse
import warnings
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import wraps
from typing import Any, TypeVar


Target = TypeVar("Target", bound=Callable[..., Any])


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
        own: Any = target
        own.__init__ = _taking_old_names(own.__init__, renamed, target.__qualname__, is_dataclass(target))
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
        if any(old in keywords for old in renamed):  # which torch.compile traces
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


class RenamedOption(argparse.Action):
    """Reads an option of a command line under its old name.

    `add_argument("--old", dest="new", action=RenamedOption, help=argparse.SUPPRESS)` after the option `--new`.
    """

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        new = f"--{self.dest.replace('_', '-')}"
        _warn_renamed(f"`{parser.prog}`", option or self.dest, new, stacklevel=2)
        setattr(namespace, self.dest, values)


def renamed_names(module: Mapping[str, Any], **renamed: str) -> Callable[[str], Any]:
    """Makes the `__getattr__` of a module with renamed public names: `renamed_names(globals(), old="new")`."""

    def find(name: str) -> Any:
        if name not in renamed:
            raise AttributeError(f"module {module['__name__']!r} has no attribute {name!r}")
        _warn_renamed(f"`{module['__name__']}`", name, renamed[name], stacklevel=3)
        return module[renamed[name]]

    return find
