"""The one loop: a held pass gives what separate ones give, a branch what a changed model gives, disk what memory gives."""

import copy
import json
from dataclasses import fields

import pytest
import torch
from torch import nn

from benchmarks.speed import again
from helpers.methods.awq import Awq
from helpers.methods.gptq import PLAIN, Gptq
from helpers.methods.int8 import RowInt8
from helpers.methods.keep import Keep
from helpers.methods.nf4 import Nf4
from helpers.methods.reference import AutoAwq, AutoGptq
from helpers.methods.rtn import Rtn
from helpers.models.branches import branches
from helpers.models.layers import UnknownStructure, linears
from helpers.models.method import Gram, Method, Plan, PlanError
from helpers.models.quantize import quantize_many, quantize_model
from helpers.models.source import BUNDLED, Source
from helpers.models.texts import calibration, windows
from helpers.models.walk import walk


@pytest.fixture(scope="module")
def tokens(bundled):
    return windows(calibration(bundled.tokenizer), 128, 8)


class Counted:
    """How many tokens go through each linear of a model; the probes of 8, from which layouts are found, left out."""

    def __init__(self, model: nn.Module):
        self.tokens = {n: 0 for n, _ in linears(model)}
        for name, m in linears(model):
            m.register_forward_hook(lambda _, args, out, name=name: self.add(name, args[0]))

    def add(self, name, x):
        self.tokens[name] += x.shape[:-1].numel() if x.shape[-2] != 8 else 0


def test_one_forward_pass_a_block(bundled, tokens):
    """Group by group, and every linear computes each token once."""
    model = copy.deepcopy(bundled.model)
    count = Counted(model)
    quantize_model(model, Gptq(), tokens)
    each = sum(map(len, tokens))
    assert set(count.tokens.values()) == {each}


def test_a_held_pass_gives_the_codes_of_a_pass_for_each_group(bundled, tokens):
    held = quantize_model(copy.deepcopy(bundled.model), Gptq(**PLAIN), tokens).codes
    other = again(BUNDLED, tokens)
    assert held.keys() == other.keys() and all(torch.equal(held[n].codes, other[n].codes) for n in held)


def test_a_walk_advances_by_itself(bundled, tokens):
    """The last step's inputs are those of the changed model, whatever the caller asked for in between."""
    model, plain = (copy.deepcopy(bundled.model) for _ in range(2))
    for step in walk(model, tokens):
        if step.stream.index == 1:
            step.block.mlp.down_proj.weight.data.mul_(2)
        last = step.stream
    plain.model.layers[1].mlp.down_proj.weight.data.mul_(2)
    seen = []
    plain.model.layers[3].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        plain(last.batches[0].ids)
    assert torch.allclose(last.batches[0].hidden, seen[0], atol=1e-5)


def test_a_branch_is_the_changed_model(bundled, tokens):
    """One linear changed at a time: the logits of the whole changed model, from part of its passes; the model stays itself."""
    model = copy.deepcopy(bundled.model)
    [outcome] = quantize_many(model, [Plan(Rtn(3), inputs="model")], tokens)
    names = [n for n, _ in linears(model) if n.endswith(("q_proj", "down_proj"))]
    changes = {n: {f"{n}.weight": outcome.codes[n].dequantize()} for n in names}
    found = {}
    count = Counted(model)
    for name, stream in branches(model, changes, tokens[:2]):
        found[name] = next(stream.logits(Source(model)))
    assert found.keys() == changes.keys()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), bundled.model.parameters(), strict=True))
    run = sum(count.tokens.values())
    ids = torch.tensor(tokens[:2])
    for name, logits in found.items():
        changed = copy.deepcopy(bundled.model)
        changed.get_submodule(name).weight.data = changes[name][f"{name}.weight"]
        with torch.inference_mode():
            assert torch.allclose(logits, changed(ids).logits, atol=1e-4)
    whole = 28 * ids.numel()
    trunk = 21 * ids.numel()  # nothing is needed of the unchanged model after its last block
    assert run == trunk + len(names) * whole * (4 + 1) / (2 * 4)  # (L + 1) / 2L of the naive loop


def test_from_disk_as_from_memory(bundled, tokens):
    for plan in (Gptq(), Awq(), Plan(Gptq(3), inputs="block"), Plan(Awq(), inputs="model")):
        disk = quantize_model(Source.from_folder(BUNDLED), plan, tokens).codes
        memory = quantize_model(copy.deepcopy(bundled.model), plan, tokens).codes
        assert disk.keys() == memory.keys() and all(torch.equal(disk[n].codes, memory[n].codes) for n in disk)


def test_many_plans_share_one_calibration_with_all_their_settings(bundled, tokens):
    plans = [Plan(m, r, "model") for m, r in ((Gptq(), ()), (Awq(), {"layers.1": Keep()}), (Nf4(), ()),
                                              (Gptq(3, desc_act=True), {"v_proj": Gptq(8)}))]
    many = quantize_many(bundled.model, plans, tokens)
    for plan, outcome in zip(plans, many, strict=True):
        alone = quantize_model(copy.deepcopy(bundled.model), plan, tokens)
        assert outcome.left == alone.left and outcome.notes.keys() == alone.notes.keys()
        assert all(torch.equal(outcome.codes[n].dequantize(), alone.codes[n].dequantize()) for n in alone.codes)
    with pytest.raises(PlanError, match="inputs='model'"):
        quantize_many(bundled.model, [Plan(Gptq())], tokens)
    with pytest.raises(PlanError, match="batch their calibration differently"):
        quantize_many(bundled.model, [Plan(Gptq(), inputs="model"), Plan(AutoGptq(), inputs="model")], tokens)


