"""Intervals of means and tests of paired differences, on scores of single samples; pure functions.

Samples of one cluster, as a rule questions about one image, are not independent of each other: only clusters are.
Nothing here assumes a model of the scores, and everything is deterministic: the bootstrap has a seed.

| scores | interval of a mean | interval of a difference | no difference? | equivalent? |
|---|---|---|---|---|
| 0 or 1 | Wilson | Tango | exact McNemar | Tango's score test |
| 0 or 1, clustered | Wilson, effective size | Tango, effective size | bootstrap of clusters | Tango, effective size |
| others | t, freed of skewness | bootstrap of clusters | bootstrap of clusters | bootstrap of clusters |

"Effective size" is the number of independent samples that would have the variance which the clusters show. Where
hardly any cluster differs, resampling shows nothing: exact tests take its place, see `_rare_differences`.

Sources: Wilson, JASA 22 (1927); Tango, Statistics in Medicine 17 (1998), the score interval of a difference of paired
shares; Hall, JRSS B 54 (1992), removal of skewness; Bell and McCaffrey, Survey Methodology 28 (2002), variance and
degrees of freedom with few and unequal clusters; Hall, JRSS B 50 (1988), symmetric intervals of the bootstrapped t.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from ..extras import extra


with extra("evaluate"):
    from scipy import optimize, stats


Floats = NDArray[np.float64]
LEVEL = 0.95
POWER = 0.8
ROUNDS = 10_000  # of the bootstrap
MOST_DRAWS = 100_000_000  # clusters times rounds; beyond them there are fewer rounds
FEWEST_ROUNDS = 1_000
DRAWS_AT_ONCE = 2_000_000
RARE = 10  # clusters that differ, below which a bootstrap of many others shows nothing


# --------------------------------------------------------------------------------------------------------------- means
@dataclass(frozen=True)
class _Mean:
    """A mean with the standard error, degrees of freedom and skewness that its clusters show."""

    value: float
    error: float
    freedom: float
    skewness: float
    samples: int
    clusters: int

    @property
    def is_clustered(self) -> bool:
        return self.clusters < self.samples

    def quantile(self, share: float, is_normal: bool) -> float:
        """Of Student's t, or of the normal distribution if the variance is not estimated."""
        return float(stats.norm.ppf(share) if is_normal else stats.t.ppf(share, self.freedom))

    def effective_size(self, variance: float) -> float:
        """Number of independent samples, of this variance each, whose mean has the same error."""
        if variance <= 0 or self.clusters < 2:  # what one cluster repeats, it may always repeat
            return self.clusters
        design_error = self.error * math.sqrt(1 - 1 / self.clusters)
        return variance / design_error**2 if design_error else self.samples


def _cluster_sums(scores: Floats, clusters: Sequence[Hashable] | None) -> tuple[Floats, Floats]:
    """Sum of the scores and number of samples of every cluster."""
    if clusters is None:
        return scores, np.ones(len(scores))
    if len(clusters) != len(scores):
        raise ValueError(f"Every sample needs a cluster, got {len(scores)} scores and {len(clusters)} clusters.")
    numbers: dict[Hashable, int] = {}
    index = [numbers.setdefault(cluster, len(numbers)) for cluster in clusters]
    sums: Floats = np.bincount(index, weights=scores).astype(float)
    return sums, np.bincount(index).astype(float)


def _mean_of(sums: Floats, sizes: Floats) -> _Mean:
    total, count = sizes.sum(), len(sums)
    value = float(sums.sum() / total)
    if count < 2:
        return _Mean(value, math.inf, 1.0, 0.0, int(total), count)
    share = sizes / total
    residuals = sums - value * sizes
    error = math.sqrt((residuals**2 / (1 - share)).sum()) / total
    leverage = share**2 / (1 - share)
    freedom = 1 / ((share**2).sum() + leverage.sum() ** 2 - (leverage**2).sum())
    spread = math.sqrt((residuals**2).mean())
    skewness = ((residuals / spread) ** 3).mean() if spread else 0.0
    return _Mean(value, error, float(freedom), float(skewness), int(total), count)


