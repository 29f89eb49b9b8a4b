"""Bits under a budget: the optimum by trying everything, bytes as files have them, and plans as files."""

import json
import random
from itertools import product

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, FalconConfig, GPTNeoXConfig, LlamaConfig, OPTConfig, Phi3Config

from helpers.book import random_llama
from helpers.harness.allocate import (
    Allocation,
    BudgetError,
    Option,
    allocate,
    fused,
    options,
    pattern,
    read_plan,
    save_plan,
)
from helpers.harness.variants import Original
from helpers.measure.bytes import bits_a_weight, measured_bytes, predicted_bytes, weight_bytes, weights_inside
from helpers.methods.gptq import Gptq
from helpers.methods.keep import Keep
from helpers.methods.rtn import Rtn
from helpers.models.checkpoint import quantize_to
from helpers.models.formats import GPTQ
from helpers.models.layers import linears
from helpers.models.method import Plan, PlanError
from helpers.models.source import shell

METHODS = [Gptq(b) for b in (2, 3, 4, 8)]


@pytest.fixture(scope="module")
def base():
    """128 does not divide its MLP."""
    return Original(str(random_llama("allocate-for-tests", 128, 192, tied=False)))


def by_trying_all(table, budget, alike):
    """The least damage of all combinations; None if none fits."""
    choices = (dict(zip(table, choice, strict=True)) for choice in product(*table.values()))
    return min((sum(o.damage for o in c.values()) for c in choices if sum(o.bytes for o in c.values()) <= budget
                and all(len({c[n].method for n in unit}) == 1 for unit in alike)), default=None)


@pytest.mark.parametrize("alike", [(), (("l0", "l2"),), (("l0", "l1"), ("l2", "l3", "absent"))], ids=str)
def test_the_allocation_is_the_best_of_all(alike):
    """Sizes up to gigabytes, damages over up to nine powers of ten, budgets that a plan just fits or misses by a byte."""
    inside, counted = [tuple(n for n in unit if n != "absent") for unit in alike], 0
    for seed in range(200):
        draw = random.Random(seed)
        unit, spread, which = 10 ** draw.randint(0, 9), draw.choice([1, 5, 9]), METHODS[:draw.randint(2, 4)]
        table = {f"l{i}": [Option(m, unit * (draw.randrange(20) + 20 * j), 10 ** -(spread * draw.random() + j))
                           for j, m in enumerate(which)] for i in range(4)}
        plan = {n: draw.choice(which) for n in table}
        for first, *others in inside:
            plan |= dict.fromkeys(others, plan[first])
        budget = sum(o.bytes for n, found in table.items() for o in found if o.method == plan[n]) - draw.choice([0, 0, 1])
        best = by_trying_all(table, budget, inside)
        if best is None:
            with pytest.raises(BudgetError):
                allocate(table, budget, alike)
            continue
        found = allocate(table, budget, alike)
        taken = [next(o for o in table[n] if o.method == m) for n, m in found.methods.items()]
        assert list(found.methods) == list(table) and found.bytes == sum(o.bytes for o in taken) <= budget
        assert found.damage == pytest.approx(sum(o.damage for o in taken), rel=1e-12) == pytest.approx(best, rel=1e-9)
        assert all(len({found.methods[n] for n in unit}) == 1 for unit in inside)
        counted += 1
    assert counted > 140


def test_not_a_byte_more_than_the_budget():
    """Sizes that differ by a billionth, which the solver takes for equal."""
    for seed in range(40):
        draw = random.Random(seed)
        table = {f"l{i}": [Option(m, (i + j + 1) * 10**8 + draw.randrange(10), draw.random() / (j + 1))
                           for j, m in enumerate(METHODS)] for i in range(4)}
        budget = sum(draw.choice(found).bytes for found in table.values()) + draw.randrange(3)
        assert allocate(table, budget).bytes <= budget


def test_without_damage_or_choice():
    table = {"a": [Option(Gptq(), 10, 0.0), Option(Keep(), 20, 0.0)], "b": [Option(Keep(), 20, 0.0)]}
    assert allocate(table, 30).methods == {"a": Gptq(), "b": Keep()}
    assert allocate(table, 40).bytes in (30, 40)


