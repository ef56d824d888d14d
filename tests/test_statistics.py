"""Statistics of evaluation: intervals hold what they promise in simulations, tests equal brute force."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from scipy import optimize, stats

from internvl.evaluation import statistics
from internvl.evaluation.statistics import (
    bootstrapped_t,
    compare_scores,
    exact_mcnemar,
    holm,
    mean_interval,
    tango_statistic,
)


# ------------------------------------------------------------------------------------------------- intervals of a mean
def exact_coverage(share: float, size: int) -> float:
    """How often the interval of 0/1 scores holds the share, from the probability of every number of ones."""
    hits = np.arange(size + 1)
    ends = [mean_interval([1] * hit + [0] * (size - hit)) for hit in hits]
    return sum(stats.binom.pmf(hit, size, share) for hit in hits if ends[hit][0] <= share <= ends[hit][1])


@pytest.mark.parametrize("size", [10, 30, 100])
def test_intervals_of_right_and_wrong_answers_hold_the_share_in_95_of_100_experiments(size):
    coverage = [exact_coverage(share, size) for share in np.linspace(0.05, 0.95, 19)]
    assert 0.93 <= np.mean(coverage) <= 0.97
    assert min(coverage) > 0.88


def clustered_answers(rng, count, share, correlation):
    """Answers about images, 1 to 8 of each, some of which are harder than others."""
    sizes = rng.integers(1, 9, count)
    rest = 1 / correlation - 1
    difficulty = rng.beta(share * rest, (1 - share) * rest, count)
    clusters = np.repeat(np.arange(count), sizes)
    return (rng.random(len(clusters)) < difficulty[clusters]).astype(float), clusters


def clustered_scores(rng, count):
    scores, clusters = clustered_answers(rng, count, 0.7, 0.5)
    return scores * rng.exponential(1, len(scores)), clusters


SIMULATIONS = {
    "normal scores": (0.0, lambda rng: (rng.normal(size=12), None)),
    "skewed scores": (1.0, lambda rng: (rng.exponential(size=25), None)),
    "overlaps": (0.8, lambda rng: (np.where(rng.random(60) < 0.6, 1, rng.beta(2, 2, 60)), None)),
    "few clusters": (0.8, lambda rng: clustered_answers(rng, 12, 0.8, 0.2)),
    "clusters": (0.8, lambda rng: clustered_answers(rng, 60, 0.8, 0.4)),
    "clusters of one mind": (0.6, lambda rng: clustered_answers(rng, 60, 0.6, 0.9)),
    "clustered scores": (0.7, lambda rng: clustered_scores(rng, 50)),
}


@pytest.mark.parametrize("case", SIMULATIONS)
def test_intervals_hold_the_mean_in_95_of_100_experiments(case):
    mean, draw = SIMULATIONS[case]
    rng, rounds = np.random.default_rng(0), 1000
    ends = [mean_interval(*draw(rng)) for _ in range(rounds)]
    assert 0.93 <= sum(low <= mean <= high for low, high in ends) / rounds <= 0.97


def test_an_interval_that_ignored_the_clusters_would_be_wrong():
    """Else the simulations above would show nothing about clusters."""
    rng = np.random.default_rng(0)
    ends = [mean_interval(clustered_answers(rng, 60, 0.8, 0.4)[0]) for _ in range(400)]
    assert sum(low <= 0.8 <= high for low, high in ends) / 400 < 0.9


@pytest.mark.parametrize(("right", "size"), [(0, 7), (7, 7), (3, 20), (480, 500)])
def test_the_interval_of_independent_answers_is_wilsons(right, size):
    expected = stats.binomtest(right, size).proportion_ci(0.95, method="wilson")
    assert mean_interval([1] * right + [0] * (size - right)) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_the_interval_of_symmetric_scores_is_students():
    scores = [1.5, 2, 2.5, 3, 3.5]
    expected = stats.t.interval(0.9, 4, np.mean(scores), stats.sem(scores))
    assert mean_interval(scores, level=0.9) == pytest.approx(expected)


@pytest.mark.parametrize("scores", [[0.5, 1.5, 2.5, 4.5], [0, 1, 1, 1, 0, 1]])
def test_asking_the_same_again_narrows_nothing(scores):
    once = mean_interval(scores * 2, list(range(len(scores))) * 2)
    assert mean_interval(scores * 30, list(range(len(scores))) * 30) == pytest.approx(once)
    alone = mean_interval(scores)
    assert once[1] - once[0] >= (alone[1] - alone[0]) * (1 - 1e-9)


def test_one_cluster_shows_nothing_about_others():
    assert mean_interval([0.2, 0.4, 0.9], ["a"] * 3) == (-math.inf, math.inf)
    low, high = mean_interval([1, 1, 1, 0], ["a"] * 4)
    assert 0 <= low < 0.1
    assert 0.9 < high <= 1


@pytest.mark.parametrize("scores", [[], [1.0, math.nan], [math.inf], [[1.0], [2.0]]])
def test_scores_that_are_none_are_refused(scores):
    with pytest.raises(ValueError, match="list of finite numbers"):
        mean_interval(scores)


def test_every_sample_needs_its_cluster():
    with pytest.raises(ValueError, match="3 scores and 2 clusters"):
        mean_interval([1, 0, 1], ["a", "b"])


# --------------------------------------------------------------------------------------------------------------- tests
@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (5, 0), (1, 9), (6, 6), (30, 14)])
def test_mcnemar_equals_the_sum_of_all_outcomes_that_are_as_unlikely(gained, lost):
    total = gained + lost
    ways = [math.comb(total, number) for number in range(total + 1)]
    assert exact_mcnemar(gained, lost) == pytest.approx(sum(w for w in ways if w <= ways[gained]) / 2**total)


def test_holm_equals_the_published_procedure():
    """Holm rejects one after another, smallest first, and stops at the first that fails: for every level."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        p_values = rng.random(rng.integers(1, 7)).round(2) ** 2
        adjusted = holm(list(p_values))
        for level in (0.01, 0.05, 0.2, 0.5):
            rejected = set()
            for left, index in zip(range(len(p_values), 0, -1), np.argsort(p_values), strict=True):
                if p_values[index] * left > level:
                    break
                rejected.add(int(index))
            assert {index for index, value in enumerate(adjusted) if value <= level} == rejected


