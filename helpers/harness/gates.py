"""Limits that a variant has to keep, read from a YAML file, and what each says of it: pass, fail, or undecided.

A gate compares an interval with a limit. Each of the interval's bounds holds with 95 % (so it is a 90 % interval): a variant
that misses its limit passes about one time in twenty at most, one that keeps it fails at most as often. Of KL and loss nothing
is said with fewer than 20 texts, where the bounds would not hold.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from helpers.harness.measured import Measured, NotMeasured
from helpers.harness.quantities import (
    Quantity,
    agreement,
    delta_nll,
    errors,
    exact,
    exactly,
    form,
    kl,
    percentile,
    perplexity,
    portability,
    recovery,
    speed,
)
from helpers.harness.strict import Strict, wrong
from helpers.measure.stats import Interval

SCHEMA = json.loads(Path(__file__).with_name("gates.schema.json").read_text())
PASS, FAIL, UNDECIDED = "pass", "fail", "undecided"
SLACK = 1e-9  # to be just as much is enough, whatever it was rounded to


class BadGates(ValueError):
    """A gates file that cannot be read, or asks for what cannot be."""


class Finding(NamedTuple):
    """What one gate says of one variant; `interval` is None where nothing was measured."""

    gate: str
    outcome: str
    interval: Interval | None
    reason: str


@dataclass(frozen=True)
class Gate:
    """One limit: `of` measures, and has to be below ("<") or above (">") `limit`."""

    field: str
    of: Quantity
    below: bool
    limit: float
    rate: float | None = None  # requests/s that have to be served for it

    def __str__(self) -> str:
        return f"{self.field} {'<' if self.below else '>'} {self.limit:.6g}"

    def check(self, variant: Measured, full: Measured) -> Finding:
        try:
            i = self.of(variant, full)
        except NotMeasured as error:
            return Finding(str(self), UNDECIDED, None, str(error))
        inside = i.high < self.limit if self.below else i.low > self.limit
        outside = i.low >= self.limit if self.below else i.high <= self.limit
        outcome = PASS if inside else FAIL if outside else UNDECIDED
        return Finding(str(self), outcome, i, f"{shown(i)}{self.needed(i) if outcome == UNDECIDED else ''}")

    def needed(self, i: Interval) -> str:
        """How many times the sample would decide, if the estimate stays what it is: widths fall with its square root."""
        if self.field == "portability":
            return ": there are engines that were not tried"
        if not np.isfinite([i.low, i.high]).all():
            return ": too few values for this percentile"
        gap, reach = self.limit - i.estimate, (i.high - i.estimate if i.estimate < self.limit else i.estimate - i.low)
        return ": at its limit" if abs(gap) < 2 * SLACK else f": {(reach / gap) ** 2:.2g} times the sample would decide"


def shown(i: Interval) -> str:
    """An estimate, with its interval if it has a width, to four digits."""
    return f"{i.estimate:.4g}" if i.low == i.high else f"{i.estimate:.4g} [{i.low:.4g}, {i.high:.4g}]"


def read_gates(path: Path) -> list[Gate]:
    """The gates of a YAML file. Raises BadGates naming file, field and what was expected."""
    try:
        asked = yaml.load(path.read_text(encoding="utf-8"), Strict)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadGates(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    try:
        return parse_gates(asked)
    except BadGates as error:
        raise BadGates(f"{path}: {error}") from error


def parse_gates(asked: Any) -> list[Gate]:
    """The gates of what a YAML file holds. Raises BadGates naming field and what was expected."""
    if fault := wrong(asked, SCHEMA):
        raise BadGates(fault)
    gates = list(_gates(asked))
    for below in (g for g in gates if g.below):
        for above in (g for g in gates if not g.below and g.field == below.field):
            if above.limit >= below.limit:
                raise BadGates(f"{below.field}: {below} and {above} contradict each other: nothing could pass")
    return gates


def check_names(gates: Sequence[Gate], tasks: Collection[str], texts: Collection[str]) -> None:
    """Raises BadGates if a limit is on a task or a text that is not asked."""
    for gate in gates:
        field, _, name = gate.field.partition(".")
        known = {"recovery": tasks, "exact": tasks, "kl": {*tasks, *texts}, "delta_nll": {*tasks, *texts}, "perplexity": texts}
        if name and field in known and name not in {*known[field], "overall"}:
            raise BadGates(f"{gate.field}: nothing of that name is asked: expected overall or one of "
                           f"{', '.join(sorted(known[field]))}")


def _gates(asked: Mapping) -> Iterator[Gate]:
    for field, of in {"recovery": recovery, "exact": exact, "agreement": agreement}.items():
        for name, least in _by_name(asked.get(field)):
            yield _least(f"{field}{name and '.' + name}", of(name or "overall"), least)
    for field, of in {"kl": kl, "delta_nll": delta_nll, "perplexity": perplexity}.items():
        for name, limits in _by_name(asked.get(field)):
            yield from _limits(f"{field}{name and '.' + name}", of(name or "overall"), limits)
    for part, least in asked.get("form", {}).items():
        yield _least(f"form.{part}", form(part), least)
    yield from _percentiles(asked)
    if served := asked.get("served"):
        yield from _percentiles(served, served["rate"])
        yield from _limits("served errors", errors(served["rate"]), served.get("errors", []), served["rate"])
        yield from _limits("served tokens/s", speed(served["rate"]), served.get("tokens_per_second", []), served["rate"])
    yield from _limits("memory_bytes", lambda v, _: exactly(v.bytes), asked.get("memory_bytes", []))
    yield from _limits("memory_share", lambda v, full: exactly(v.bytes / full.bytes), asked.get("memory_share", []))
    yield from _limits("peak_bytes", lambda v, _: exactly(v.peak()), asked.get("peak_bytes", []))
    if where := asked.get("fits"):
        gpu, context, batch = where["gpu_gb"], where["context"], where.get("batch", 1)
        yield Gate(f"fits {gpu:g} GB at {batch} x {context} tokens: share of it",
                   lambda v, _: exactly(v.fit(gpu, context, batch).share), True, 1)
    if least := asked.get("portability"):
        yield Gate("portability", portability, False, least - 0.5)


def _least(field: str, of: Quantity, least: float) -> Gate:
    return Gate(field, of, False, least - SLACK)


def _limits(field: str, of: Quantity, limits: str | list, rate: float | None = None) -> Iterator[Gate]:
    for limit in [limits] if isinstance(limits, str) else limits:
        yield Gate(field, of, "<" in limit, float(limit.strip().lstrip("<>")), rate)


def _percentiles(asked: Mapping, rate: float | None = None) -> Iterator[Gate]:
    for what in ("ttft_ms", "itl_ms", "e2el_ms"):
        for limit in [asked[what]] if isinstance(asked.get(what), str) else asked.get(what, []):
            q, sign, number = re.match(r"\s*p\((\d+)\)\s*([<>])\s*(\S+)", limit).groups()
            field = f"{'' if rate is None else f'served at {rate:g}/s, '}{what} p({q})"
            yield Gate(field, percentile(what, int(q) / 100, rate), sign == "<", float(number), rate)


def _by_name(asked: Any) -> Iterator[tuple[str, Any]]:
    """("", limit) for a limit alone, else (name, limit) for each."""
    if asked is not None:
        # YAML reads a name such as 4 or yes as something else
        yield from ((str(k), v) for k, v in asked.items()) if isinstance(asked, dict) else [("", asked)]

