"""A plan of bits under a budget: each linear gets an option, the sum of the damage is least, and the bytes suffice.

min sum_{l,o} d_{l,o} x_{l,o}  subject to  sum_{l,o} b_{l,o} x_{l,o} <= B,  sum_o x_{l,o} = 1,  x binary: a knapsack with one
choice a linear, solved exactly by scipy's `milp` (HiGHS).
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
    """A budget below the smallest plan, or above 16 bits."""


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


def allocate(options: Mapping[str, Sequence[Option]], budget: int, alike: Iterable[Sequence[str]] = ()) -> Allocation:
    """The allocation of least damage within `budget` bytes. Linears of a set in `alike` get one method.

    Raises BudgetError if not even the smallest options fit, or if the budget is beyond the largest.
    """
    units = [tuple(n for n in unit if n in options) for unit in alike]
    units += [(n,) for n in options if not any(n in unit for unit in units)]
    choices = [(u, o) for u, unit in enumerate(units) if unit for o in _together([options[n] for n in unit])]
    least, most = (sum(pick(o.bytes for u, o in choices if u == k) for k, unit in enumerate(units) if unit)
                   for pick in (min, max))
    if not least <= budget <= most:
        beyond = "below the smallest" if budget < least else "above the largest"
        raise BudgetError(f"budget: {budget:,} bytes are {beyond} plan; expected {least:,} to {most:,}")
    one_each = np.array([[u == k for u, _ in choices] for k, unit in enumerate(units) if unit], dtype=float)
    bytes_each, damage = (np.array([getattr(o, what) for _, o in choices], dtype=float) for what in ("bytes", "damage"))
    scale = damage.max() or 1.0  # else its tolerance swallows small differences
    found = milp(damage / scale, integrality=np.ones(len(choices)), bounds=Bounds(0, 1), options={"mip_rel_gap": 0},
                 constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(bytes_each / budget, ub=1)])
    if found.x is None:
        raise BudgetError(f"budget: no plan of {budget:,} bytes was found: {found.message}")
    taken = [c for c, x in zip(choices, found.x, strict=True) if x > 0.5]
    methods = {n: o.method for u, o in taken for n in units[u]}
    return Allocation({n: methods[n] for n in options}, sum(o.bytes for _, o in taken), sum(o.damage for _, o in taken))


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
    """Linears that read one input, which engines fuse into one matrix (q, k, v; gate, up), so that they want one method."""
    steps = walk(Source.from_folder(base.folder), [range(8)])
    return [tuple(f"{step.name}.{n}" for n in group) for step in steps for group in step.layout.groups if len(group) > 1]


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
        raise PlanError(f"{path} is no plan: {error}; `python -m helpers.sensitivity` writes one") from error
    if weights != folder_hash(folder):
        raise PlanError(f"{path} is a plan for {record.get('model')}, whose weights are others than those in {folder}: "
                        "measure this model, `python -m helpers.sensitivity`")
    plan.check_names(name for name, _ in linears(shell(folder)))
    return plan
