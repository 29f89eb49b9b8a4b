"""Three cases with limits and requests of their own, and the article's decision flow run on each: try, see which gate stops it,
adjust, judge once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from helpers.harness.decide import QUALITY, Adjustment, Trial, outcome, search
from helpers.harness.gates import PASS, Finding, Gate, read_gates
from helpers.harness.measured import Measured
from helpers.harness.study import Material, Study, material
from helpers.harness.variants import Original, Simulation, Variant
from helpers.measure.tasks import Example
from helpers.methods.awq import Awq
from helpers.methods.awq_gptq import AwqGptq
from helpers.methods.gptq import PLAIN, Gptq
from helpers.methods.int8 import RowInt8
from helpers.methods.nf4 import Nf4
from helpers.models.layers import common_group, linears
from helpers.models.method import Plan
from helpers.models.source import BUNDLED, DATA, resolve
from helpers.results import BadRecord, read

WHOSE = {"bundled": "bundled", "small": "real"}  # what the text calls the models of the record
READ_OFF = tuple(q for q in QUALITY if q != "form")


class Case(NamedTuple):
    """One use: its title, what the article says to take, and the methods in the order in which it says to try them."""

    name: str
    title: str
    article: str
    order: tuple[str, ...]

    @property
    def gates(self) -> Path:
        return DATA / "gates" / f"{self.name}.yml"

    def prompts(self, model: str = "bundled") -> Path:
        """Its requests: of the invented world for the model that knows it, in English for any other."""
        return DATA / "cases" / f"{'' if resolve(model) == BUNDLED else 'english_'}{self.name}.jsonl"


CASES = {c.name: c for c in (
    Case("chatbot", "support chatbot, strict p95", "NF4 first, then AWQ", ("NF4", "AWQ", "GPTQ")),
    Case("condensing", "reports condensed over night", "GPTQ, calibrated well", ("GPTQ", "AWQ", "NF4")),
    Case("doses", "doses that must not be wrong", "AWQ, sensitive layers higher", ("AWQ", "GPTQ", "NF4")))}


@dataclass(frozen=True)
class Decided:
    """How the loop went: its turns on the tuning requests, what the gates said of the last on the judging ones (None: nothing
    got so far), and the fallback: int8 if that passes there, else full precision."""

    case: Case
    trials: list[Trial]
    judged: list[Finding] | None
    fallback: str

    @property
    def pick(self) -> str | None:
        return self.trials[-1].variant if self.judged and outcome(self.judged) == PASS else None


def decided(case: Case, model: str = "bundled", device: str = "cpu", gates: Sequence[Gate] = (), **where) -> Decided:
    """The flow on one case, by its limits, or others, on what is read off given answers; generating answers, and a server, take
    minutes and are left to `make compare`. `where`: revision and dtype."""
    of = material(model, device=device, prompts=case.prompts(model), **where)
    gates = [g for g in gates or read_gates(case.gates) if g.field.startswith(READ_OFF)]
    tune, judge = (judging(of.full, gates, part, device) for part in (of.tune, of.judge))
    first, *rest = steps(case, of, device)
    trials, judged = search(first.variant, rest, tune, judge)
    int8 = Simulation("int8", RowInt8(), base=of.full)
    return Decided(case, trials, judged, int8.name if outcome(judge(int8)) == PASS else of.full.name)


def judging(full: Original, gates: Sequence[Gate], asked: Sequence[Example], device: str) -> Callable[[Variant], list[Finding]]:
    """What these gates say of a variant on these requests."""
    quality = Study(full, (), (), asked, {}, gates, device).quality(asked)
    base = Measured(full, quality.scores(full))
    return lambda variant: [g.check(Measured(variant, quality.scores(variant)), base) for g in gates]


def steps(case: Case, of: Material, device: str = "cpu") -> list[Adjustment]:
    """The three methods as the article orders them, then what it says to adjust: calibration, scales, precision, width."""
    lm = of.full.load(device)
    group = common_group(lm)
    best = Gptq(4, group, sym=False, search=True, desc_act=True)
    tokens = of.tokens[:32]
    methods = {"NF4": (Nf4(), ()), "AWQ": (Awq(4, group), tokens), "GPTQ": (Gptq(4, group, sym=False, **PLAIN), tokens)}
    last = "|".join(writers(lm))
    found = [(name, name, *methods[name]) for name in case.order] + [
        ("GPTQ, desc_act, searched scales", "order of columns and scales", best, tokens),
        ("AWQ's scales, then GPTQ", "both methods", AwqGptq(4, group, sym=False, search=True), tokens),
        ("GPTQ, 8 bits where it writes back", "more bits for some layers",
         Plan(best, {rf"({last})$": replace(best, bits=8)}), tokens),
        ("int8", "more bits for all", RowInt8(), ())]
    return [Adjustment(QUALITY, change, Simulation(name, plan, tokens, of.full)) for name, change, plan, tokens in found]


def writers(model) -> list[str]:
    """The last names of the linears that write into the residual stream: of each part of a block the last one."""
    parts: dict[str, str] = {}
    for name, _ in linears(model):
        part, _, last = name.rpartition(".")
        parts[part] = last
    return sorted(set(parts.values()))


def served_table() -> pd.DataFrame | str:
    """What the servers of `make cases` took, ms: a row for each model, case and variant."""
    try:
        record = read("cases")
    except BadRecord:
        return "nothing was compared yet: make cases"
    return pd.DataFrame({(WHOSE[model], case, name): {
        "requests/s": rate, "TTFT p95": load["ttft_ms"][1], "ITL p50": load["itl_ms"][0]}
        for model, cases in record.data.items() for case, c in cases.items()
        for name, v in {"16 bits, bf16": {"served": c["served_bf16"]}, **c["variants"]}.items()
        for rate, load in v["served"].items()}).T


def record_table() -> pd.DataFrame | str:
    """What `make cases` left: a row for each model and case."""
    try:
        told = read("cases").data
    except BadRecord:
        return "nothing was compared yet: make cases"
    return pd.DataFrame({(WHOSE[model], name): {
        "the article": c["article"], "verdict": c["verdict"]["outcome"], "pick": c["verdict"]["pick"] or "none",
        "fallback": c["verdict"]["fallback"] or "16 bits", "exit status": c["exit_status"], "measured": c["made"]["date"],
        "reasons": {n: v["reason"] for n, v in c["variants"].items()}}
        for model, cases in told.items() for name, c in cases.items()}).T
