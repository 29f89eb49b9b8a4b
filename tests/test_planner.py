"""A plan beside the uniform settings of its bytes: foreseen, and returned only where it is measurably better."""

from types import SimpleNamespace

import numpy as np
import pytest
from handmade import scores

from helpers.book import random_llama
from helpers.harness.allocate import BudgetError, Option
from helpers.harness.planner import BITS, GROUPS, Planner, settings, single_kl
from helpers.harness.sensitivity import Sensitivity
from helpers.harness.variants import Original
from helpers.measure.tasks import Item
from helpers.methods.gptq import Gptq
from helpers.methods.keep import Keep
from helpers.methods.rtn import Rtn
from helpers.models.formats import GPTQ
from helpers.models.method import Plan
from helpers.store import Cell, Store

LOW, HIGH = Rtn(3, 64), Rtn(4, 64)
ITEMS = [Item(tuple(range(5 + n, 25 + n)), 10, "own", f"q{n}") for n in range(8)]


@pytest.fixture(scope="module")
def base():
    return Original(str(random_llama("planner-for-tests", 192, 352, tied=True)))


@pytest.fixture
def planner(base, tmp_path):
    """Of a map in which `down_proj` is worth more than all others."""
    sensitivity = Sensitivity(ITEMS, [], base, Store(tmp_path / "cells"))
    kl = {(n, m): (0.5 if "down" in n else 0.01) / m.bits**2 for n in list(sensitivity.shapes)[1:-1]
          for m in (Rtn(3, 32), Rtn(4, 32), LOW, HIGH) if sensitivity.fits(n, m)}
    return Planner(sensitivity, kl, GPTQ)


def told(planner, kl):
    """The planner with a judge that knows the KL of each question, for each plan; and the plans that it was asked about."""
    asked = []

    def of(variant):
        asked.append(variant.plan)
        return scores(np.zeros(8), kl=kl(variant.plan))

    planner.__dict__["judge"] = SimpleNamespace(scores=of)
    return asked


NOISE = np.array([0.1, -0.2, 0.3, -0.1, 0.2, -0.3, 0.1, -0.1])


def test_a_plan_that_is_measurably_better_is_chosen(planner):
    asked = told(planner, lambda plan: 1 + NOISE / 10 + 0.5 * (not plan.rules))
    choice = planner.choose(4.2)
    assert choice.plan == planner.plan(4.2) == choice.chosen != choice.uniform and choice.plan.rules
    assert choice.difference.estimate == pytest.approx(-0.5) and choice.difference.high < 0
    assert str(choice).endswith(f"against {choice.uniform.default}: measurably better, so the plan is returned")
    assert set(asked) == {choice.plan, *planner.uniform(4.2)} and len(asked) == 2


@pytest.mark.parametrize("more, said", [(NOISE - 0.01, "no difference detectable"), (0.5, "measurably worse")])
def test_any_other_is_not(planner, more, said):
    told(planner, lambda plan: 1 + NOISE / 10 + more * bool(plan.rules))
    choice = planner.choose(4.2)
    assert choice.chosen == choice.uniform == Plan(Rtn(3, 32)) != choice.plan
    assert str(choice).endswith(f"{said}, so the uniform setting is returned")


def test_the_best_of_the_uniform_settings_is_the_rival(base, tmp_path):
    """As measured, not as foreseen; beside the likeliest few nothing is quantized."""
    sensitivity = Sensitivity(ITEMS, [], base, Store(tmp_path))
    methods = [Rtn(b, 32) for b in range(2, 9)]
    planner = Planner(sensitivity, {(n, m): 1 / m.bits for n in list(sensitivity.shapes)[1:-1] for m in methods}, GPTQ)
    asked = told(planner, lambda plan: np.full(8, 0.1) if plan == Plan(Rtn(6, 32)) else np.ones(8))
    bits = planner.bits(Plan(Rtn(7, 32))) + 0.01
    choice = planner.choose(bits)
    assert choice.uniform == choice.chosen == Plan(Rtn(6, 32)) and choice.difference.low > 0
    assert set(asked) == {choice.plan, *(Plan(Rtn(b, 32)) for b in (5, 6, 7))}
    assert planner.uniform(bits, 1) == [Plan(Rtn(7, 32))] and planner.uniform(2) == []


def test_a_plan_that_is_the_uniform_setting_is_no_better_than_it(base, tmp_path):
    """Nor is it held against another, which it would beat."""
    sensitivity = Sensitivity(ITEMS, [], base, Store(tmp_path))
    inside = list(sensitivity.shapes)[1:-1]
    planner = Planner(sensitivity, {(n, m): 1 / m.bits for n in inside for m in (Rtn(3, 32), Rtn(4, 32))}, GPTQ)
    bits = planner.bits(Plan(Rtn(4, 32)))
    assert planner.plan(bits) == Plan(Rtn(4, 32)) and planner.uniform(bits) == [Plan(Rtn(4, 32)), Plan(Rtn(3, 32))]
    told(planner, lambda plan: np.full(8, float(plan.default.bits == 3)))
    choice = planner.choose(bits)
    assert choice.plan == choice.uniform == choice.chosen == Plan(Rtn(4, 32)) and tuple(choice.difference) == (0, 0, 0)
    assert "no difference detectable" in str(choice)