@pytest.mark.parametrize("difference", [-0.2, -0.01, 0.03, 0.3])
@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (3, 0), (2, 9), (12, 10)])
def test_tangos_statistic_takes_its_variance_from_the_most_likely_shares(gained, lost, difference):
    size = 40

    def unlikelihood(share):  # of samples that the first alone got right
        terms = (gained, share + difference), (lost, share), (size - gained - lost, 1 - 2 * share - difference)
        return -sum(count * math.log(max(1e-300, part)) for count, part in terms)

    bounds = max(0, -difference), (1 - difference) / 2
    share = optimize.minimize_scalar(unlikelihood, bounds=bounds, method="bounded", options={"xatol": 1e-10}).x
    expected = (gained - lost - size * difference) / math.sqrt(size * (2 * share + difference - difference**2))
    assert tango_statistic(gained, lost, size, difference) == pytest.approx(expected, rel=1e-3)


def test_the_bootstrap_equals_one_that_draws_round_by_round(monkeypatch):
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 5, 30).astype(float)
    sums = sizes * rng.exponential(size=30)
    mean, expected = sums.sum() / sizes.sum(), []
    for _ in range(4000):
        drawn = rng.integers(30, size=30)
        mine = sums[drawn].sum() / sizes[drawn].sum()
        residuals = sums[drawn] - mine * sizes[drawn]
        expected.append((mine - mean) * sizes[drawn].sum() / math.sqrt((residuals**2).sum() * 30 / 29))
    monkeypatch.setattr(statistics, "DRAWS_AT_ONCE", 700)  # many blocks, the last one shorter
    found = bootstrapped_t(sums, sizes, rounds=4001)
    assert len(found) == 4001
    shares = [0.05, 0.25, 0.5, 0.75, 0.95]
    np.testing.assert_allclose(np.quantile(found, shares), np.quantile(expected, shares), atol=0.15)


