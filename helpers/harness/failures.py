"""Failure modes: a variant in which one is provoked, a figure that looks fine all the same, the gate that sees it, and the
variant in which it is remedied."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from helpers.harness.gates import FAIL, PASS, Finding, Gate
from helpers.harness.measured import Measured
from helpers.harness.study import Study
from helpers.harness.variants import Variant


@dataclass(frozen=True)
class Failure:
    """`fine`: a gate that both variants pass, if there is one; `detects`: the gate that only the second should pass."""

    name: str
    provoked: Variant
    remedied: Variant
    detects: Gate
    fine: Gate | None = None

    @property
    def gates(self) -> list[Gate]:
        return [g for g in (self.fine, self.detects) if g is not None]


@dataclass(frozen=True)
class Seen:
    """What the gates of a failure say before and after the remedy."""

    failure: Failure
    before: dict[Gate, Finding]
    after: dict[Gate, Finding]

    @property
    def detected(self) -> bool:
        return self.before[self.failure.detects].outcome == FAIL

    @property
    def remedied(self) -> bool:
        return self.after[self.failure.detects].outcome == PASS


def measuring(study: Study) -> Callable[[Variant, Sequence[Gate]], Measured]:
    """Of a variant what these gates ask for, and no more: questions always, texts and generated answers where they do."""
    def measured(variant: Variant, gates: Sequence[Gate]) -> Measured:
        fields, form = {g.field.partition(".")[0] for g in gates}, study.form()
        return Measured(
            variant, study.quality(study.judge).scores(variant),
            study.texts().scores(variant) if "perplexity" in fields else None,
            study.store.get(variant.name, form.key | {"variant": variant.key()}, lambda: form.of(variant)).arrays
            if "form" in fields else None)

    return measured


def seen(failure: Failure, study: Study) -> Seen:
    """Both variants measured and judged by the failure's gates."""
    of = measuring(study)
    full = of(study.full, failure.gates)
    before, after = ({g: g.check(of(v, failure.gates), full) for g in failure.gates}
                     for v in (failure.provoked, failure.remedied))
    return Seen(failure, before, after)


def table(found: Sequence[Seen]) -> pd.DataFrame:
    """A row for each failure: what looked fine, what detected it, and both after the remedy."""
    def said(of: dict[Gate, Finding], gate: Gate | None) -> str:
        return f"{gate}: {of[gate].outcome}, {of[gate].reason}" if gate else ""

    return pd.DataFrame({s.failure.name: {
        "provoked by": s.failure.provoked.name, "looked fine": said(s.before, s.failure.fine),
        "detected by": said(s.before, s.failure.detects), "remedied by": s.failure.remedied.name,
        "then": said(s.after, s.failure.detects)} for s in found}).T
