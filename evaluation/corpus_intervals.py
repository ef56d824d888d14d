"""Intervals of figures that are no mean over samples, but are computed from sums over them: BLEU and mean IoU."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


DRAWS = 1000
LARGEST_DRAW = 2**24  # numbers in memory at a time


def interval_of_sums(
    figure: Callable[[np.ndarray], np.ndarray], parts: np.ndarray, level: float = 0.95, draws: int = DRAWS
) -> list[float] | None:
    """Computes a bootstrap interval (percentiles); samples are drawn with replacement, always the same ones.

    Args:
        figure: Computes the figure of sets of samples (sets,) from the sums of their parts (sets, ...).
        parts: (samples, ...), what each sample adds to the sums.
        level: Share of intervals that should hold the figure of the population.
        draws: How many sets are drawn.

    Returns:
        Its ends; None of one sample, which does not show how much samples differ.
    """
    samples = len(parts)
    if samples < 2:
        return None
    rows = parts.reshape(samples, -1).astype(np.float64)
    rng = np.random.default_rng(0)
    step = max(1, LARGEST_DRAW // max(samples, rows.shape[1]))
    found = []
    for start in range(0, draws, step):
        times = rng.multinomial(samples, np.full(samples, 1 / samples), size=min(step, draws - start))
        found.append(figure((times @ rows).reshape(-1, *parts.shape[1:])))
    low, high = np.quantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return [float(low), float(high)]


def at_most_one(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Cuts the intervals of metrics that are shares, whatever their scores are, at 1."""
    return {
        name: {**metric, "interval": metric["interval"] and [min(end, 1.0) for end in metric["interval"]]}
        for name, metric in metrics.items()
    }


__all__ = ["at_most_one", "interval_of_sums"]
