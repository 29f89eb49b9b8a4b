"""Failure modes: a variant in which one is provoked, a figure that looks fine all the same, the gate that sees it, and the
variant in which it is remedied."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from helpers.harness.gates import FAIL, PASS, Finding, Gate, parse_gates
from helpers.harness.measured import Measured
from helpers.harness.study import Study
from helpers.harness.variants import Simulation, Variant
from helpers.methods.gptq import PLAIN, Gptq
from helpers.methods.rtn import Rtn
from helpers.models.layers import common_group
from helpers.models.source import DATA
from helpers.models.texts import calibration, read_jsonl, windows


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
        fields, names, form = *(set(x) for x in zip(*(g.field.partition(".")[::2] for g in gates), strict=True)), study.form()
        return Measured(
            variant, study.quality(study.judge).scores(variant),
            study.texts.scores(variant) if "perplexity" in fields or names & set(study.passages) else None,
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


def on_prose(study: Study, tokens: Sequence[Sequence[int]]) -> Failure:
    """Good perplexity, poor answers: GPTQ at 3 bits calibrated on prose alone; remedied by `tokens`, windows of requests."""
    told = [r["text"] for r in read_jsonl(DATA / "calibration" / "long.jsonl") if "text" in r]
    prose, text = windows([study.tokenizer.encode(t) for t in told], 256, 32), next(iter(study.passages))
    return Failure("good perplexity, poor answers", _gptq(study, "3 bits, calibrated on prose", 3, prose),
                   _gptq(study, "3 bits, calibrated on requests", 3, tokens),
                   gate(kl="< 0.038"), gate(delta_nll={text: "< 0.02"}))


def rounded_head(study: Study, tokens: Sequence[Sequence[int]]) -> Failure:
    """Broken form: the output head at 2 bits, one scale a row, all else in 4 bits."""
    return Failure("broken form", _gptq(study, "4 bits, head at 2 bits", 4, tokens, head=Rtn(2, -1)),
                   _gptq(study, "4 bits, head in 16 bits", 4, tokens), gate(form={"json_parses": 0.9}))


def short_windows(study: Study, tokens: Sequence[Sequence[int]], bits: int = 2) -> Failure:
    """Long context: calibrated on as many tokens in windows of 32, of short requests."""
    short = windows(calibration(study.tokenizer, "short"), 32, 256)
    return Failure("long context", _gptq(study, f"{bits} bits, calibrated on windows of 32", bits, short),
                   _gptq(study, f"{bits} bits, calibrated on windows of 256", bits, tokens),
                   gate(recovery={"recall_far": 0.46}), gate(recovery={"recall_4": 0.7}))


def redrawn(variant: Simulation, draws: int) -> list[Simulation]:
    """It, and the same calibrated on its windows in other orders: in floating point each is another draw (chapter 5)."""
    return [variant, *(replace(variant, name=f"{variant.name}, draw {n}", tokens=random.Random(n).sample(
        list(variant.tokens), len(variant.tokens))) for n in range(1, draws))]


def _gptq(study: Study, name: str, bits: int, tokens: Sequence[Sequence[int]], **also) -> Simulation:
    group = common_group(study.full.load(study.device))
    return Simulation(name, Gptq(bits, group, sym=False, **PLAIN), tokens, study.full, **also)


def gate(**asked) -> Gate:
    """One limit, as a gates file has it."""
    return parse_gates(asked)[0]


def table(found: Sequence[Seen]) -> pd.DataFrame:
    """A row for each failure: what looked fine, what detected it, and both after the remedy."""
    def said(of: dict[Gate, Finding], gate: Gate | None) -> str:
        return f"{gate}: {of[gate].outcome}, {of[gate].reason}" if gate else ""

    return pd.DataFrame({s.failure.name: {
        "provoked by": s.failure.provoked.name, "looked fine": said(s.before, s.failure.fine),
        "detected by": said(s.before, s.failure.detects), "remedied by": s.failure.remedied.name,
        "then": said(s.after, s.failure.detects)} for s in found}).T
