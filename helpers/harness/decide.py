"""Which variant to take: the smallest that passes every gate, what to fall back on, and why not the others."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from helpers.harness.gates import FAIL, PASS, UNDECIDED, Finding, Gate
from helpers.harness.measured import Measured, NotMeasured
from helpers.harness.variants import Variant, bits

SAME_SIZE = 0.02  # files whose sizes differ by less count as equally small; the one nearer to full precision is taken


@dataclass(frozen=True)
class Verdict:
    """`outcome`: whether any variant passes (pass), none does (fail), or some might (undecided); a reason for each variant."""

    outcome: str
    pick: str | None
    fallback: str | None
    reasons: dict[str, str]
    findings: dict[str, list[Finding]]


def check(gates: Sequence[Gate], measured: Mapping[str, Measured], full: str) -> dict[str, list[Finding]]:
    """Every gate of every variant; `full` names the one in full precision."""
    return {name: [g.check(m, measured[full]) for g in gates] for name, m in measured.items()}


def outcome(findings: Sequence[Finding]) -> str:
    """Of one variant: it fails by one gate, and passes by all."""
    found = {f.outcome for f in findings}
    return FAIL if FAIL in found else UNDECIDED if UNDECIDED in found else PASS


def decide(gates: Sequence[Gate], measured: Mapping[str, Measured], full: str) -> Verdict:
    """The verdict on variants that were all measured on the same questions."""
    findings = check(gates, measured, full)
    of = {name: outcome(f) for name, f in findings.items()}
    passing = sorted((n for n in measured if of[n] == PASS), key=lambda n: _size(measured[n]))
    pick = None
    if passing:
        near = [n for n in passing if _size(measured[n]) <= (1 + SAME_SIZE) * _size(measured[passing[0]])]
        pick = min(near, key=lambda n: _distance(measured[n]))
    higher = [n for n in passing if pick and int(bits(measured[n].variant)) > int(bits(measured[pick].variant))]
    overall = PASS if pick else UNDECIDED if UNDECIDED in of.values() else FAIL
    return Verdict(overall, pick, higher[0] if higher else None,
                   {n: _reason(n, findings[n], pick, passing, measured) for n in measured}, findings)


def _size(m: Measured) -> float:
    """Bytes of the weights; what no file holds is larger than all that one does."""
    try:
        return m.bytes
    except NotMeasured:
        return float("inf")


def _distance(m: Measured) -> float:
    """KL from full precision on answers; of what was not asked anything, nothing is known."""
    return float(m.questions.answer.kl.sum() / m.questions.answer.tokens.sum()) if m.questions is not None else float("inf")


def _reason(name: str, findings: Sequence[Finding], pick: str | None, passing: Sequence[str],
            measured: Mapping[str, Measured]) -> str:
    for kind, word in ((FAIL, "fails"), (UNDECIDED, "undecided")):
        if which := [f for f in findings if f.outcome == kind]:
            return f"{word}: " + "; ".join(f"{f.gate} ({'measured ' if f.interval else ''}{f.reason})" for f in which)
    if name == pick:
        smaller = [n for n in measured if n not in passing and _size(measured[n]) < _size(measured[name])]
        return ("picked: passes every gate, and is the smallest that does (within 2 %, the nearest to full precision)"
                + f"; smaller but not passing: {', '.join(smaller)}" * bool(smaller))
    if _size(measured[name]) <= (1 + SAME_SIZE) * _size(measured[pick]):
        return f"passes; as small as {pick}, but not nearer to full precision"
    return f"passes; larger than {pick}"


class Trial(NamedTuple):
    """One turn of `search`: what was tried, why, and what the gates said of it on the tuning questions."""

    variant: str
    because: str
    outcome: str
    findings: list[Finding]


class Adjustment(NamedTuple):
    """A variant to try if one of these gates (a field's beginning) stops those before it."""

    helps: tuple[str, ...]
    change: str
    variant: Variant


QUALITY = ("recovery", "exact", "agreement", "kl", "delta_nll", "perplexity", "form")


def search(first: Variant, adjustments: Iterable[Adjustment], tune: Callable[[Variant], list[Finding]],
           judge: Callable[[Variant], list[Finding]]) -> tuple[list[Trial], list[Finding] | None]:
    """The article's loop: try a variant; where a gate stops it, the next adjustment that could help, until one passes on the
    tuning questions or the list ends. That one is judged once, on questions that chose nothing: (trials, its findings)."""
    trials, variant, because = [], first, "first"
    left = list(adjustments)
    while True:
        findings = tune(variant)
        trials.append(Trial(variant.name, because, outcome(findings), findings))
        if trials[-1].outcome == PASS:
            return trials, judge(variant)
        helped: list[Finding] = []
        while left and not helped:
            helps, change, variant = left.pop(0)
            helped = [f for f in findings if f.outcome != PASS and f.gate.startswith(helps)]
        if not helped:
            return trials, None
        because = f"{helped[0].gate.split(' ')[0]} {helped[0].outcome}: {change}"
