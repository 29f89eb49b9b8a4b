"""What gates measure of a variant beside full precision, each as an estimate with an interval."""

from collections.abc import Callable

import numpy as np

from helpers.harness.measured import Measured, NotMeasured
from helpers.measure.stats import Interval, quantile_interval, recovery_interval, share_interval, studentized_interval

GATES = 0.9  # confidence of the intervals
LEAST = 20  # texts
Quantity = Callable[[Measured, Measured], Interval]  # of (the variant, full precision)


def exactly(value: float) -> Interval:
    return Interval(float(value), float(value), float(value))


def _ratio(sums: np.ndarray, tokens: np.ndarray) -> Interval:
    if len(tokens) < LEAST:
        raise NotMeasured(f"{len(tokens)} texts: with fewer than {LEAST} the bounds would not hold as often as they say")
    return studentized_interval(sums, tokens, GATES)


def recovery(task: str) -> Quantity:
    def of(variant: Measured, full: Measured) -> Interval:
        after, before = variant.right(task), full.right(task)
        if not before.any():
            raise NotMeasured(f"full precision has none of {len(before)} answers right: ask what it can do")
        return recovery_interval(after, before, GATES)

    return of


def exact(task: str) -> Quantity:
    return lambda variant, _: share_interval(variant.right(task).sum(), len(variant.right(task)), GATES)


def agreement(_: str) -> Quantity:
    def of(variant: Measured, _: Measured) -> Interval:
        sums = variant.sums("overall")
        return _ratio(sums.agree, sums.tokens)

    return of


def kl(name: str) -> Quantity:
    def of(variant: Measured, _: Measured) -> Interval:
        sums = variant.sums(name)
        return _ratio(sums.kl, sums.tokens)

    return of


def delta_nll(name: str) -> Quantity:
    def of(variant: Measured, full: Measured) -> Interval:
        after, before = variant.sums(name), full.sums(name)
        return _ratio(after.nll - before.nll, after.tokens)

    return of


def perplexity(name: str) -> Quantity:
    def of(variant: Measured, _: Measured) -> Interval:
        sums = variant.sums("texts" if name == "overall" else name)
        return Interval(*np.exp(_ratio(sums.nll, sums.tokens)))

    return of


def form(part: str) -> Quantity:
    def of(variant: Measured, _: Measured) -> Interval:
        holds = variant.form_of(part)
        return share_interval(holds.sum(), len(holds), GATES)

    return of


def percentile(what: str, q: float, rate: float | None = None) -> Quantity:
    return lambda variant, _: quantile_interval(variant.latency_of(what, rate), q, GATES)


def errors(rate: float) -> Quantity:
    return lambda variant, _: share_interval(*variant.errors_at(rate), GATES)


def speed(rate: float) -> Quantity:
    return lambda variant, _: exactly(variant.tokens_per_second_at(rate))


def portability(variant: Measured, _: Measured) -> Interval:
    works, unknown = variant.engines()
    return Interval(works, works, works + unknown)
