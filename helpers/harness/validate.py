"""The harness on trial: how often it sees a difference where there is none, and how often it finds one of a known size."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy import stats

from helpers.harness.ranking import ALPHA, Difference, difference, p_value
from helpers.measure.quality import Scores, Sums
from helpers.measure.stats import Z95, holm, mcnemar_power, ratio_interval, share_interval, swap_test

Pair = tuple[Scores, Scores]


def taken(scores: Scores, at: np.ndarray) -> Scores:
    """The scores of some texts, in this order; one may be there several times."""
    parts = [Sums(s.nll[at], s.kl[at], s.agree[at], s.tokens[at]) for s in (scores.all, scores.answer)]
    return Scores(np.arange(len(at)), scores.tasks[at], *parts, scores.exact[at])


def exchanged(first: Scores, second: Scores, rng: np.random.Generator, size: int | None = None) -> Pair:
    """Two models between which there is no difference: as many texts drawn anew, and of each the two results change places
    at random. The noise is that of the two real models, the truth is known."""
    at = rng.integers(0, len(first.ids), size or len(first.ids))
    a, b, swap = taken(first, at), taken(second, at), rng.random(len(at)) < 0.5

    def mixed(x: Scores, y: Scores) -> Scores:
        sums = [Sums(*(np.where(swap, getattr(q, n), getattr(p, n)) for n in ("nll", "kl", "agree", "tokens")))
                for p, q in ((x.all, y.all), (x.answer, y.answer))]
        return Scores(x.ids, x.tasks, *sums, np.where(swap, y.exact, x.exact))

    return mixed(a, b), mixed(b, a)


def judged(first: Scores, second: Scores, metrics: tuple[str, ...] = ("kl", "nll", "exact")) -> dict[str, bool]:
    """Whether each metric alone sees a difference, and whether any does after correction: the whole verdict."""
    p = [p_value(m, first, second) for m in metrics]
    return {m: bool(x < ALPHA) for m, x in zip(metrics, p, strict=True)} | {"any, corrected": bool((holm(p) < ALPHA).any())}


def rate(trials: list[Mapping[str, bool]]) -> pd.DataFrame:
    """How often each was seen, with its interval."""
    rows = {}
    for what in trials[0]:
        seen = sum(t[what] for t in trials)
        i = share_interval(seen, len(trials))
        rows[what] = {"seen": seen, "of": len(trials), "share": i.estimate, "low": i.low, "high": i.high}
    return pd.DataFrame(rows).T


def false_alarms(first: Scores, second: Scores, trials: int = 500, seed: int = 0) -> pd.DataFrame:
    """A/A: two models made exchangeable, compared `trials` times. A share above 0.05 by more than chance is a fault."""
    rng = np.random.default_rng(seed)
    return rate([judged(*exchanged(first, second, rng)) for _ in range(trials)])


def no_false_alarm_beyond(table: pd.DataFrame, nominal: float = ALPHA) -> bool:
    """Whether every share is what a true rate of at most `nominal` would give, but for one time in a thousand."""
    return all(stats.binomtest(int(r.seen), int(r.of), nominal, "greater").pvalue > 1e-3 for r in table.itertuples())


def planted(a: Scores, b: Scores, metric: str, effect: float, rng: np.random.Generator) -> Pair:
    """Two models of which the first is made worse by `effect`: the loss of every token by so much, or that share of all
    questions flipped from right to wrong."""
    if metric == "exact":
        right = np.flatnonzero(a.exact & b.exact)
        flipped = rng.random(len(right)) < effect * len(a.exact) / max(1, len(right))
        exact = a.exact.copy()
        exact[right[flipped]] = False
        return replace(a, exact=exact), b
    sums = {m: getattr(a.answer, m) for m in ("nll", "kl", "agree", "tokens")}
    return replace(a, answer=Sums(**sums | {metric: sums[metric] + effect * a.answer.tokens})), b


def power(first: Scores, second: Scores, metric: str, effect: float, trials: int = 500, size: int | None = None,
          seed: int = 0) -> dict[str, float]:
    """A/B: an effect of known size, planted `trials` times: how often it is found, and how often the detectable effect that
    was printed without it says that it would be."""
    rng, found, promised = np.random.default_rng(seed), 0, []
    for _ in range(trials):
        pair = exchanged(first, second, rng, size)
        promised.append(promise(difference(metric, *pair), effect, len(pair[0].ids)))
        found += p_value(metric, *planted(*pair, metric, effect, rng)) < ALPHA
    i = share_interval(found, trials)
    return {"effect": effect, "found": i.estimate, "low": i.low, "high": i.high, "promised": float(np.mean(promised))}


def promise(d: Difference, effect: float, questions: int) -> float:
    """How often an effect would be found, by what is known without it."""
    if d.metric == "exact":
        return mcnemar_power(d.changed, effect, questions)
    return float(stats.norm.cdf(effect / d.detectable * (Z95 + stats.norm.ppf(0.8)) - Z95))


def latency_power(first: np.ndarray, second: np.ndarray, stretch: float, trials: int = 500, seed: int = 0) -> dict[str, float]:
    """How often two series of paired times are told apart: rounds drawn anew and exchanged at random, then one side made
    `stretch` times as long (1: A/A). Judged by the logarithms of their ratios, which is also what promises."""
    rng, seen, promised, logs = np.random.default_rng(seed), 0, [], np.log(first / second)
    for _ in range(trials):
        apart = logs[rng.integers(0, len(logs), len(logs))] * rng.choice([-1, 1], len(logs))
        detectable = ratio_interval(apart, np.ones(len(apart)), resamples=400).detectable()
        promised.append(stats.norm.cdf(np.log(stretch) / detectable * (Z95 + stats.norm.ppf(0.8)) - Z95))
        seen += swap_test(apart + np.log(stretch)) < ALPHA
    i = share_interval(seen, trials)
    return {"effect": stretch - 1, "found": i.estimate, "low": i.low, "high": i.high, "promised": float(np.mean(promised))}
