"""Intervals and tests for paired measurements: the same texts through two models."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

Z95 = float(stats.norm.ppf(0.975))


class Interval(NamedTuple):
    """An estimate with its confidence interval."""

    estimate: float
    low: float
    high: float

    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def verdict(self) -> str:
        """What a difference says if more is worse, as a loss is."""
        return "measurably worse" if self.low > 0 else "measurably better" if self.high < 0 else "no difference detectable"

    def detectable(self, power: float = 0.8) -> float:
        """The smallest difference that this sample would find in `power` of all cases, if this is its 95 % interval."""
        return (self.high - self.low) / (2 * Z95) * (Z95 + stats.norm.ppf(power))

    def __str__(self) -> str:
        return f"{self.estimate:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def ratio_interval(sums: np.ndarray, counts: np.ndarray, confidence: float = 0.95, resamples: int = 2000,
                   seed: int = 0) -> Interval:
    """Bootstrap interval of sum(sums) / sum(counts), resampling the texts (percentile method).

    For a paired difference pass the per-text difference as `sums` [texts] and its tokens as `counts` [texts]; the text,
    not the token, is resampled, because tokens of one text are not independent. With `sums` [draws, texts], of a model that
    was quantized several times, the draws are averaged, and resampled too.
    Raises ValueError with fewer than 2 texts or different lengths.
    """
    sums, counts = np.asarray(sums, dtype=float), np.asarray(counts, dtype=float)
    if sums.shape[-1:] != counts.shape or sums.ndim not in (1, 2) or len(counts) < 2:
        raise ValueError(f"expected sums and counts of the same at least 2 texts, got {sums.shape} and {counts.shape}")
    sums, rng = np.atleast_2d(sums), np.random.default_rng(seed)
    texts = rng.integers(0, len(counts), (resamples, len(counts)))
    # one draw fewer than there are: the variance of their mean is then without bias
    draws = rng.integers(0, len(sums), (resamples, max(1, len(sums) - 1)))
    by_draw = np.stack([s[texts].sum(1) for s in sums], 1)  # [resamples, draws]
    means = np.take_along_axis(by_draw, draws, 1).mean(1) / counts[texts].sum(1)
    tail = (1 - confidence) / 2
    return Interval(sums.mean(0).sum() / counts.sum(), *np.quantile(means, [tail, 1 - tail]))


def studentized_interval(sums: np.ndarray, counts: np.ndarray, confidence: float = 0.95, resamples: int = 2000,
                         seed: int = 0) -> Interval:
    """Bootstrap-t interval of sum(sums) / sum(counts) over texts (Efron and Tibshirani 1993, section 12.5), for one draw.

    Where a few texts hold much of the sum, as with KL, percentiles (`ratio_interval`) stop short on the long side: with 20
    texts the truth is above their 95 % bound one time in five, and above this one's one time in fifteen. So limits use this.
    """
    sums, counts = np.asarray(sums, dtype=float), np.asarray(counts, dtype=float)
    estimate, error = _ratio_and_error(sums, counts)
    drawn = np.random.default_rng(seed).integers(0, len(counts), (resamples, len(counts)))
    estimates, errors = _ratio_and_error(sums[drawn], counts[drawn])
    away = (estimates - estimate) / np.maximum(errors, 1e-9 * error or 1)
    tail = (1 - confidence) / 2
    return Interval(float(estimate), *(estimate - error * np.quantile(away, [1 - tail, tail])))


def _ratio_and_error(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """sum(sums) / sum(counts) over the last axis, and its standard error, linearised."""
    ratio, texts = sums.sum(-1) / counts.sum(-1), sums.shape[-1]
    left = sums - ratio[..., None] * counts
    return ratio, np.sqrt((left**2).sum(-1) * texts / (texts - 1)) / counts.sum(-1)


def share_interval(right: int, total: int, confidence: float = 0.95) -> Interval:
    """Wilson interval of a share of correct answers, `right` of `total`."""
    ci = stats.binomtest(int(right), int(total)).proportion_ci(confidence, method="wilson")
    return Interval(right / total, ci.low, ci.high)


def paired(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray], what: str = "nll", tokens: str = "tokens",
           **options) -> Interval:
    """Interval of the difference of two results, first less second, over the texts that both have, by their ids.

    A result has arrays `id` and `tokens` [texts] and `what` [texts] or [draws, texts]. Raises ValueError if they share fewer
    than 2 texts, or one has another number of tokens in each: then the two are not about the same thing.
    """
    shared, a, b = np.intersect1d(first["id"], second["id"], return_indices=True)
    a, b = a[order := np.argsort(a)], b[order]  # as they are in the first, so that all who resample draw the same texts
    if len(shared) < 2 or not np.array_equal(first[tokens][a], second[tokens][b]):
        raise ValueError(f"{len(shared)} texts in common, with the same tokens in each: expected at least 2, and the same")
    x, y = np.atleast_2d(first[what])[:, a], np.atleast_2d(second[what])[:, b]
    if len(x) != len(y):  # draws that have no counterpart: against the other's mean
        x, y = (z if len(z) == max(len(x), len(y)) else z.mean(0, keepdims=True) for z in (x, y))
    return ratio_interval(x - y, first[tokens][a], **options)


class Flips(NamedTuple):
    """How answers changed between two models, and the exact McNemar p-value of "as many got worse as got better"."""

    lost: int  # right before, wrong after
    won: int  # wrong before, right after
    p_value: float


def mcnemar(before: np.ndarray, after: np.ndarray) -> Flips:
    """Paired comparison of right/wrong answers of two models to the same questions."""
    before, after = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    if before.shape != after.shape:
        raise ValueError(f"expected answers to the same questions, got {before.shape} and {after.shape}")
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    p_value = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    return Flips(lost, won, float(p_value))


def mcnemar_power(changed: float, effect: float, questions: int, alpha: float = 0.05) -> float:
    """How often the exact test finds that a share `effect` of the questions was lost, where `changed` of them change anyway,
    half of them each way."""
    p_changed = min(1.0, changed + effect)
    if not p_changed:
        return 0.0
    fewest, most = stats.binom.ppf([1e-4, 1 - 1e-4], questions, p_changed).astype(int)
    pairs = np.arange(fewest, most + 1)
    critical = stats.binom.ppf(alpha / 2, pairs, 0.5)  # fewer than this on either side: p below alpha
    lost = min(1.0, (changed / 2 + effect) / p_changed)
    seen = stats.binom.cdf(critical - 1, pairs, lost) + stats.binom.cdf(critical - 1, pairs, 1 - lost)
    weight = stats.binom.pmf(pairs, questions, p_changed)
    return float((seen * weight).sum() / weight.sum())


def detectable_share(changed: float, questions: int, power: float = 0.8) -> float:
    """The smallest difference of two shares of right answers that `mcnemar` finds in `power` of all cases, where `changed` of
    the questions change their answer anyway; 1 if none is. At many questions (z + z) sqrt(changed / questions)."""
    few, many = 0, questions
    while many - few > 1:  # found the more often, the larger it is
        middle = (few + many) // 2
        few, many = (few, middle) if mcnemar_power(changed, middle / questions, questions) >= power else (middle, many)
    return many / questions


@lru_cache(maxsize=4)
def _signs(resamples: int, texts: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array([-1, 1], dtype=np.float32), (resamples, texts))


def swap_test(differences: np.ndarray, resamples: int = 4000, seed: int = 0) -> float:
    """p-value of "the two are exchangeable", two-sided: how often a sum as large comes up if the two results of each text
    change places at random (Fisher's randomization test). `differences` [texts]; exact but for the number of resamples."""
    d = np.asarray(differences, dtype=np.float32)
    sums = _signs(resamples, len(d), seed) @ d
    return float((1 + (np.abs(sums) >= abs(d.sum()) * (1 - 1e-5)).sum()) / (1 + resamples))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values corrected for their number (Holm 1979): below 0.05 for any of the true hypotheses at most 5 % of the time."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    return np.minimum(1.0, stepped)[np.argsort(order, kind="stable")]


def quantile_interval(values: np.ndarray, q: float, confidence: float = 0.9) -> Interval:
    """A percentile with its interval from order statistics, which assumes nothing of the distribution; a bound that so few
    values do not give is infinite. At 0.9 each bound alone holds with 95 %: p95 has an upper one from 59 values on, p99
    from 299. Raises ValueError if there is no value."""
    x, n = np.sort(np.asarray(values, dtype=float)), len(values)
    if not n:
        raise ValueError("values: expected at least one, got none")
    side = (1 + confidence) / 2
    fewer = stats.binom.cdf(np.arange(n), n, q)  # [k - 1]: P(fewer than k values lie below the percentile)
    high, low = np.flatnonzero(fewer >= side), np.flatnonzero(1 - fewer >= side)
    return Interval(float(np.quantile(x, q)), x[low[-1]] if len(low) else -np.inf, x[high[0]] if len(high) else np.inf)


def share_difference(after: np.ndarray, before: np.ndarray, ratio: float = 1.0, confidence: float = 0.95) -> Interval:
    """Interval of share(after) - ratio share(before), of right answers to the same questions (Newcombe 1998, method 10: two
    Wilson intervals and the correlation of the answers, with his correction for continuity, without which few changes in few
    questions look surer than they are). It has a width even where no answer changed."""
    after, before = np.asarray(after, dtype=bool), np.asarray(before, dtype=bool)
    if after.shape != before.shape or not len(after):
        raise ValueError(f"expected answers to the same questions, got {after.shape} and {before.shape}")
    a, b = (share_interval(x.sum(), len(x), confidence) for x in (after, before))
    both, together = np.std(after) * np.std(before), float(np.mean(after & before) - after.mean() * before.mean())
    phi = (together if together < 0 else max(0.0, together - 0.5 / len(after))) / both if both else 0.0

    def reach(of_a: float, of_b: float) -> float:
        return np.sqrt(max(0.0, of_a**2 + (ratio * of_b) ** 2 - 2 * phi * of_a * ratio * of_b))

    at = a.estimate - ratio * b.estimate
    down, up = reach(a.estimate - a.low, b.high - b.estimate), reach(a.high - a.estimate, b.estimate - b.low)
    return Interval(at, at - down, at + up)


def recovery_interval(after: np.ndarray, before: np.ndarray, confidence: float = 0.95) -> Interval:
    """Interval of share(after) / share(before): the ratios at which `share_difference` contains zero. Raises ValueError if
    `before` has no right answer, so that there is nothing to recover."""
    if not np.any(before):
        raise ValueError("no right answer before, so nothing to recover")

    beyond = 1 / share_interval(np.sum(before), len(before), confidence).low + 1  # both bounds are negative there

    def edge(of: Callable[[Interval], float]) -> float:
        def at(ratio: float) -> float:
            return of(share_difference(after, before, ratio, confidence))

        return optimize.brentq(at, 0.0, beyond) if at(0.0) > 0 else 0.0  # at 0 it is the bound of `after` alone

    return Interval(float(np.mean(after) / np.mean(before)), edge(lambda i: i.low), edge(lambda i: i.high))


def rank_correlation(x: Sequence[float], y: Sequence[float], resamples: int = 2000, seed: int = 0) -> Interval:
    """Spearman's rank correlation with a 95 % bootstrap interval over the pairs. Raises ValueError with fewer than 4, or where
    all values are one."""
    pairs = np.array([x, y], dtype=float) if len(x) == len(y) else np.empty((2, 0))
    if pairs.shape[1] < 4 or (pairs == pairs[:, :1]).all(1).any():
        raise ValueError(f"expected at least 4 pairs, of more than one value, got {x} and {y}")
    drawn = np.random.default_rng(seed).integers(0, len(x), (resamples, len(x)))
    ranks = stats.rankdata(pairs[:, np.vstack([np.arange(len(x)), drawn])], axis=-1)  # [2, 1 + resamples, pairs]
    u, v = ranks - ranks.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore"):  # a resample of one pair over and over has no correlation
        found = (u * v).sum(-1) / np.sqrt(np.square(u).sum(-1) * np.square(v).sum(-1))
    return Interval(float(found[0]), *map(float, np.nanquantile(found[1:], [0.025, 0.975])))
