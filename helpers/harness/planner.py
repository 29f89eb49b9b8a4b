"""From the map of single layers to a plan that is not worse than the uniform setting of its bytes: foreseen, made, compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from helpers.harness.allocate import Allocation, BudgetError, Option, allocate, fused, options
from helpers.harness.compare import Quality
from helpers.harness.sensitivity import Sensitivity
from helpers.harness.variants import Simulation
from helpers.measure.bytes import bits_a_weight, weights_inside
from helpers.measure.stats import Interval, studentized_interval
from helpers.methods.gptq import Gptq
from helpers.models.method import Format, Method, Plan
from helpers.store import Cell

# how single effects add up: total KL = (sum of KL^POWER)^(1 / POWER); chapter 7 measures what fits
POWER = 0.8
BITS, GROUPS = (2, 3, 4, 8), (32, 64, 128)


class Choice(NamedTuple):
    """A plan beside the best uniform setting within its bytes, both quantized for real, on the tuning questions."""

    plan: Plan
    uniform: Plan
    difference: Interval  # KL of the plan less that of the uniform setting, nats/token

    @property
    def chosen(self) -> Plan:
        """The plan only where it is measurably better."""
        return self.plan if self.difference.high < 0 else self.uniform

    def __str__(self) -> str:
        return (f"KL {self.difference} against {self.uniform.default}: {self.difference.verdict()}, so the "
                f"{'plan' if self.chosen == self.plan else 'uniform setting'} is returned")


def settings(bits: Sequence[int] = BITS, groups: Sequence[int] = GROUPS, method: Method | None = None) -> list[Method]:
    """What a linear may get, and what uniform plans are made of: one method at all widths and groups."""
    return [replace(method or Gptq(), bits=b, group_size=g) for b in bits for g in groups]


def single_kl(cells: Mapping[tuple[str, Method], Cell]) -> dict[tuple[str, Method], float]:
    """{(layer, method): KL, nats/token, of the model in which it alone is quantized}."""
    return {key: float(c.arrays["answer_kl"].sum() / c.arrays["answer_tokens"].sum()) for key, c in cells.items()}


@dataclass(frozen=True)
class Planner:
    """Plans of the model of a map, by the foreseen damage of {(linear, method)}; `alike`: linears that engines fuse get one
    method."""

    sensitivity: Sensitivity
    kl: Mapping[tuple[str, Method], float] = field(repr=False)
    form: Format
    power: float = POWER
    alike: bool = True

    @cached_property
    def options(self) -> dict[str, list[Option]]:
        """KL^power of each; what a sample happens to put below that of more bits, or below zero, is noise."""
        return options(self.sensitivity.base, {k: max(v, 0.0) ** self.power for k, v in self.kl.items()}, self.form)

    @cached_property
    def units(self) -> list[tuple[str, ...]]:
        return fused(self.sensitivity.base) if self.alike else []

    @cached_property
    def weights(self) -> int:
        return weights_inside(self.sensitivity.base.config)

    def bits(self, plan: Plan) -> float:
        return bits_a_weight(self.sensitivity.base.config, plan, self.form)

    def allocation(self, bits: float) -> Allocation:
        """Of least damage at so many bits a weight, as a file has them. Raises BudgetError."""
        try:  # rounded, so that the bits of a plan suffice for its bytes
            return allocate(self.options, round(bits * self.weights / 8, 3), self.units)
        except BudgetError as error:
            raise BudgetError(bits, *(8 * b / self.weights for b in (error.least, error.most)), "bits a weight") from error

    def plan(self, bits: float) -> Plan:
        return self.allocation(bits).plan(self.units)

    def foreseen(self, methods: Mapping[str, Method]) -> float:
        """KL of a model with these methods, nats/token, but for a factor that all plans share."""
        damage = {n: {o.method: o.damage for o in found} for n, found in self.options.items()}
        return sum(damage[n][m] for n, m in methods.items()) ** (1 / self.power)

    def uniform(self, bits: float, rivals: int = 3) -> list[Plan]:
        """The uniform settings within so many bits a weight, those of least foreseen damage first."""
        methods = list(dict.fromkeys(m for _, m in self.kl))
        known = {m: {n: m for n in self.options} for m in methods if all((n, m) in self.kl for n in self.options)}
        within = [m for m in known if self.bits(Plan(m)) <= bits]
        return [Plan(m) for m in sorted(within, key=lambda m: self.foreseen(known[m]))[:rivals]]

    def simulated(self, plan: Plan, tokens: Sequence[Sequence[int]] | None = None) -> Simulation:
        return Simulation(str(plan), plan, self.sensitivity.tokens if tokens is None else tokens, self.sensitivity.base)

    def choose(self, bits: float, rivals: int = 3) -> Choice:
        """The plan and the likeliest uniform settings of its bytes, quantized for real and compared by question.

        Raises BudgetError.
        """
        plan, judged = self.plan(bits), self.judge
        uniform = self.uniform(bits, rivals) or [plan]  # where no setting is as small, there is nothing to be better than
        scores = {p: judged.scores(self.simulated(p)).answer for p in dict.fromkeys((*uniform, plan))}
        best = min(uniform, key=lambda p: scores[p].kl.sum())
        return Choice(plan, best, studentized_interval(scores[plan].kl - scores[best].kl, scores[best].tokens))

    @cached_property
    def judge(self) -> Quality:
        s = self.sensitivity
        return Quality(s.items, s.base, s.store, s.device, "plans")