def test_where_no_setting_is_small_enough_there_is_the_plan(planner):
    """64 does not divide every linear, so there is no uniform setting of it; the plan leaves the others in 16 bits."""
    alone = Planner(planner.sensitivity, {(n, m): kl for (n, m), kl in planner.kl.items() if m == LOW}, GPTQ)
    asked = told(alone, lambda plan: np.ones(8))
    choice = alone.choose(12)
    assert asked == [choice.plan] and choice.chosen == choice.plan == choice.uniform
    assert {alone.plan(8).at(n) for n in alone.options if "down" in n} == {Keep()} and LOW in choice.plan.methods()


def test_a_budget_of_a_setting_suffices_for_it(base, tmp_path):
    """To the byte, whatever a float makes of the bits: the plan of so many bits is foreseen to be at least as good."""
    sensitivity = Sensitivity(ITEMS, [], base, Store(tmp_path))
    methods = settings((2, 7), (32, 64))
    kl = {(n, m): 1 / m.bits + m.group_size / 1e4 for n in list(sensitivity.shapes)[1:-1] for m in methods
          if sensitivity.fits(n, m)}
    planner = Planner(sensitivity, kl, GPTQ)
    for m in methods:
        bits = planner.bits(Plan(m))
        assert planner.bits(planner.plan(bits)) <= bits + 1e-9
        found = planner.allocation(bits)
        uniform = {n: m if sensitivity.fits(n, m) else Keep() for n in planner.options}
        assert planner.foreseen(found.methods) <= planner.foreseen(uniform) * (1 + 1e-9)
        assert planner.foreseen(found.methods) == pytest.approx(found.damage ** (1 / planner.power))
        alone = Planner(sensitivity, {key: value for key, value in kl.items() if key[1] == m}, GPTQ)
        assert alone.allocation(bits).methods == uniform  # the smallest that there is
    rounded = [m for m in methods if int(planner.bits(Plan(m)) * planner.weights / 8) * 8 / planner.weights
               < planner.bits(Plan(m)) - 1e-9]
    assert rounded  # for which cutting off the float would lose a byte


@pytest.mark.parametrize("bits", [0, -1, 2.5, 17, float("nan"), float("inf")])
def test_a_budget_is_in_bits(planner, bits):
    with pytest.raises(BudgetError) as stopped:
        planner.choose(bits)
    said = str(stopped.value)
    assert said.startswith("budget: expected ")
    assert said.endswith(f" to 16 bits a weight, the smallest plan to the largest, got {bits:g}")
    least = float(said.split()[2])
    assert 3 < least < 4 and planner.bits(planner.plan(least)) <= least
    assert planner.plan(16).methods().count(Keep()) == 1


def test_damage_is_a_power_of_the_kl_and_never_below_zero(planner):
    first, second = list(planner.options)[:2]
    kl = {(first, LOW): -0.1, (second, LOW): 0.2, (second, HIGH): 0.05}
    found = Planner(planner.sensitivity, kl, GPTQ, power=0.5)
    assert [o.damage for o in found.options[first]] == [0, 0] and found.options[first][0].method == LOW
    assert [o.damage for o in found.options[second]] == pytest.approx([0.2**0.5, 0.05**0.5, 0])
    assert found.foreseen({first: LOW, second: LOW}) == pytest.approx(0.2)
    twice = Planner(planner.sensitivity, {(first, LOW): 0.2, (second, LOW): 0.2}, GPTQ, power=0.5)
    assert twice.foreseen({first: LOW, second: LOW}) == pytest.approx((2 * 0.2**0.5) ** 2)
    assert all(isinstance(o, Option) for found in planner.options.values() for o in found)


def test_what_engines_fuse_is_alike_unless_told(planner):
    """q is worth little and v much, and both go into one matrix."""
    kl = {(n, m): (5.0 if "v_proj" in n else 0.001) / m.bits**2 for n, m in planner.kl}
    alike, free = (Planner(planner.sensitivity, kl, GPTQ, alike=flag) for flag in (True, False))
    methods = [p.allocation(4.1).methods for p in (alike, free)]
    q, v = (f"model.layers.0.self_attn.{n}_proj" for n in "qv")
    assert methods[0][q] == methods[0][v] and methods[1][q] != methods[1][v] and free.units == []
    assert free.plan(4.1).at(v) == methods[1][v] and alike.plan(4.1).at(v) == methods[0][v]


def test_settings_are_all_widths_and_groups_of_one_method():
    assert settings() == [Gptq(b, g) for b in BITS for g in GROUPS]
    assert settings((3,), (64, 32), Rtn(sym=False)) == [Rtn(3, 64, sym=False), Rtn(3, 32, sym=False)]


def test_kl_is_a_token():
    arrays = {"answer_kl": np.array([1.0, 3.0]), "answer_tokens": np.array([2.0, 6.0])}
    assert single_kl({("l", LOW): Cell("", {}, arrays)}) == {("l", LOW): 0.5}


def test_the_choice_is_measured_once_on_the_questions_to_choose_by(planner, monkeypatch):
    """For real, on a random model: a cell for each plan, all of the sensitivity's own questions; a second time, none."""
    choice = planner.choose(4.2)
    cells = [Cell.read(p) for p in planner.sensitivity.store.folder.iterdir()]
    assert {str(c.key["variant"]["plan"]) for c in cells} == {str(p.key()) for p in (choice.plan, *planner.uniform(4.2))}
    assert len(cells) == 2 and all(c.arrays["id"].tolist() == [i.id for i in ITEMS] for c in cells)
    monkeypatch.setattr("helpers.harness.compare.Quality.of", None)
    again = Planner(planner.sensitivity, planner.kl, GPTQ).choose(4.2)
    assert again == choice and choice.chosen in (choice.plan, choice.uniform)
