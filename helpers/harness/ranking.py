"""What can be told apart: every pair of variants on every metric, paired text by text, corrected for the number of pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pandas as pd

from helpers.measure.quality import Scores
from helpers.measure.stats import Interval, detectable_share, holm, mcnemar, ratio_interval, share_difference, swap_test

ALPHA = 0.05
NOTHING = "no difference detectable"
METRICS = {"kl": "KL (nats/token)", "nll": "loss (nats/token)", "exact": "right answers"}


@dataclass(frozen=True)
class Difference:
    """`first` less `second` on one metric; `p_value` is corrected, `detectable` what would be found four times in five."""

    metric: str
    first: str
    second: str
    interval: Interval
    p_value: float
    detectable: float
    changed: float = 0.0  # share of questions whose answer is right in one and wrong in the other

    @property
    def better(self) -> str | None:
        """The variant that is measurably better; None where no difference is detectable."""
        if self.p_value >= ALPHA or self.interval.estimate == 0:
            return None
        less_is_better = self.metric != "exact"
        return self.first if (self.interval.estimate < 0) == less_is_better else self.second

    def __str__(self) -> str:
        return f"{self.better} is better" if self.better else f"{NOTHING}; {self.detectable:.2g} would be"


def p_value(metric: str, first: Scores, second: Scores, resamples: int = 4000) -> float:
    """How easily chance alone makes two models as different: McNemar's exact test of answers, Fisher's of loss and KL."""
    if metric == "exact":
        return mcnemar(second.exact, first.exact).p_value
    return swap_test(getattr(first.answer, metric) - getattr(second.answer, metric), resamples)


def difference(metric: str, first: Scores, second: Scores, names: tuple[str, str] = ("first", "second"),
               resamples: int = 4000) -> Difference:
    """Two models on the same questions, not corrected for anything. Raises ValueError if they are not the same ones."""
    if not np.array_equal(first.ids, second.ids):
        raise ValueError(f"{names[0]} and {names[1]} were not asked the same questions")
    p = p_value(metric, first, second, resamples)
    if metric == "exact":
        changed = float((first.exact != second.exact).mean())
        return Difference(metric, *names, share_difference(first.exact, second.exact), p,
                          detectable_share(changed, len(first.ids)), changed)
    interval = ratio_interval(getattr(first.answer, metric) - getattr(second.answer, metric), first.answer.tokens)
    return Difference(metric, *names, interval, p, interval.detectable())


def rank(scores: Mapping[str, Scores], metrics: Sequence[str] = tuple(METRICS),
         pairs: Sequence[tuple[str, str]] | None = None) -> list[Difference]:
    """Every pair (or these) on every metric, p-values corrected over all of them together (Holm)."""
    pairs = list(combinations(scores, 2)) if pairs is None else pairs
    # no p-value is below 1 / resamples: of too few, all would be above ALPHA once they are multiplied by their number
    resamples = max(4000, int(4 / ALPHA * len(metrics) * len(pairs)))
    found = [difference(metric, scores[a], scores[b], (a, b), resamples) for metric in metrics for a, b in pairs]
    return [replace(d, p_value=float(p)) for d, p in zip(found, holm([d.p_value for d in found]), strict=True)]


def matrix(differences: Sequence[Difference], metric: str) -> pd.DataFrame:
    """Row against column: better, worse, or nothing to be told."""
    of = [d for d in differences if d.metric == metric]
    names = list(dict.fromkeys(n for d in of for n in (d.first, d.second)))
    table = pd.DataFrame("", names, names)
    for d in of:
        for row, column in ((d.first, d.second), (d.second, d.first)):
            table.loc[row, column] = "=" if d.better is None else "better" if d.better == row else "worse"
    return table
