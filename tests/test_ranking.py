import numpy as np
import pytest

from helpers.harness.ranking import NOTHING, Difference, difference, matrix, rank
from helpers.measure.stats import Interval, holm
from tests.handmade import scores

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(2, 9, 60)
BASE = RNG.gamma(2, 1, 60) * TOKENS


def model(worse=0.0, wrong=0, noise=0.1, seed=0):
    """Loss and KL higher by `worse` a token, with noise of its own; the first `wrong` of 60 answers wrong."""
    rng = np.random.default_rng(seed)
    return scores(nll=BASE + TOKENS * (worse + rng.normal(0, noise, 60)), kl=TOKENS * (worse + rng.exponential(noise, 60)),
                  exact=np.arange(60) >= wrong, tokens=TOKENS)


def test_difference_by_hand():
    a = scores(nll=[3, 5], kl=[1, 1], exact=[1, 0], tokens=[1, 3])
    b = scores(nll=[1, 1], kl=[0, 1], exact=[1, 1], tokens=[1, 3])
    nll, kl, exact = (difference(m, a, b) for m in ("nll", "kl", "exact"))
    assert (nll.interval.estimate, kl.interval.estimate, exact.interval.estimate) == (6 / 4, 1 / 4, -1 / 2)
    # of two texts: the signs agree half of the time; of one that differs: always as large; one lost answer: 2 x 1/2
    assert nll.p_value == pytest.approx(0.5, abs=0.03) and (kl.p_value, exact.p_value) == (1, 1)
    assert (exact.changed, nll.changed) == (0.5, 0) and (nll.first, nll.second) == ("first", "second")
    # no more than the answers count
    assert difference("nll", scores(nll=[1, 2]), scores(nll=[1, 2])).interval == (0, 0, 0)


def test_only_the_same_questions_are_compared():
    with pytest.raises(ValueError, match="x and y were not asked the same questions"):
        difference("kl", scores([1, 2]), scores([1, 2, 3]), ("x", "y"))


@pytest.mark.parametrize("metric, estimate, p, better", [
    ("kl", 0.3, 0.01, "b"), ("nll", -0.3, 0.01, "a"), ("exact", 0.3, 0.01, "a"), ("exact", -0.3, 0.01, "b"),
    ("kl", 0.3, 0.05, None), ("exact", -0.3, 0.2, None), ("kl", 0.0, 0.01, None)])
def test_which_is_better(metric, estimate, p, better):
    d = Difference(metric, "a", "b", Interval(estimate, estimate - 1, estimate + 1), p, 0.25)
    assert d.better == better
    assert str(d) == (f"{better} is better" if better else f"{NOTHING}; 0.25 would be")


def test_rank_corrects_over_all_pairs_and_metrics():
    models = {"good": model(seed=1), "same": model(seed=2), "bad": model(0.5, 20, seed=3)}
    found = rank(models)
    assert [(d.metric, d.first, d.second) for d in found] == [
        (m, *p) for m in ("kl", "nll", "exact") for p in (("good", "same"), ("good", "bad"), ("same", "bad"))]
    alone = [difference(d.metric, models[d.first], models[d.second]) for d in found]
    assert [d.p_value for d in found] == pytest.approx(list(holm([d.p_value for d in alone])))
    assert [d.better for d in found] == [None, "good", "same"] * 3
    (one,) = rank(models, ["kl"], [("bad", "good")])
    assert one.p_value == difference("kl", models["bad"], models["good"]).p_value and one.better == "good"
    assert rank(models, ["kl"], []) == []


def test_correction_takes_back_what_one_comparison_alone_would_see():
    """p of about 0.02 on its own; as one of six it is nothing."""
    a, b = scores(exact=[1] * 7 + [0] * 53, nll=np.ones(60)), scores(exact=[0] * 60, nll=np.ones(60))
    assert rank({"a": a, "b": b}, ["exact"])[0].better == "a"  # 2 / 2^7
    several = rank({"a": a, "b": b, "c": b, "d": b}, ["exact"])
    assert several[0].p_value == pytest.approx(6 * 2 / 2**7) and all(d.better is None for d in several)


def test_many_variants_do_not_hide_what_is_plain():
    """A p-value of resampling is never below one in so many: with 276 pairs it has to be of more of them."""
    models = {str(n): model(seed=n) for n in range(23)} | {"bad": model(1.0, seed=99)}
    found = rank(models, ["kl"])
    assert len(found) == 276 and all(d.better == d.first for d in found if d.second == "bad")
    assert not any(d.better for d in found if d.second != "bad")


def test_matrix():
    models = {"a": model(seed=1), "b": model(seed=2), "c": model(0.5, seed=3)}
    table = matrix(rank(models, ["kl", "exact"]), "kl")
    assert table.to_numpy().tolist() == [["", "=", "better"], ["=", "", "better"], ["worse", "worse", ""]]
    assert list(table.index) == list(table.columns) == ["a", "b", "c"]