@pytest.mark.parametrize("plan, said", [
    (Plan(Awq(), {"q_proj": Gptq()}), "read one input, which awq scales for all.*give them one method, or none"),
    (Plan(Gptq(), {"q_proj": AutoGptq()}), "batch their calibration differently"),
    (Plan(Gptq(), {"q_porj": Keep()}), "'q_porj' matches no linear")])
def test_plans_that_do_not_go_together(bundled, tokens, plan, said):
    model = copy.deepcopy(bundled.model)
    with pytest.raises(PlanError, match=said):
        quantize_model(model, plan, tokens)


def test_plans_that_are_none():
    with pytest.raises(PlanError, match="say Gptq"):
        Plan("gptq")
    with pytest.raises(PlanError, match="is no regular expression"):
        Plan(Gptq(), {"(": Keep()})
    with pytest.raises(PlanError, match="inputs: expected group, block or model"):
        Plan(Gptq(), inputs="none")
    with pytest.raises(PlanError, match="inputs='model'"):
        Plan(AutoAwq())
    assert Plan.of(AutoAwq()).inputs == "model"


def test_a_key_says_all_of_a_method_or_plan():
    """Through JSON and back, for every method with all its settings, and for plans that mix them."""
    for kind in dict.fromkeys(Method.known.values()):
        names = {f.name for f in fields(kind)}
        others = {"bits": 3, "group_size": 64, "sym": False, "search": False, "block_size": 32, "clip": False}
        for method in (kind(), *(kind(**{n: v}) for n, v in others.items() if n in names)):
            again = Method.of(json.loads(json.dumps(method.key())))
            assert again == method and type(again) is kind and again.key() == method.key()
    for plan in (Plan(Gptq(3, damp_percent=0.05)),
                 Plan(Nf4(), {"q_proj|k_proj": Keep(), r"layers\.3\.": Rtn(8, 64, sym=False)}, "block"),
                 Plan(Awq(3, -1), (("a", Awq(8)), ("a", Keep()), ("b", RowInt8())), "model"), Plan(AutoAwq(), (), "model")):
        again = Plan.parse(json.loads(json.dumps(plan.key())))
        assert again == plan and again.key() == plan.key() and str(again) == str(plan)


@pytest.mark.parametrize("key, said", [
    (None, "method: None is none of .*awq.*rtn"), ("gptq", "method: None"), ({}, "method: None"),
    ({"method": "gtpq"}, "'gtpq' is none of"),
    ({"method": ["rtn"]}, r"\['rtn'\] is none of"), ({"method": "rtn", "bist": 3}, "rtn: .*bist"),
    ({"method": "rtn", "bits": 99}, "bits: expected 2 to 8"), ({"method": "rtn", "group_size": "all"}, "rtn: "),
    ({"method": "nf4", "block_size": 5}, "multiple of 8")])
def test_keys_of_no_method(key, said):
    with pytest.raises(PlanError, match=said):
        Method.of(key)
    with pytest.raises(PlanError, match="plan: expected default, rules and inputs: "):
        Plan.parse({"default": key, "rules": [], "inputs": "model"})


RTN = Rtn().key()


@pytest.mark.parametrize("key", [
    None, [], "rtn", {}, RTN, {"default": RTN, "rules": []}, {"default": RTN, "inputs": "model"},
    {"default": RTN, "rules": None, "inputs": "model"}, {"default": RTN, "rules": [["a"]], "inputs": "model"},
    {"default": RTN, "rules": [["(", RTN]], "inputs": "model"}, {"default": RTN, "rules": [[3, RTN]], "inputs": "model"},
    {"default": RTN, "rules": {"ab": RTN}, "inputs": "model"}, {"default": RTN, "rules": [], "inputs": "none"},
    {"default": AutoAwq().key(), "rules": [], "inputs": "group"}], ids=str)
def test_keys_of_no_plan(key):
    with pytest.raises(PlanError, match="plan: expected default, rules and inputs: "):
        Plan.parse(key)


def test_readers_in_16_bits_take_the_scale_along(bundled, tokens):
    """AWQ folds for the linears it has; one of them that stays is scaled with the rest, and computes what it did."""
    model = copy.deepcopy(bundled.model)
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    outcome = quantize_model(model, Plan(Awq(8, clip=False), {"q_proj": Keep()}), tokens)
    assert outcome.left == [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    assert not torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)
    with torch.inference_mode():
        ids = torch.tensor(tokens[:1])
        difference = (model(ids).logits - bundled.model(ids).logits).norm() / bundled.model(ids).logits.norm()
    assert difference < 0.02


def test_what_is_kept_counts_every_token(bundled, tokens):
    class Deaf(Gram):
        def add(self, X):
            super().add(X[:, 1:])

    step = next(walk(bundled.model, tokens))
    with pytest.raises(UnknownStructure, match=r"q_proj saw 1016"):
        next(step.held({step.layout.groups[0]: Deaf}))
    with pytest.raises(UnknownStructure, match=r"saw 1016 tokens of 1024"):
        step.grams(Deaf)