# ---------------------------------------------------------------------------------------------------------- comparison
def paired_answers(rng, size, gained, lost):
    first, fate = rng.random(size) < 0.6, rng.random(size)
    changed = fate < gained + lost
    return np.where(changed, fate >= gained, first) * 1.0, np.where(changed, fate < gained, first) * 1.0, None


def paired_clusters(rng, count, gained, lost, is_binary=True):
    """All changes happen in every third cluster."""
    clusters = np.repeat(np.arange(count), rng.integers(1, 6, count))
    first, second, _ = paired_answers(rng, len(clusters), 3 * gained, 3 * lost)
    is_stable = (rng.random(count) < 2 / 3)[clusters]
    second = np.where(is_stable, first, second)
    if is_binary:
        return first, second, clusters
    return first + rng.beta(2, 2, len(clusters)), second + rng.beta(2, 2, len(clusters)), clusters


PAIRED = {
    "answers": partial(paired_answers, size=300, gained=0.05, lost=0.05),
    "clustered answers": partial(paired_clusters, count=120, gained=0.06, lost=0.06),
    "clustered scores": partial(paired_clusters, count=60, gained=0.06, lost=0.06, is_binary=False),
    "skewed differences": lambda rng: ((first := rng.gamma(0.5, size=30)), first + rng.exponential(size=30) - 1, None),
}


@pytest.fixture
def few_rounds(monkeypatch):
    monkeypatch.setattr(statistics, "FEWEST_ROUNDS", 200)
    monkeypatch.setattr(statistics, "MOST_DRAWS", 30_000)


@pytest.mark.parametrize("case", PAIRED)
def test_equal_models_differ_in_5_of_100_experiments_and_intervals_hold_zero_in_95(case, few_rounds):
    rng, rounds = np.random.default_rng(0), 400
    found = [compare_scores(*PAIRED[case](rng)) for _ in range(rounds)]
    assert 0.93 <= sum(one.interval[0] <= 0 <= one.interval[1] for one in found) / rounds <= 0.97
    assert sum(one.p_value <= 0.05 for one in found) / rounds <= 0.07


@pytest.mark.parametrize(
    ("draw", "difference"),
    [
        (partial(paired_answers, size=1000, gained=0.03, lost=0.01), 0.02),
        (partial(paired_clusters, count=200, gained=0.08, lost=0.03, is_binary=False), 0.05),
    ],
    ids=["answers", "clustered scores"],
)
def test_models_that_differ_by_the_margin_are_called_equivalent_in_5_of_100_experiments(draw, difference, few_rounds):
    rng, rounds = np.random.default_rng(0), 300
    found = [compare_scores(*draw(rng), margin=difference) for _ in range(rounds)]
    assert sum(one.p_equivalent <= 0.05 for one in found) / rounds <= 0.08
    assert np.mean([one.difference for one in found]) == pytest.approx(difference, abs=difference / 10)
    wider = [compare_scores(*draw(rng), margin=3 * difference) for _ in range(50)]
    assert sum(one.p_equivalent <= 0.05 for one in wider) > 40


def test_the_detectable_difference_is_found_in_80_of_100_experiments():
    rng = np.random.default_rng(0)
    draw = partial(paired_answers, rng, size=1000, lost=0.01)
    shown = np.mean([compare_scores(*draw(gained=0.0275)).detectable for _ in range(50)])
    assert shown == pytest.approx(0.0175, abs=0.001)  # so a difference of that size has to be found
    found = [compare_scores(*draw(gained=0.01 + shown)).p_value <= 0.05 for _ in range(400)]
    assert 0.74 <= np.mean(found) <= 0.86