def mean_interval(
    scores: Sequence[float], clusters: Sequence[Hashable] | None = None, level: float = LEVEL
) -> tuple[float, float]:
    """Computes a confidence interval of the mean of samples.

    Args:
        scores: Of the samples. If all of them are 0 or 1, the interval lies within 0 and 1.
        clusters: What each sample belongs to; None if all are independent.
        level: How often the interval is to hold the mean of all samples that could have been drawn.

    Returns:
        Its ends; infinite where one cluster alone is to show how much clusters differ.

    Raises:
        ValueError: There are no scores, one is no finite number, or not every sample has a cluster.
    """
    values = _checked(scores)
    mean = _mean_of(*_cluster_sums(values, clusters))
    share = (1 + level) / 2
    if _is_binary(values):
        size = mean.effective_size(mean.value * (1 - mean.value))
        return _wilson(mean.value, size, mean.quantile(share, not mean.is_clustered))
    if math.isinf(mean.error):
        return -math.inf, math.inf
    high, low = (_without_skewness(mean, sign * mean.quantile(share, False)) for sign in (-1, 1))
    return mean.value - low * mean.error, mean.value - high * mean.error


def _wilson(share: float, size: float, quantile: float) -> tuple[float, float]:
    weight = quantile**2 / size
    centre = (share + weight / 2) / (1 + weight)
    reach = math.sqrt(weight * (share * (1 - share) + weight / 4)) / (1 + weight)
    return max(0.0, centre - reach), min(1.0, centre + reach)


def _without_skewness(mean: _Mean, quantile: float) -> float:
    """The value of t at which its transform by Hall, which has no skewness, is a quantile."""
    if abs(mean.skewness) < 1e-6:
        return quantile
    root = math.sqrt(mean.clusters)
    inner = 1 + mean.skewness * (quantile / root - mean.skewness / (6 * mean.clusters))
    return 3 * root / mean.skewness * (float(np.cbrt(inner)) - 1)


def _checked(scores: Sequence[float]) -> Floats:
    values = np.asarray(scores, dtype=float)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError("Scores must be a list of finite numbers that is not empty.")
    return values


def _is_binary(values: Floats) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


# --------------------------------------------------------------------------------------------------------------- tests
def exact_mcnemar(gained: int, lost: int) -> float:
    """Computes the two-sided p of the exact McNemar test: samples that only the second, only the first got right."""
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p values of several tests after Holm, in their order: those up to 0.05 hold all together at 95 %."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def tango_statistic(gained: float, lost: float, size: float, difference: float) -> float:
    """Computes Tango's score statistic of the hypothesis that two paired shares differ by `difference`; asymptotically
    a standard normal variable. `gained`, `lost` and `size` need not be whole.
    """
    a, c = 2 * size, -lost * difference * (1 - difference)
    b = -gained - lost + (2 * size - gained + lost) * difference
    share = (math.sqrt(max(0.0, b**2 - 4 * a * c)) - b) / (2 * a)
    variance = size * (2 * share + difference * (1 - difference))
    gap = gained - lost - size * difference
    return gap / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, gap) if gap else 0.0


