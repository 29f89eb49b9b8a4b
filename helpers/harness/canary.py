"""A canary: a pick takes over a fallback's traffic by the steps of a manifest, and hands it back when a rule fires.

A rule is the least share of the pick's answers that have to be good in one way. The interval of a share is exact
(Clopper-Pearson): Wilson's is too narrow where few answers are to be bad, and repeated looks find that out.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
from scipy.special import betaincinv
from tqdm import tqdm

from helpers.harness.gates import FAIL, PASS, UNDECIDED, Finding, shown
from helpers.harness.rollout import ALARM, PROMOTED, ROLLED_BACK, TOO_SHORT, Manifest
from helpers.harness.serve import Answer
from helpers.measure.answers import Said, form, prompt_ids
from helpers.measure.stats import Interval
from helpers.measure.tasks import Example

Ask = Callable[[Sequence[Sequence[int]]], list[Answer]]  # prompts to answers, in order; a fault is an Answer with its error
RECENT = 100  # answers; a fault that begins late would drown in thousands of good ones
FORM = ("json_parses", "schema", "ends", "no_loops")


class Served(NamedTuple):
    """The answer that a request of the log got, and of whom; with an `error` both sides failed, and it is lost."""

    request: str
    by: str
    answer: Answer


class Batch(NamedTuple):
    """One batch: requests so far, the pick's share, whole answers of each side, the pick's errors, {rule: its finding}."""

    requests: int
    share: float
    pick: int
    fallback: int
    errors: int
    findings: dict[str, Finding]


@dataclass(frozen=True)
class Canary:
    """How it went; `served` in the order of the log."""

    outcome: str
    reason: str
    history: tuple[Batch, ...]
    served: tuple[Served, ...]

    @property
    def lost(self) -> list[str]:
        """Requests that the fallback failed on too."""
        return [s.request for s in self.served if s.answer.error is not None]


def run_canary(plan: Manifest, log: Sequence[Example], fallback: Ask, pick: Ask, tokenizer, batch: int = 20,
               progress: bool = False) -> Canary:
    """The log, batch by batch. A request goes to the pick if a hash of its id says so: the same log, the same way. One that
    the pick fails on is asked of the fallback at once, so nothing waits when a rule fires.

    After each batch a rule looks at all of the pick's answers so far, whatever the step (steps change the load, not the model,
    so evidence adds up), and at the latest RECENT alone. It fires if the interval is wholly below the limit; that bound fails
    with ALARM divided by the looks that the whole log allows (Bonferroni): rules times batches times two. The last step's
    share holds to the end of the log, and so do the rules: what was promoted can still be rolled back.
    """
    prompts, looks = [prompt_ids(tokenizer, e) for e in log], 2 * len(plan.keep) * -(-len(log) // batch)
    seen: dict[str, list[bool]] = {rule: [] for rule in plan.keep}
    history, served, step, in_step, outcome, reason = [], [], 0, 0, TOO_SHORT, "the log ends before the last step does"
    for start in tqdm(range(0, len(log), batch), disable=not progress, desc="batches"):
        rows = range(start, min(start + batch, len(log)))
        share = 0.0 if outcome == ROLLED_BACK else plan.steps[step].share
        mine = [n for n in rows if place(log[n]) < share]
        first = dict(zip(mine, pick([prompts[n] for n in mine]) if mine else [], strict=True))
        rest = [n for n in rows if n not in first or first[n].error is not None]
        second = dict(zip(rest, fallback([prompts[n] for n in rest]) if rest else [], strict=True))
        served += [Served(log[n].id, *(("fallback", second[n]) if n in second else ("pick", first[n]))) for n in rows]
        judge(seen, [log[n] for n in first], list(first.values()), tokenizer)
        findings = {rule: finding(rule, plan.keep[rule], good, ALARM / looks) for rule, good in seen.items() if good and share}
        history.append(Batch(rows[-1] + 1, share, sum(a.error is None for a in first.values()), sum(
            a.error is None for a in second.values()), sum(a.error is not None for a in first.values()), findings))
        in_step += len(rows)
        if fired := [f for f in findings.values() if f.outcome == FAIL]:
            outcome, reason = ROLLED_BACK, f"{fired[0].gate}: {fired[0].reason}, after {rows[-1] + 1} requests"
        elif share and in_step >= plan.steps[step].requests:
            if step == len(plan.steps) - 1 and outcome == TOO_SHORT:
                open_ones = [r for r in plan.keep if r not in findings or findings[r].outcome != PASS]
                outcome, reason = PROMOTED, f"no rule fired; not shown to be kept: {', '.join(open_ones) or 'none'}"
            step, in_step = min(step + 1, len(plan.steps) - 1), 0
    return Canary(outcome, reason, tuple(history), tuple(served))


def place(request: Example) -> float:
    """Where a request stands from 0 to below 1, by its id alone: who has the pick at one share has it at all larger ones."""
    return int(hashlib.sha256(request.id.encode()).hexdigest()[:8], 16) / 2**32


def judge(seen: Mapping[str, list[bool]], requests: Sequence[Example], answers: Sequence[Answer], tokenizer) -> None:
    """Adds to `seen` what each answer of the pick says to each rule; one that failed says that it failed, no more."""
    for request, a in zip(requests, answers, strict=True):
        tokens = tuple(a.tokens[:-1] if a.ended else a.tokens)  # without the end token, which would hide a loop before it
        told = {"answered": a.error is None}
        if a.error is None:
            found = form([Said(tokenizer.decode(tokens, skip_special_tokens=True).strip(), tokens, a.ended)], [request])
            about = ("right",) * bool(request.answer) + (FORM if found["structured"][0] else FORM[2:])
            told |= {part: bool(found[part][0]) for part in about}
        for rule in seen.keys() & told.keys():
            seen[rule].append(told[rule])


def finding(rule: str, least: float, good: Sequence[bool], alpha: float) -> Finding:
    """What a rule says of all answers, unless the latest alone break it; each bound of the interval fails with `alpha`."""
    for values in (good[-RECENT:], good):  # scipy's binomtest gives the same bounds, far slower
        k, n = sum(values), len(values)
        i = Interval(k / n, float(betaincinv(k, n - k + 1, alpha)) if k else 0.0,
                     float(betaincinv(k + 1, n - k, 1 - alpha)) if k < n else 1.0)
        if (outcome := FAIL if i.high < least else PASS if i.low >= least else UNDECIDED) == FAIL:
            break
    return Finding(f"{rule} >= {least:g}", outcome, i, f"{shown(i)} of {n} answers")


def table(canary: Canary) -> pd.DataFrame:
    """A row for each batch: each rule with its estimate and interval."""
    return pd.DataFrame([b._asdict() | {f.gate: f.reason for f in b.findings.values()} for b in canary.history]).drop(
        columns="findings", errors="ignore").fillna("")
