"""The harness on trial, itself on trial: data of which the truth is known by construction."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from helpers.harness import validate
from helpers.harness.ranking import difference
from helpers.harness.validate import (
    exchanged,
    false_alarms,
    latency_power,
    no_false_alarm_beyond,
    planted,
    power,
    promise,
    rate,
    taken,
)
from tests.handmade import scores

N = 80


def pair(worse=0.0, wrong=0.05, n=N, seed=0):
    """Two noisy models of one: the first's losses higher by `worse` nats a token, a share `wrong` of its answers changed."""
    rng = np.random.default_rng(seed)
    tokens, right = rng.integers(3, 12, n), rng.random(n) < 0.85
    base = rng.gamma(1, 1, n) * tokens

    def model(worse):
        return scores(nll=base + tokens * worse + rng.normal(0, 0.3, n) * np.sqrt(tokens),
                      kl=tokens * (worse + rng.exponential(0.05, n)), exact=right ^ (rng.random(n) < wrong), tokens=tokens)

    return model(worse), model(0)


def test_what_is_exchanged():
    """Each text keeps its two results, whole, and its tokens; about half of them change places."""
    first, second = pair(worse=5.0)
    a, b = exchanged(first, second, np.random.default_rng(0), size=400)
    keys = {(x.answer.nll[i], x.answer.kl[i], x.all.nll[i], bool(x.exact[i]), x.answer.tokens[i]): (n, i)
            for n, x in enumerate((first, second)) for i in range(N)}

    def origins(s):
        return [keys[row] for row in zip(s.answer.nll, s.answer.kl, s.all.nll, s.exact.tolist(), s.answer.tokens, strict=True)]

    of_a, of_b = origins(a), origins(b)
    assert all(i == j and m != n for (m, i), (n, j) in zip(of_a, of_b, strict=True))
    assert 0.4 < np.mean([m for m, _ in of_a]) < 0.6 and len({i for _, i in of_a}) > 70
    assert np.array_equal(a.ids, b.ids) and len(set(a.ids)) == 400
    assert taken(first, np.array([3, 3])).answer.kl.tolist() == [first.answer.kl[3]] * 2


@pytest.mark.parametrize("worse", [0.0, 0.5])
def test_false_alarms_are_as_rare_as_promised(worse):
    """Of every metric and of the whole verdict; the two may be as different as they like, exchanging makes them equal."""
    alarms = false_alarms(*pair(worse), trials=500)
    assert list(alarms.index) == ["kl", "nll", "exact", "any, corrected"] and (alarms["of"] == 500).all()
    assert no_false_alarm_beyond(alarms)
    assert (alarms.loc[["kl", "nll"], "share"] > 0.02).all()  # nor is it a test that never sees anything


def test_the_trial_of_false_alarms_can_fail(monkeypatch):
    """Without the swap the difference stays, with too few swaps some of it does: both are seen."""
    first, second = pair(worse=0.05)

    def swapped(share):
        class Rng:  # of which `random` is below 1/2 as often as `share` says
            def __init__(self, rng):
                self.integers, self.random = rng.integers, lambda n: np.where(rng.random(n) < share, 0.0, 1.0)

        return lambda a, b, rng: exchanged(a, b, Rng(rng))

    for share, faulty in ((0.5, False), (0.3, True), (0.0, True)):
        monkeypatch.setattr(validate, "exchanged", swapped(share))
        assert no_false_alarm_beyond(false_alarms(first, second, trials=200)) is not faulty


def test_the_trial_sees_a_missing_correction(monkeypatch):
    """Three metrics at 5 % each without Holm: one in seven."""
    monkeypatch.setattr(validate, "holm", np.asarray)
    alarms = false_alarms(*pair(), trials=400)
    assert not no_false_alarm_beyond(alarms.loc[["any, corrected"]]) and no_false_alarm_beyond(alarms.drop("any, corrected"))


