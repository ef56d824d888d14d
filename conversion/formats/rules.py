"""Key tables read both ways.

A rule maps tensors of one format to those of another. In a name, `{}` matches a number between dots and `*` at the end
matches the rest; both sides have the same placeholders in the same order. The inverse of a table is derived from it,
never written.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..readers.tensors import LazyTensor, Tensors, computed


# From all tensors of one side, and the settings of the model, to one of the other side.
TensorFunction = Callable[[Sequence[torch.Tensor], dict[str, Any]], torch.Tensor]


@dataclass(frozen=True)
class TensorRule:
    """One kind of tensor in two formats.

    Args:
        left: Its name or names in the first format.
        right: Its name or names in the second.
        rightward: One function for each name on the right, where the tensors change; None where they are the same.
        leftward: One for each name on the left, the inverse.
    """

    left: tuple[str, ...]
    right: tuple[str, ...]
    rightward: tuple[TensorFunction, ...] | None = None
    leftward: tuple[TensorFunction, ...] | None = None

    @property
    def inverse(self) -> "TensorRule":
        """The rule from right to left."""
        return replace(self, left=self.right, right=self.left, rightward=self.leftward, leftward=self.rightward)


def rename(left: str, right: str) -> TensorRule:
    """The rule of a tensor that has only another name."""
    return TensorRule((left,), (right,))


# This package keeps the names of the published Hub checkpoints.
SAME_NAMES = (rename("*", "*"),)


def inverse(rules: Iterable[TensorRule]) -> tuple[TensorRule, ...]:
    """A table from right to left."""
    return tuple(rule.inverse for rule in rules)


def within(prefix_left: str, prefix_right: str, rules: Iterable[TensorRule]) -> tuple[TensorRule, ...]:
    """A table whose tensors lie deeper: every name behind a prefix."""
    return tuple(
        replace(
            rule,
            left=tuple(prefix_left + name for name in rule.left),
            right=tuple(prefix_right + name for name in rule.right),
        )
        for rule in rules
    )


def names_before(name: str, rules: Iterable[TensorRule]) -> tuple[str, ...]:
    """What a tensor of the right side is called on the left, by the first rule that knows it; empty where none does.

    There are several names where it is made of several tensors.
    """
    for rule in rules:
        for pattern in rule.right:
            match = _compile(pattern).fullmatch(name)
            if match:
                return tuple(_fill(left, match.groups()) for left in rule.left)
    return ()


@dataclass(frozen=True)
class Translation:
    """What a table made of tensors.

    Args:
        tensors: Under their new names.
        origins: New name to old names.
        unknown: Old names that no rule has.
        incomplete: Old names that are missing beside others of the same rule.
        doubled: New names that two rules gave.
    """

    tensors: Tensors
    origins: dict[str, tuple[str, ...]]
    unknown: list[str]
    incomplete: list[str]
    doubled: list[str]


def translate(tensors: Tensors, rules: Sequence[TensorRule], settings: dict[str, Any] | None = None) -> Translation:
    """Gives tensors of the left side the names and shapes of the right.

    The first rule that knows a name is used; functions of rules are given `settings`.
    """
    groups, unknown = _group(tensors, rules)
    done = Translation({}, {}, unknown, [], [])
    for (index, slots), found in groups.items():
        rule = rules[index]
        names = tuple(_fill(pattern, slots) for pattern in rule.left)
        missing = [name for name in names if name not in found]
        if missing:
            done.incomplete.extend(missing)
            continue
        inputs = [tensors[name] for name in names]
        for place, pattern in enumerate(rule.right):
            name = _fill(pattern, slots)
            if name in done.tensors:
                done.doubled.append(name)
            done.tensors[name] = _make(rule, place, inputs, settings or {})
            done.origins[name] = names
    return done


def _group(
    tensors: Tensors, rules: Sequence[TensorRule]
) -> tuple[dict[tuple[int, tuple[str, ...]], set[str]], list[str]]:
    """Names by rule and by what stands in its slots; names without a rule."""
    patterns = [(index, _compile(name)) for index, rule in enumerate(rules) for name in rule.left]
    groups: dict[tuple[int, tuple[str, ...]], set[str]] = {}
    unknown = []
    for name in tensors:
        matches = ((index, pattern.fullmatch(name)) for index, pattern in patterns)
        index, match = next(((i, m) for i, m in matches if m), (None, None))
        if index is None or match is None:
            unknown.append(name)
        else:
            groups.setdefault((index, match.groups()), set()).add(name)
    return groups, unknown


def _compile(pattern: str) -> re.Pattern:
    text = re.escape(pattern).replace(r"\{\}", r"(\d+)")
    return re.compile(text.removesuffix(r"\*") + "(.+)" if text.endswith(r"\*") else text)


def _fill(pattern: str, slots: Sequence[str]) -> str:
    pattern = pattern.removesuffix("*") + "{}" if pattern.endswith("*") else pattern
    return pattern.format(*slots)


def _make(rule: TensorRule, place: int, inputs: list[LazyTensor], settings: dict[str, Any]) -> LazyTensor:
    if rule.rightward is None:
        return inputs[place]
    function = rule.rightward[place]
    return computed(lambda *parts: function(parts, settings), *inputs)
