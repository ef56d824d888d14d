"""Ways to damage bytes and values."""

import random
from typing import Any


NUMBERS = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000]
ODD_VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    10**9,
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\ud800",
    "../../etc/passwd",
    [],
    [None],
    [[[]]],
    {},
    {"a": {"b": []}},
    "x" * 5000,
]


def damaged(data: bytes, generator: random.Random, number: int) -> bytes:
    """Cut off, with bytes changed, with numbers written over, or with pieces moved, in turn; mostly near the start."""
    changed = bytearray(data)
    kind = number % 4
    if kind == 0:
        return bytes(changed[: generator.randrange(len(changed))])
    reach = len(changed) if generator.random() < 0.5 else min(len(changed), 128)
    for _ in range(generator.choice([1, 2, 8])):
        place = generator.randrange(reach)
        if kind == 1:
            changed[place] = generator.randrange(256)
        elif kind == 2:
            size = generator.choice([1, 2, 4])
            value = generator.choice(NUMBERS) & (256**size - 1)
            changed[place : place + size] = value.to_bytes(size, generator.choice(["little", "big"]))
        else:
            end = generator.randrange(place, min(place + 64, len(changed)) + 1)
            piece, target = changed[place:end], generator.randrange(len(changed))
            changed[target:target] = piece
            if generator.random() < 0.5:
                del changed[place:end]
        reach = max(min(reach, len(changed)), 1)
        if not changed:
            break
    return bytes(changed)


def with_odd_values(value: Any, generator: random.Random, chance: float) -> Any:
    """A copy of nested dictionaries and lists in which some values are odd, missing or doubled."""
    if generator.random() < chance:
        return generator.choice(ODD_VALUES)
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if generator.random() >= chance / 2}
        return {key: with_odd_values(item, generator, chance) for key, item in kept.items()}
    if isinstance(value, list):
        copies = [item for item in value for _ in range(1 + (generator.random() < chance / 2))]
        return [with_odd_values(item, generator, chance) for item in copies]
    return value


__all__ = ["ODD_VALUES", "damaged", "with_odd_values"]
