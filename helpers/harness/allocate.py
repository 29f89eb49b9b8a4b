"""A plan of bits under a budget: each linear gets an option, the sum of the damage is least, and the bytes suffice.

min sum_{l,o} d_{l,o} x_{l,o}  subject to  sum_{l,o} b_{l,o} x_{l,o} <= B,  sum_o x_{l,o} = 1,  x binary: a knapsack with one
choice a linear, solved by scipy's `milp` (HiGHS). The bytes are never more than B; the sum is the least there is, if all sizes
are multiples of more than a millionth of B, as linears' are.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

import helpers.methods  # noqa: F401  (makes all methods known)
from helpers.files import folder_hash, write_atomically
from helpers.harness.variants import Original
from helpers.measure.bytes import weight_bytes
from helpers.methods.keep import Keep
from helpers.models.layers import linears
from helpers.models.method import Format, Method, Plan, PlanError
from helpers.models.source import Source, shell
from helpers.models.walk import walk


class BudgetError(ValueError):
    """A budget below the smallest plan, or above the largest."""

    def __init__(self, budget: float, least: float, most: float, unit: str = "bytes"):
        low, high = ceil(1000 * least) / 1000, floor(1000 * most) / 1000  # which can be kept
        super().__init__(f"budget: expected {low:,.12g} to {high:,.12g} {unit}, the smallest plan to the largest, "
                         f"got {budget:,.12g}")
        self.least, self.most = least, most


class Option(NamedTuple):
    """What a linear may get: a method, the bytes of its file, the damage that is foreseen."""

    method: Method
    bytes: int
    damage: float


@dataclass(frozen=True)
class Allocation:
    """A method for each linear; bytes and damage are the sums."""

    methods: Mapping[str, Method]
    bytes: int
    damage: float

    def plan(self, units: Iterable[Sequence[str]] = ()) -> Plan:
        """The commonest method is the default; a rule for each of the `units` (else each linear) that has another."""
        default = Counter(self.methods.values()).most_common(1)[0][0]
        grouped = [tuple(unit) for unit in units]
        grouped += [(n,) for n in self.methods if not any(n in unit for unit in grouped)]
        return Plan(default, tuple((pattern(unit), method) for unit in grouped
                                   if (method := self.methods[unit[0]]) != default))


def pattern(names: Sequence[str]) -> str:
    """A regular expression of these linears of one module, and of no other."""
    module = names[0].rpartition(".")[0]
    ends = [n.removeprefix(f"{module}.") for n in names]
    return rf"^{re.escape(module)}\.({'|'.join(map(re.escape, ends))})$"


def allocate(options: Mapping[str, Sequence[Option]], budget: float, alike: Iterable[Sequence[str]] = ()) -> Allocation:
    """The allocation of least damage within `budget` bytes. Linears of a set in `alike` get one method.

    Raises BudgetError if not even the smallest options fit, or if the budget is beyond the largest.
    """
    units = [unit for given in alike if (unit := tuple(n for n in given if n in options))]
    units += [(n,) for n in options if not any(n in unit for unit in units)]
    each = [_together([options[n] for n in unit]) for unit in units]
    least, most = (sum(pick(o.bytes for o in choices) for choices in each) for pick in (min, max))
    if not least <= budget <= most:
        raise BudgetError(budget, least, most)
    chosen = _knapsack(each, budget)
    methods = {n: o.method for unit, o in zip(units, chosen, strict=True) for n in unit}
    return Allocation({n: methods[n] for n in options}, sum(o.bytes for o in chosen), sum(o.damage for o in chosen))


def _knapsack(each: Sequence[Sequence[Option]], budget: float) -> list[Option]:
    """One of each. HiGHS takes for equal, and for within the budget, what is off by 1e-6. So damage is scaled by the total of
    the last round, until that is no smaller by half, and the room shrinks by that much if a round went beyond it."""
    row = np.repeat(np.arange(len(each)), [len(choices) for choices in each])
    size, cost = (np.array([getattr(o, of) - min(getattr(p, of) for p in choices) for choices in each for o in choices], float)
                  for of in ("bytes", "damage"))
    room = budget - sum(min(o.bytes for o in choices) for choices in each)
    worst, limit = cost.sum(), 1.0
    while True:
        found = milp(cost * (1e4 / (worst or 1)), integrality=np.ones(len(cost)), options={"mip_rel_gap": 0},
                     bounds=Bounds(0, (cost <= worst) & (size <= room)), constraints=[
                         LinearConstraint((row == np.arange(len(each))[:, None]).astype(float), 1, 1),
                         LinearConstraint(size / (room or 1), ub=limit)])
        taken = None if found.x is None else found.x > 0.5
        if taken is None or size[taken].sum() > room:
            worst, limit = cost.sum(), limit - 1e-6
        elif 2 * (total := cost[taken].sum()) < worst:
            worst = total
        else:
            return [o for o, x in zip((o for choices in each for o in choices), taken, strict=True) if x]


def _together(each: Sequence[Sequence[Option]]) -> list[Option]:
    """The options that several linears have in common, their bytes and damage summed."""
    tables = [{o.method: o for o in options} for options in each]
    return [Option(m, sum(t[m].bytes for t in tables), sum(t[m].damage for t in tables))
            for m in tables[0] if all(m in t for t in tables)]


def options(base: Original, damage: Mapping[tuple[str, Method], float], form: Format) -> dict[str, list[Option]]:
    """{linear: its options}: each method with a known damage, and 16 bits with none."""
    found = {}
    for name, m in linears(shell(base.folder)):
        found[name] = [Option(method, weight_bytes(form, m.out_features, m.in_features, method), d)
                       for (n, method), d in damage.items() if n == name]
        found[name].append(Option(Keep(), 2 * m.weight.numel(), 0.0))
    return found


def fused(base: Original) -> list[tuple[str, ...]]:
    """Linears of a module that read one input, which engines fuse into one matrix (q, k, v; gate, up): one method for all."""
    found: dict[tuple[int, int, str], list[str]] = {}
    for n, step in enumerate(walk(Source.from_folder(base.folder), [range(8)])):
        for g, group in enumerate(step.layout.groups):
            for name in (f"{step.name}.{end}" for end in group):
                found.setdefault((n, g, name.rpartition(".")[0]), []).append(name)
    return [tuple(names) for names in found.values() if len(names) > 1]


def save_plan(path: Path, plan: Plan, base: Original, **about: Any) -> None:
    """A plan as a file that `helpers.quantize --plan` and `helpers.compare --methods` take; it knows its model's weights."""
    record = {"plan": plan.key(), "weights": folder_hash(base.folder), "model": base.model, "revision": base.revision, **about}
    write_atomically(path, json.dumps(record, indent=1) + "\n")


def read_plan(path: Path, folder: Path) -> Plan:
    """The plan in a file, for the model in `folder`. Raises PlanError for a file that is no plan, or one for another model."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        plan, weights = Plan.parse(record["plan"]), record["weights"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlanError(f"{path} is no plan: {error!r}; `python -m helpers.sensitivity` writes one") from error
    if weights != folder_hash(folder):
        raise PlanError(f"{path} is a plan for {record.get('model')}, whose weights are others than those in {folder}: "
                        "measure this model, `python -m helpers.sensitivity`")
    try:
        plan.check_names(name for name, _ in linears(shell(folder)))
    except PlanError as error:
        raise PlanError(f"{path}: {error}; `python -m helpers.sensitivity` writes plans of this model") from error
    return plan
