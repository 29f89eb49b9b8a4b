"""Intervals and tests for paired measurements: the same texts through two models."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy import stats


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