def test_beyond_chance():
    """500 trials at 5 %: more than 41 come up less than one time in a thousand."""
    def table(seen):
        return pd.DataFrame({"kl": {"seen": 20, "of": 500}, "nll": {"seen": seen, "of": 500}}).T

    most = int(stats.binom.isf(0.001, 500, 0.05))
    assert most == 41 and no_false_alarm_beyond(table(most)) and not no_false_alarm_beyond(table(most + 2))
    assert not no_false_alarm_beyond(table(30), 0.01)


def test_rate_counts():
    found = rate([{"kl": True, "any": True}, {"kl": False, "any": True}])
    assert found.seen.tolist() == [1, 2] and found.share.tolist() == [0.5, 1] and found.low["kl"] < 0.5 < found.high["kl"]


@pytest.mark.parametrize("metric", ["nll", "kl"])
def test_an_effect_is_planted_in_the_first_alone(metric):
    a, b = pair()
    c, d = planted(a, b, metric, 0.25, np.random.default_rng(0))
    other = {"nll": "kl", "kl": "nll"}[metric]
    assert d is b and getattr(c.answer, metric) == pytest.approx(getattr(a.answer, metric) + 0.25 * a.answer.tokens)
    assert getattr(c.answer, other) is getattr(a.answer, other) and c.exact is a.exact
    assert difference(metric, c, d).interval.estimate == pytest.approx(difference(metric, a, b).interval.estimate + 0.25)


def test_answers_are_lost_as_often_as_asked():
    """The share is of all questions; only those that both had right are lost."""
    a, b = pair(n=2000)
    c, _ = planted(a, b, "exact", 0.1, np.random.default_rng(0))
    lost = a.exact & ~c.exact
    assert lost.mean() == pytest.approx(0.1, abs=0.02) and b.exact[lost].all() and not (c.exact & ~a.exact).any()


@pytest.mark.parametrize("metric", ["nll", "kl", "exact"])
@pytest.mark.parametrize("part", [0.6, 1.0])
def test_effects_are_found_as_often_as_promised(metric, part):
    """At the printed detectable size four times in five, below it less often, as the promise says, but for chance."""
    first, second = pair(seed=1)
    size = np.mean([difference(metric, *exchanged(first, second, np.random.default_rng(n))).detectable for n in range(20)])
    found = power(first, second, metric, part * size, trials=400)
    assert found["promised"] == pytest.approx(0.8 if part == 1 else 0.39, abs=0.06)
    assert abs(found["found"] - found["promised"]) < 3 * np.sqrt(0.25 / 400)
    assert found["low"] <= found["found"] <= found["high"]


def test_more_questions_find_more():
    first, second = pair()
    found = [power(first, second, "nll", 0.03, trials=150, size=size)["found"] for size in (30, 90, 270)]
    assert found[0] + 0.1 < found[1] < found[2] - 0.1


def test_no_effect_is_found_one_time_in_twenty():
    found = power(*pair(), "kl", 0.0, trials=500)
    assert stats.binomtest(round(found["found"] * 500), 500, 0.05).pvalue > 0.001
    assert found["promised"] == pytest.approx(0.025)  # on the one side that an effect would be on


def test_the_promise_at_the_detectable_size():
    d = difference("nll", *pair())
    assert promise(d, d.detectable, N) == pytest.approx(0.8) and promise(d, 3 * d.detectable, N) > 0.99
    d = difference("exact", *pair())
    assert promise(d, d.detectable, N) >= 0.8 > promise(d, d.detectable - 1.5 / N, N)


@pytest.mark.parametrize("noise, stretch", [(0.05, 1.0), (0.05, 1.02), (0.2, 1.05)])
def test_latency_is_told_apart_as_often_as_promised(noise, stretch):
    """A/A at 1: at most the nominal share; a stretch of known size: about as often as the printed effect says."""
    rng = np.random.default_rng(0)
    common = rng.lognormal(1, 0.3, 60)  # a slow round is slow for both
    first, second = (common * rng.lognormal(0, noise, 60) for _ in range(2))
    seen = latency_power(first, second, stretch, trials=500)
    expected = 0.05 if stretch == 1 else seen["promised"]
    assert seen["found"] == pytest.approx(expected, abs=0.03 + 3.3 * np.sqrt(expected * (1 - expected) / 500))
    assert seen["low"] <= seen["found"] <= seen["high"]