@pytest.mark.parametrize("budget", [0, 29, 41, float("nan"), float("inf")])
def test_a_budget_that_cannot_be_kept_names_the_range(budget):
    table = {n: [Option(m, 5 * b, 1 / b) for m, b in ((Gptq(3), 3), (Gptq(4), 4))] for n in "ab"}
    assert allocate(table, 30).damage == pytest.approx(2 / 3) and allocate(table, 40).damage == pytest.approx(1 / 2)
    with pytest.raises(BudgetError, match="budget: expected 30 to 40 bytes, the smallest plan to the largest, got"):
        allocate(table, budget)


def test_bytes_are_those_of_the_file(base, tmp_path):
    """Of a mixed plan: predicted, and written."""
    methods = [Rtn(b, g) for b in (3, 4, 8) for g in (32, 64, 128)]
    draw, inside = random.Random(0), [(n, m.in_features) for n, m in linears(shell(base.folder))]
    damage = {(n, m): draw.random() / m.bits for n, width in inside for m in methods if width % m.group_size == 0}
    table = options(base, damage, GPTQ)
    assert {n: len(found) for n, found in table.items()} == {n: 10 if width == 128 else 7 for n, width in inside}
    for name, found in table.items():
        assert found[-1] == Option(Keep(), 2 * shell(base.folder).get_submodule(name).weight.numel(), 0.0)
        assert all(o.damage == damage[name, o.method] for o in found[:-1])
    weights, rest = weights_inside(base.config), predicted_bytes(base.config) - 2 * weights_inside(base.config)
    for bits, units in ((4.2, fused(base)), (5.5, ()), (9.0, fused(base))):
        found = allocate(table, int(bits * weights / 8), units)
        plan = found.plan(units)
        quantize_to(tmp_path / "out", base.folder, plan)
        assert measured_bytes(tmp_path / "out") - rest == found.bytes == predicted_bytes(base.config, plan, GPTQ) - rest
        assert bits - 0.5 < bits_a_weight(base.config, plan, GPTQ) == 8 * found.bytes / weights <= bits
        assert len(set(found.methods.values())) > 2 and {n: plan.at(n) for n in found.methods} == found.methods
        assert all(len({found.methods[n] for n in unit}) == 1 for unit in units)
    assert weight_bytes(GPTQ, 8, 16, Rtn(4, 8)) == 8 * 8 + 2 * 4 + 2 * 2 * 8 + 4 * 16  # codes, zero points, scales, g_idx


NAMES = [f"model.layers.{i}.{n}" for i in (1, 2, 11, 111) for n in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.up_proj2",
    "mlp.experts.1.up_proj", "mlp.experts.11.up_proj")]


def test_a_pattern_is_of_its_linears_alone():
    for unit in (NAMES[:1], NAMES[:3], NAMES[4:5], NAMES[6:7], NAMES[8:11]):
        assert [n for n in NAMES if Plan(Keep(), ((pattern(unit), Gptq()),)).at(n) == Gptq()] == unit
    found = Plan(Keep(), ((pattern(["a.b.c"]), Gptq()),))
    assert [found.at(n) for n in ("a.b.c", "a.b.cd", "x.a.b.c", "axb.c", "a.b.c.d")] == [Gptq(), *[Keep()] * 4]


@pytest.mark.parametrize("seed", range(5))
def test_the_plan_of_an_allocation_is_the_allocation(seed):
    draw = random.Random(seed)
    apart = {n: draw.choice(METHODS) for n in NAMES}
    units = [tuple(NAMES[8 * i:8 * i + 3]) for i in range(4)]
    alike = apart | {n: apart[unit[0]] for unit in units for n in unit}
    for methods, given in ((apart, ()), (alike, ()), (alike, units)):
        plan = Allocation(methods, 0, 0).plan(given)
        assert {n: plan.at(n) for n in NAMES} == methods
        assert Plan.parse(json.loads(json.dumps(plan.key()))) == plan
        assert max(list(methods.values()).count(m) for m in METHODS) == list(methods.values()).count(plan.default)
    assert len(plan.rules) < len(Allocation(alike, 0, 0).plan().rules)