def bootstrapped_t(sums: Floats, sizes: Floats, rounds: int = ROUNDS, seed: int = 0) -> Floats:
    """Draws clusters with replacement, and computes in each round how many of the round's standard errors its mean is
    off the mean of all.

    Args:
        sums: (clusters,), sum of the scores of each.
        sizes: (clusters,), number of its samples.
        rounds: How many; fewer where clusters are many.
        seed: Of the draws.

    Returns:
        (rounds,), sorted. Rounds without any variance count as infinitely far, unless their mean is the same.
    """
    count = len(sums)
    rounds = max(FEWEST_ROUNDS, min(rounds, MOST_DRAWS // count))
    moments = np.stack([sums, sizes, sums**2, sums * sizes, sizes**2], axis=1)
    mean, rng = sums.sum() / sizes.sum(), np.random.default_rng(seed)
    found = []
    for start in range(0, rounds, block := max(1, DRAWS_AT_ONCE // count)):
        num_rows = min(block, rounds - start)
        drawn = rng.integers(count, size=(num_rows, count)) + count * np.arange(num_rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=num_rows * count).reshape(num_rows, count)
        total, size, squares, products, square_sizes = (times @ moments).T
        means = total / size
        variance = (squares - 2 * means * products + means**2 * square_sizes) * count / (count - 1)
        gap = means - mean
        # What is left of a variance of zero is rounding, about 1e-16 of its terms.
        error = np.sqrt(np.where(variance > 1e-12 * squares, variance, 0.0)) / size
        same = np.abs(gap) <= 1e-12 * np.abs(mean)
        with np.errstate(divide="ignore", invalid="ignore"):
            found.append(np.where(same, 0.0, gap / error))
    return np.sort(np.concatenate(found))


# --------------------------------------------------------------------------------------------------------- comparisons
@dataclass(frozen=True)
class Comparison:
    """The second of two paired results against the first.

    Args:
        first: Mean of the first.
        second: Mean of the second.
        interval: 95 % interval of `difference`.
        p_value: Of no difference, two-sided.
        p_equivalent: Of a difference of the margin or more, the larger of two one-sided tests; None without a margin.
        detectable: The smallest difference that is found with probability 0.8, given how much these samples differ.
        samples: How many.
        clusters: How many.
        test: Name of the test behind `p_value`.
    """

    first: float
    second: float
    interval: tuple[float, float]
    p_value: float
    p_equivalent: float | None
    detectable: float
    samples: int
    clusters: int
    test: str

    @property
    def difference(self) -> float:
        """The second's mean less the first's."""
        return self.second - self.first


# Of a difference: its interval, p, p of equivalence for a margin, and the name of the test.
_Found = tuple[tuple[float, float], float, Callable[[float], float], str]


def compare_scores(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    margin: float | None = None,
    seed: int = 0,
) -> Comparison:
    """Compares the scores of two models for the same samples.

    Args:
        first: Scores of the one.
        second: Scores of the other for the same samples, in the same order.
        clusters: What each sample belongs to; None if all are independent.
        margin: The difference, in units of the scores, below which the two are equivalent.
        seed: Of the bootstrap.

    Raises:
        ValueError: The lists differ in length, are empty or hold no finite numbers, or the margin is not positive.
    """
    scores = _checked(first), _checked(second)
    if len(scores[0]) != len(scores[1]):
        raise ValueError(f"Paired scores are of the same samples, got {len(scores[0])} and {len(scores[1])}.")
    if margin is not None and not margin > 0:
        raise ValueError(f"A margin must be above 0, got {margin}.")
    differences = scores[1] - scores[0]
    sums, sizes = _cluster_sums(differences, clusters)
    mean = _mean_of(sums, sizes)
    num_changed = np.count_nonzero(sums)
    is_binary = all(map(_is_binary, scores))
    if is_binary:
        interval, p_value, p_beyond, test = _binary_difference(differences, sums, sizes, mean, seed)
    elif len(sums) < 2:
        interval, p_value, p_beyond, test = (-math.inf, math.inf), 1.0, lambda _: 1.0, BOOTSTRAP
    elif mean.error <= 1e-12 * abs(mean.value) or (num_changed < RARE and num_changed <= len(sums) / 2):
        usual = mean.value if num_changed == len(sums) else 0.0
        interval, p_value, p_beyond, test = _rare_differences(sums, float(np.ptp(np.concatenate(scores))), usual)
    else:
        interval, p_value, p_beyond, test = _resampled_difference(sums, sizes, mean, seed)
    detectable = _detectable(mean, is_binary) if len(sums) > 1 else math.inf
    p_equivalent = None if margin is None else max(p_beyond(-margin), p_beyond(margin))
    return Comparison(
        first=float(scores[0].mean()),
        second=float(scores[1].mean()),
        interval=interval,
        p_value=p_value,
        p_equivalent=p_equivalent,
        detectable=detectable,
        samples=mean.samples,
        clusters=mean.clusters,
        test=test,
    )


def _binary_difference(differences: Floats, sums: Floats, sizes: Floats, mean: _Mean, seed: int) -> _Found:
    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    size = mean.effective_size(float(differences.var()))
    scale = size / mean.samples

    def statistic(value: float) -> float:
        return tango_statistic(gained * scale, lost * scale, size, value)

    quantile = mean.quantile((1 + LEVEL) / 2, not mean.is_clustered)

    def end(sign: int) -> float:
        outside = sign * (1 - 1e-12)
        if sign * statistic(outside) > -quantile:  # a difference of all samples cannot be excluded
            return float(sign)
        return float(optimize.brentq(lambda value: statistic(value) + sign * quantile, mean.value, outside))

    def p_beyond(margin: float) -> float:
        gap = statistic(max(-1.0, min(1.0, margin))) * -math.copysign(1, margin)
        return float(stats.t.sf(gap, mean.freedom) if mean.is_clustered else stats.norm.sf(gap))

    if not mean.is_clustered:
        return (end(-1), end(1)), exact_mcnemar(gained, lost), p_beyond, "exact McNemar"
    if np.count_nonzero(sums) < RARE:
        return (end(-1), end(1)), _sign_flips(sums), p_beyond, SIGN_FLIPS
    drawn = bootstrapped_t(sums, sizes, seed=seed)
    return (end(-1), end(1)), _p_of(drawn, mean), p_beyond, BOOTSTRAP


def _resampled_difference(sums: Floats, sizes: Floats, mean: _Mean, seed: int) -> _Found:
    drawn = bootstrapped_t(sums, sizes, seed=seed)
    reach = float(np.quantile(np.abs(drawn), LEVEL, method="higher")) * mean.error

    def p_beyond(margin: float) -> float:
        gap = (mean.value - margin) / mean.error
        return float((1 + ((drawn <= gap) if margin > 0 else (drawn >= gap)).sum()) / (1 + len(drawn)))

    return (mean.value - reach, mean.value + reach), _p_of(drawn, mean), p_beyond, BOOTSTRAP


BOOTSTRAP = "bootstrap"
SIGN_FLIPS = "exact sign flips"


def _p_of(drawn: Floats, mean: _Mean) -> float:
    if not mean.error:  # all clusters differ the same way
        return _p_of_one_sign(mean.clusters)
    return float((1 + (np.abs(drawn) >= abs(mean.value) / mean.error * (1 - 1e-12)).sum()) / (1 + len(drawn)))


def _p_of_one_sign(count: int) -> float:
    return math.ldexp(2.0, -count) if count < 1000 else 0.0


def _rare_differences(sums: Floats, spread: float, usual: float = 0.0) -> _Found:
    """A bound, from the few clusters whose difference is not the usual one: the mean is off it by no more than their
    share times the `spread` of all scores. If the usual difference is not 0, there are none.
    """
    count, changed = len(sums), 0 if usual else np.count_nonzero(sums)
    most = _wilson(changed / count, count, float(stats.norm.ppf((1 + LEVEL) / 2)))[1] * spread

    def p_beyond(margin: float) -> float:
        room = abs(margin) - math.copysign(usual, usual * margin)
        if room <= 0:
            return 1.0
        return float(stats.binom.cdf(changed, count, room / spread)) if room < spread else 0.0

    return (usual - most, usual + most), _p_of_one_sign(count) if usual else _sign_flips(sums), p_beyond, SIGN_FLIPS


def _sign_flips(sums: Floats) -> float:
    """The exact p of no difference, under which each of the few clusters that differ could do so the other way."""
    changed = sums[sums != 0]
    flipped = np.array(list(product((-1, 1), repeat=len(changed)))) @ changed if len(changed) else np.zeros(1)
    return float((np.abs(flipped) >= abs(changed.sum()) * (1 - 1e-12)).mean())


def _detectable(mean: _Mean, is_binary: bool) -> float:
    """The smallest difference found with probability `POWER`.

    Of shares it is never below what changes too few samples for McNemar's test, even if all change the same way.
    """
    alpha = 1 - LEVEL
    quantiles = mean.quantile(1 - alpha / 2, not mean.is_clustered) + mean.quantile(POWER, not mean.is_clustered)
    fewest = math.ceil(math.log2(2 / alpha))
    floor = float(stats.gamma.ppf(POWER, fewest)) / mean.clusters if is_binary or not mean.error else 0.0
    return max(quantiles * mean.error, floor)


__all__ = ["Comparison", "bootstrapped_t", "compare_scores", "exact_mcnemar", "holm", "mean_interval"]
