import numpy as np
import pytest
from scipy import stats as scipy_stats

from helpers.measure.stats import mcnemar, paired, ratio_interval, share_interval


def test_ratio_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        counts = rng.integers(5, 50, 80)
        sums = counts * 0.3 + rng.normal(0, 1, 80) * np.sqrt(counts)
        interval = ratio_interval(sums, counts, resamples=400, seed=i)
        hits += interval.low <= 0.3 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_ratio_interval_over_draws_covers_as_often_as_it_says():
    """Four quantizations that differ by more than the texts do: the interval has to know of both."""
    rng = np.random.default_rng(0)
    hits = {"both": 0, "texts alone": 0}
    for i in range(200):
        counts = rng.integers(5, 50, 80)
        sums = counts * (0.3 + rng.normal(0, 0.1, (4, 1))) + rng.normal(0, 1, 80) * np.sqrt(counts)
        for how, s in (("both", sums), ("texts alone", sums.mean(0))):
            interval = ratio_interval(s, counts, resamples=400, seed=i)
            hits[how] += interval.low <= 0.3 <= interval.high
    assert hits["both"] / 200 >= 0.85 and hits["texts alone"] < hits["both"]


def test_ratio_interval_of_nothing_but_a_constant():
    interval = ratio_interval(np.array([2.0, 4.0]), np.array([1, 2]))
    assert tuple(interval) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("sums, counts", [([1.0], [1]), ([1.0, 2.0], [1]), ([], []), ([[1.0, 2.0]], [1])])
def test_ratio_interval_refuses(sums, counts):
    with pytest.raises(ValueError, match="at least 2 texts"):
        ratio_interval(np.array(sums), np.array(counts))


def test_share_interval_is_wilsons():
    # 8 of 10 by Wilson (1927): centre and half width by hand
    z = scipy_stats.norm.ppf(0.975)
    centre = (0.8 + z**2 / 20) / (1 + z**2 / 10)
    half = z / (1 + z**2 / 10) * np.sqrt(0.8 * 0.2 / 10 + z**2 / 400)
    assert np.allclose(share_interval(8, 10), (0.8, centre - half, centre + half))
    assert share_interval(10, 10).high == pytest.approx(1)


def test_mcnemar_counts_both_ways():
    flips = mcnemar([1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0])
    assert (flips.lost, flips.won) == (3, 1)
    assert flips.p_value == pytest.approx(2 * (4 + 1) / 16)  # P(at least 3 of 4) on either side
    assert mcnemar([1, 0], [1, 0]).p_value == 1.0


def result(ids, nll, tokens):
    return {"id": np.array(ids), "nll": np.array(nll, dtype=float), "tokens": np.array(tokens)}


def test_results_are_paired_by_id():
    """In whatever order, over what both have: the interval is that of the differences, text by text."""
    first = result(["a", "b", "c", "d"], [5, 7, 9, 100], [1, 2, 3, 1])
    second = result(["c", "x", "a", "b"], [6, 50, 4, 5], [3, 9, 1, 2])
    assert paired(first, second) == ratio_interval(np.array([1, 2, 3]), np.array([1, 2, 3]))
    assert paired(first, second).estimate == 1


def test_draws_are_paired_with_draws_or_with_the_mean():
    counts = [1, 2, 3]
    draws = result(["a", "b", "c"], [[1, 2, 3], [3, 4, 5]], counts)
    single, shifted = result(["a", "b", "c"], [1, 1, 1], counts), result(["a", "b", "c"], [[0, 1, 2], [2, 3, 4]], counts)
    assert tuple(paired(draws, shifted)) == tuple(ratio_interval(np.ones((2, 3)), np.array(counts)))
    assert paired(draws, single).estimate == pytest.approx((1 + 2 + 3) / 6)
    assert paired(single, draws).estimate == -paired(draws, single).estimate


@pytest.mark.parametrize("other", [result(["x", "y"], [1, 1], [1, 1]), result(["a", "x"], [1, 1], [1, 1]),
                                   result(["a", "b"], [1, 1], [1, 3])])
def test_what_is_not_about_the_same_is_not_paired(other):
    with pytest.raises(ValueError, match="texts in common"):
        paired(result(["a", "b"], [1, 1], [1, 2]), other)