def test_a_uniform_allocation_is_a_plain_plan():
    assert Allocation(dict.fromkeys(NAMES, Gptq(3)), 0, 0).plan([NAMES[:3]]) == Plan(Gptq(3))


SIZES = {"vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
MLP = SIZES | {"intermediate_size": 256, "num_key_value_heads": 2}
QKV, GATES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")


@pytest.mark.parametrize("config, expected", [
    (LlamaConfig(**MLP), [QKV, GATES]), (CohereConfig(**MLP), [QKV, GATES]),  # whose five read one input
    (OPTConfig(**SIZES, ffn_dim=256, word_embed_proj_dim=128), [QKV]), (Phi3Config(**MLP, pad_token_id=0), []),
    (GPTNeoXConfig(**SIZES, intermediate_size=256), []), (FalconConfig(**SIZES), [])],
    ids=lambda c: getattr(c, "model_type", ""))
def test_what_engines_fuse(config, expected, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).half()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text("{}")  # which a model's folder has
    found = fused(Original(str(tmp_path / "model")))
    names = [n for n, _ in linears(model)]
    blocks = list(dict.fromkeys(n[:n.index(".0.") + 3] if ".0." in n else n[:n.index(".1.") + 3] for n in names))
    assert found == [tuple(block + n for n in unit) for block in blocks for unit in expected]
    methods = dict.fromkeys(names, Rtn()) | {n: Rtn(2 + i) for i, unit in enumerate(found) for n in unit}
    plan = Allocation(methods, 0, 0).plan(found)
    assert {n: plan.at(n) for n in names} == methods


@pytest.fixture
def saved(base, tmp_path):
    """A plan, and its file."""
    plan = Plan(Gptq(3, 64), ((r"^model\.layers\.0\.mlp\.(gate_proj|up_proj)$", Gptq(8, 32, sym=False)), ("o_proj", Keep())))
    save_plan(tmp_path / "plan.json", plan, base, why="to see")
    return plan, tmp_path / "plan.json"


def test_a_plan_is_read_as_it_was_saved(saved, base):
    plan, path = saved
    assert read_plan(path, base.folder) == plan and json.loads(path.read_text())["why"] == "to see"


def test_a_plan_is_of_one_model(saved):
    with pytest.raises(PlanError, match=r"plan.json is a plan for .*, whose weights are others.* measure this model"):
        read_plan(saved[1], Original().folder)


def broken(change):
    def apply(text):
        record = json.loads(text)
        return json.dumps(change(record) or record)
    return apply


@pytest.mark.parametrize("damage", [
    lambda text: text[:-20], lambda text: "", lambda text: "[]", lambda text: '"plan"', lambda text: "3",
    broken(lambda r: r.pop("plan") and None), broken(lambda r: r.pop("weights") and None),
    broken(lambda r: r.update(plan=None)), broken(lambda r: r["plan"].pop("inputs") and None),
    broken(lambda r: r["plan"].update(inputs="none")), broken(lambda r: r["plan"].update(rules=[["o_proj"]])),
    broken(lambda r: r["plan"].update(rules=[["(", {"method": "fp16"}]])),
    broken(lambda r: r["plan"].update(rules=[[5, {"method": "fp16"}]])),
    *(broken(lambda r, change=change: r["plan"]["default"].update(change)) for change in (
        {"method": "qptq"}, {"bite": 3}, {"bits": 9}, {"bits": 3.0}, {"bits": "3"}, {"group_size": "64"}, {"sym": "yes"}))])
def test_a_file_that_is_no_plan_says_so(saved, base, damage):
    path = saved[1]
    path.write_text(damage(path.read_text()))
    with pytest.raises(PlanError, match="plan.json is no plan: .*python -m helpers.sensitivity` writes one"):
        read_plan(path, base.folder)


def test_a_file_that_is_not_there_says_so(base, tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(PlanError, match=f"{path} is no plan"):
            read_plan(path, base.folder)


def test_a_rule_for_a_linear_that_is_not_there(saved, base):
    path = saved[1]
    path.write_text(path.read_text().replace("o_proj", "q_porj"))
    with pytest.raises(PlanError, match=r"plan.json: rules: 'q_porj' matches no linear.*python -m helpers.sensitivity"):
        read_plan(path, base.folder)