def test_equal_answers_are_equivalent_only_if_they_are_many():
    """A missing difference is no evidence of equality."""
    many, few = np.ones(2000), np.ones(40)
    assert compare_scores(many, many, margin=0.02).p_equivalent < 0.01
    assert compare_scores(few, few, margin=0.02).p_equivalent > 0.05
    for scores in (many, few):
        low, high = compare_scores(scores, scores).interval
        assert low == pytest.approx(-high)
        assert high == pytest.approx(1.96**2 / (len(scores) + 1.96**2), rel=1e-3)


def test_a_single_answer_that_differs_among_many_is_no_certain_difference():
    rng = np.random.default_rng(0)
    for scores in (rng.integers(0, 2, 400) * 1.0, rng.random(400)):
        changed = scores.copy()
        changed[0] = 1 - round(scores[0])
        for clusters in (None, np.arange(400) // 4):
            found = compare_scores(scores, changed, clusters)
            assert found.p_value == 1
            assert found.interval[0] < 0 < found.interval[1]


@pytest.mark.parametrize("clusters", [None, np.arange(40) // 2])
def test_a_difference_that_is_the_same_everywhere_is_certain_only_with_many_samples(clusters):
    scores = np.linspace(0, 1, 40)
    found = compare_scores(scores, scores + 0.125, clusters, margin=0.5)
    number = 40 if clusters is None else 20
    assert found.p_value == pytest.approx(2 * 0.5**number)
    assert found.interval[0] < 0.125 < found.interval[1]
    assert found.interval[1] - found.interval[0] == pytest.approx(0.24 if clusters is None else 0.35, abs=0.1)
    assert found.p_equivalent == pytest.approx((1 - 0.375 / 1.125) ** number)
    assert compare_scores(scores, scores + 0.125, clusters, margin=0.1).p_equivalent == 1
    assert compare_scores(scores + 0.125, scores, clusters, margin=0.1).p_equivalent == 1
    few = compare_scores([0.1, 0.4], [0.6, 0.9], margin=0.6)
    assert few.p_value == 0.5
    assert few.p_equivalent > 0.05


def test_a_question_gained_in_every_image_is_a_difference():
    found = compare_scores([0, 0] * 20, [0, 1] * 20, np.arange(40) // 2, margin=0.02)
    assert found.p_value < 1e-3
    assert found.p_equivalent > 0.9


def test_the_method_follows_from_the_data():
    rng = np.random.default_rng(0)
    answers, scores = paired_answers(rng, 200, 0.2, 0.1), (rng.random(200), rng.random(200))
    found = [compare_scores(*answers[:2]), compare_scores(*answers[:2], np.arange(200) // 2), compare_scores(*scores)]
    assert [one.test for one in found] == ["exact McNemar", "bootstrap", "bootstrap"]
    assert [one.clusters for one in found] == [200, 100, 200]
    assert found[0].first == answers[0].mean()


def test_pairs_that_are_all_repeated_narrow_nothing():
    rng = np.random.default_rng(0)
    first, second, _ = paired_answers(rng, 150, 0.2, 0.1)
    widths = [
        np.subtract(*compare_scores(*pair).interval[::-1])
        for pair in (
            (first, second),
            (np.tile(first, 4), np.tile(second, 4), np.tile(np.arange(150), 4)),
        )
    ]
    assert widths[1] == pytest.approx(widths[0], rel=0.03)


def test_differences_grow_with_the_margin_from_not_decided_to_equivalent():
    rng = np.random.default_rng(0)
    pair = rng.random(300), rng.random(300)
    p_values = [compare_scores(*pair, margin=margin).p_equivalent for margin in (0.001, 0.02, 0.05, 0.2)]
    assert all(a >= b for a, b in pairwise(p_values))
    assert p_values[0] > 0.3
    assert p_values[-1] < 0.01


def test_pairs_have_to_match():
    with pytest.raises(ValueError, match="got 2 and 3"):
        compare_scores([1, 0], [1, 0, 1])
    with pytest.raises(ValueError, match="above 0, got -1"):
        compare_scores([1, 0], [1, 0], margin=-1)
