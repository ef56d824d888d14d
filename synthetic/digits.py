"""Real handwritten digits: scikit-learn's bundled set, split by writer.

The file lists the digits writer by writer, so cutting it at one index separates writers. The tail is held out and
never trained on; one writer may straddle the cut, and no more than one.
"""

from functools import lru_cache
from typing import Literal

import numpy as np

from ..extras import extra


Split = Literal["train", "held_out"]

# 1797 digits of 13 writers in the file; the last 30 % are held out.
FIRST_HELD_OUT = 1257


@lru_cache(maxsize=1)
def load_handwritten_digits() -> tuple[np.ndarray, np.ndarray]:
    """Load the digits in the file's order: ink (1797, 8, 8), float32 from 0 to 1, and labels (1797,)."""
    with extra("evaluate"):
        from sklearn.datasets import load_digits

    bundled = load_digits()
    return (bundled.images / 16.0).astype(np.float32), bundled.target.astype(np.int64)


def digit_indices(split: Split) -> range:
    """Return the indices of `split` into the file."""
    if split == "train":
        return range(FIRST_HELD_OUT)
    if split == "held_out":
        return range(FIRST_HELD_OUT, len(load_handwritten_digits()[1]))
    raise ValueError(f"`split` must be 'train' or 'held_out', got {split!r}.")


@lru_cache(maxsize=2)
def digit_indices_by_label(split: Split) -> tuple[tuple[int, ...], ...]:
    """Return ten tuples: the indices of `split` that show 0, 1, ... 9, to draw each digit equally often."""
    labels = load_handwritten_digits()[1]
    return tuple(tuple(i for i in digit_indices(split) if labels[i] == label) for label in range(10))
