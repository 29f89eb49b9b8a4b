"""Whole models: calibration, plans, artefacts."""

import copy
import json
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.methods import SignRound, SignRoundToTheEnd
from helpers.files import PROVENANCE, folder_hash, put_in_place
from helpers.methods.awq import Awq, scale_folds
from helpers.methods.awq_gptq import AwqGptq
from helpers.methods.gptq import Gptq
from helpers.methods.gptq_signround import GptqSignRound
from helpers.methods.int8 import RowInt8
from helpers.methods.keep import Keep
from helpers.methods.nf4 import Nf4
from helpers.methods.reference import AutoAwq, AutoGptq
from helpers.methods.rtn import Rtn
from helpers.models.branches import branches
from helpers.models.checkpoint import Writer, format_for, quantize_to
from helpers.models.formats import AWQ, FORMATS, GPTQ, GPTQ_V2, INT8, NF4_FORMAT, STATE
from helpers.models.layers import UnknownStructure, linears
from helpers.models.method import Gram, Method, Outcome, Plan, PlanError
from helpers.models.quantize import quantize_block, quantize_many, quantize_model, quantized
from helpers.models.reading import BadCheckpoint, load_simulated, read_artefact
from helpers.models.source import BUNDLED, Source, load
from helpers.models.texts import calibration, windows
from helpers.models.walk import Stream, first_step, walk
from helpers.quantizers.affine import Quantized, fit_qparams, on_grid, output_error
from helpers.quantizers.awq import quantize_awq
from helpers.quantizers.gptq import gptq
from helpers.quantizers.signround import share_of_each

TOKENS = [tuple(torch.randint(5, 320, (n,), generator=torch.Generator().manual_seed(n)).tolist()) for n in (40, 40, 40, 25, 64)]
COUNT = sum(map(len, TOKENS))
IDS = torch.tensor([TOKENS[3]])
QKV = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(params=["tiny", "bundled"])
def model(request, tiny, bundled):
    """A copy of each model, in fp32 with values that fp16 has."""
    return copy.deepcopy({"tiny": tiny, "bundled": bundled.model}[request.param]).half().float()


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def same(one, other):
    """Whether two models have the same weights, to the bit."""
    others = other.state_dict()
    return one.state_dict().keys() == others.keys() and all(torch.equal(v, others[k]) for k, v in one.state_dict().items())


def save(model, folder):
    """The model in fp16."""
    copy.deepcopy(model).half().save_pretrained(folder)
    return folder


def inputs_seen(model):
    """{linear: its inputs} in plain forward passes of the whole model, a sequence at a time."""
    seen = {name: [] for name, _ in linears(model)}
    handles = [m.register_forward_pre_hook(lambda _, args, n=n: seen[n].append(args[0].flatten(0, -2)))
               for n, m in linears(model)]
    with torch.inference_mode():
        for sequence in TOKENS:
            model(torch.tensor([sequence]))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(xs) for name, xs in seen.items()}


@pytest.mark.parametrize("held", [False, True])
def test_grams_are_of_the_inputs_that_the_linears_see(model, held):
    """Collected block by block, batch by batch, in one pass or held at each group, they are those of the plain passes."""
    seen, reached = inputs_seen(model), set()
    for step in walk(model, TOKENS, at_once=80):
        assert step.stream.tokens == COUNT
        if held:
            grams = {n: gram for group, gram in step.held(dict.fromkeys(step.layout.groups, Gram)) for n in group}
            through = step.stream.through(step.block)
            assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(step.outputs.batches, through.batches, strict=True))
        else:
            grams = step.grams(Gram)
        for linear, gram in grams.items():
            X = seen[f"{step.name}.{linear}"]
            assert gram.tokens == len(X)
            assert torch.allclose(gram.H, X.T @ X, rtol=1e-3, atol=1e-3 * gram.H.abs().max())
            assert torch.allclose(gram.x_mean(), X.abs().mean(0), rtol=1e-3, atol=1e-5)
            reached.add(f"{step.name}.{linear}")
    assert reached == seen.keys()


def test_a_walk_ends_in_the_logits(model):
    """The stream after the last block, and that of a branch, which shares all before the block that it changes."""
    *_, last = walk(model, TOKENS[3:4])
    stream = last.stream.through(last.block)
    assert torch.allclose(next(stream.logits(Source(model))), logits(model), atol=1e-5)
    weight = f"{last.name}.mlp.up_proj.weight"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    changes = {"last": {weight: 0 * before[weight]}, "nothing": {"model.layers.0.mlp.up_proj.weight": before[
        "model.layers.0.mlp.up_proj.weight"]}}
    found = {name: next(s.logits(Source(model))) for name, s in branches(model, changes, TOKENS[3:4])}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.allclose(found["nothing"], logits(model), atol=1e-5)
    model.get_parameter(weight).data.zero_()
    assert torch.allclose(found["last"], logits(model), atol=1e-5)
    assert not torch.allclose(found["last"], found["nothing"], atol=1e-3)


@pytest.mark.parametrize("method", [Awq(8, 64, clip=False), AwqGptq(8, 64, sym=False)], ids=str)
def test_folded_scales_change_nothing_but_the_rounding(model, method):
    """At 8 bits the rounding is small: what is left shows that scales were folded where they belong."""
    before, norm = logits(model), model.model.layers[0].input_layernorm.weight.clone()
    rounding = (logits(quantized(model, Awq(8, 64, scale=False, clip=False), TOKENS)) - before).norm()
    outcome = quantize_model(model, method, TOKENS)
    assert (logits(model) - before).norm() < 1.1 * rounding < 0.03 * before.norm()
    assert not torch.equal(model.model.layers[0].input_layernorm.weight, norm)
    assert len(outcome.noted("ratio")) == 3 * len(model.model.layers)  # all inputs but that of o_proj
    assert outcome.tokens == COUNT


METHODS = [Rtn(group_size=32), Rtn(3, 64, sym=False), Rtn(8, -1), Gptq(group_size=32), Gptq(3, 64, desc_act=True, search=True),
           Awq(group_size=32), Awq(8, 64), AwqGptq(group_size=32, sym=False), GptqSignRound(3, 32, steps=15),
           Nf4(), RowInt8()]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_artefacts_hold_the_quantized_model(model, method, tmp_path):
    """Streamed from disk to disk, then read back: the weights of the model quantized in memory, to the bit."""
    source = save(model, tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    outcome = quantize_model(model, method, TOKENS)
    for form in method.formats():
        written = quantize_to(tmp_path / form.name, source, method, TOKENS, form, revision="abc")
        assert written.left == outcome.left == [] and written.notes == outcome.notes and not written.codes
        read, again = read_artefact(tmp_path / form.name), load_simulated(tmp_path / form.name)
        assert read.form is form and read.linears.keys() == {n for n, _ in linears(model)}
        assert same(again, model) and torch.equal(logits(again), logits(model))
        record = json.loads((tmp_path / form.name / PROVENANCE).read_text())
        assert record["revision"] == "abc" and record["source_sha256"] == folder_hash(source)
        assert record["plan"] == Plan.of(method).key() and record["format"] == form.name
        assert record["tokens"] == outcome.tokens == (COUNT if method.keeps else 0)
    assert len(outcome.noted("error_db")) == (len(outcome.codes) if method.calibrated else 0)
    assert all(-60 < db < -5 for db in outcome.noted("error_db").values())


def test_learned_roundings_come_nearer_to_the_block(bundled):
    """Than GPTQ, from which they begin, and whose scales they keep: a block's outputs on the text that they learn from, and on
    other text."""
    text = windows(calibration(bundled.tokenizer, "instructions"), 64, 48)
    errors, codes = [], []
    for method in (Gptq(3, 64), GptqSignRound(3, 64, steps=60)):
        model, outcome = copy.deepcopy(bundled.model), Outcome()
        step, other = first_step(model, text[:32]), first_step(model, text[32:])
        before = [s.stream.through(s.block).batches[0].hidden for s in (step, other)]
        quantize_block(step, Plan(method, inputs="block"), outcome)
        after = [s.stream.through(s.block).batches[0].hidden for s in (step, other)]
        errors.append([float(share_of_each(a, b)) for a, b in zip(after, before, strict=True)])
        codes.append(outcome.codes)
    (rounded, learned), (begun, ended) = errors, codes
    assert learned[0] < 0.8 * rounded[0] and learned[1] < 0.95 * rounded[1]
    for name, q in begun.items():
        assert torch.equal(ended[name].grid.scale, q.grid.scale)
        assert 0.005 < (ended[name].codes != q.codes).float().mean() < 0.3


def test_what_is_learned_is_kept_as_far_as_other_text_says(bundled):
    """Of the points on their way, those nearest on the first batch, of which nothing was learned; far too few steps, which are
    too large, end farther away than they began."""
    text, errors = windows(calibration(bundled.tokenizer, "instructions"), 64, 32), {}
    for method in (Gptq(4, 64), SignRound(4, 64, steps=4), SignRoundToTheEnd(4, 64, steps=4)):
        step = next(walk(copy.deepcopy(bundled.model), text, at_once=1024))
        wanted = step.stream.through(step.block).batches
        quantize_block(step, Plan(method, inputs="block"), Outcome())
        errors[method.name] = float(share_of_each(step.stream.through(step.block).batches[0].hidden, wanted[0].hidden))
        assert len(wanted) == 2
    begun, best, end = errors.values()
    assert best <= begun < end


def test_learned_roundings_aim_at_the_unquantized_model(tiny):
    """Not at the block on inputs that are off already."""
    aims, steps = [s.stream.through(s.block) for s in walk(copy.deepcopy(tiny), TOKENS, at_once=2048)], []
    quantize_model(copy.deepcopy(tiny), GptqSignRound(2, 32, steps=2), TOKENS, done=lambda step, _: steps.append(step))
    for step, aim in zip(steps, aims, strict=True):
        assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(step.aim.batches, aim.batches, strict=True))
    assert not torch.equal(steps[1].stream.batches[0].hidden, aims[0].batches[0].hidden)


def test_learned_roundings_in_a_mixed_plan(tiny):
    """Each method learns its own; what has no part in it stays."""
    plan = Plan(GptqSignRound(3, 32, steps=5), {"q_proj": GptqSignRound(8, 32, steps=5), "down_proj": Keep()}, "block")
    outcome = quantize_model(copy.deepcopy(tiny), plan, TOKENS)
    assert {q.bits for n, q in outcome.codes.items() if "q_proj" in n} == {8}
    assert all("down_proj" in n for n in outcome.left) and len(outcome.left) == 2
    with pytest.raises(PlanError, match="steps: expected 1 or more"):
        GptqSignRound(steps=0)


def test_every_method_and_every_format_is_tested_above():
    tested = {type(m) for m in METHODS} | {Keep, AutoGptq, AutoAwq}  # the latter in test_reference.py
    assert {m for m in Method.known.values() if m.__module__.startswith("helpers.")} == tested
    assert {f for m in METHODS for f in m.formats()} == set(FORMATS)


def test_what_is_kept_is_as_in_fp16(tiny):
    kept = quantized(tiny, Keep())
    assert same(kept, copy.deepcopy(tiny).half().float()) and not same(kept, tiny)


@pytest.mark.parametrize("plan, form", [
    (Rtn(), GPTQ), (Rtn(sym=False), AWQ), (Rtn(3, sym=False), GPTQ_V2), (Awq(), AWQ), (Awq(3), GPTQ_V2),
    (Nf4(), NF4_FORMAT), (RowInt8(), INT8), (AwqGptq(), AWQ), (Gptq(sym=False, desc_act=True), GPTQ_V2),
    (Plan(Gptq(), {"q_proj": Gptq(8)}), GPTQ), (Plan(Gptq(), {"q_proj": AwqGptq(sym=False)}), GPTQ_V2),
    (Plan(Awq(), {"down_proj": Awq(group_size=64)}), GPTQ_V2), (Plan(Awq(), {"down_proj": Keep()}), AWQ),
    (Plan(Keep(), {"down_proj": Nf4()}), NF4_FORMAT), (Plan(Awq(), {"down_proj": Gptq(sym=False)}), AWQ)], ids=str)
def test_the_first_format_that_holds_a_plan(plan, form):
    assert format_for(Plan.of(plan)) is form


@pytest.mark.parametrize("plan, form, said", [
    (Nf4(128), None, "has no file format"), (Keep(), None, "has no file format"),
    (Plan(Rtn(), {"q_proj": Nf4()}), None, "has no file format"),
    (Gptq(), AWQ, "does not fit the awq format, but gptq, gptq_v2"),
    (Plan(Awq(), {"down_proj": Awq(group_size=64)}), AWQ, "does not fit the awq format, but gptq_v2")], ids=str)
def test_plans_that_do_not_fit_a_file_say_so(plan, form, said, tmp_path):
    with pytest.raises(PlanError, match=said):
        quantize_to(tmp_path / "out", BUNDLED, plan, TOKENS, form)
    assert not list(tmp_path.iterdir())


def test_rules_and_what_no_group_fits(tiny, tmp_path):
    model = copy.deepcopy(tiny)  # its MLP is 192 wide: 128 does not divide the inputs of down_proj
    plan = Plan(Rtn(), {r"q_proj$": Rtn(8), r"layers\.1\..*o_proj": Keep(), "v_proj": Rtn(group_size=64)})
    outcome = quantize_model(model, plan)
    assert outcome.left == [f"model.layers.{n}" for n in ("0.mlp.down_proj", "1.self_attn.o_proj", "1.mlp.down_proj")]
    assert all(torch.equal(model.get_submodule(n).weight, tiny.get_submodule(n).weight.half()) for n in outcome.left)
    assert outcome.noted("left").keys() == {n for n in outcome.left if n.endswith("down_proj")}
    assert outcome.codes["model.layers.0.self_attn.q_proj"].grid.qmax == 255
    assert outcome.codes["model.layers.0.self_attn.v_proj"].grid.groups == 2
    source = save(tiny, tmp_path / "source")
    assert quantize_to(tmp_path / "out", source, plan).left == outcome.left
    read = read_artefact(tmp_path / "out")
    assert f"{outcome.left[0]}.weight" in read.others and read.linears["model.layers.0.self_attn.q_proj"].grid.qmax == 255
    assert "lm_head.weight" not in read.others  # tied
    assert same(load_simulated(tmp_path / "out"), quantized(AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32), plan))


@pytest.mark.parametrize("plan", [
    Plan(Nf4(), {"v_proj": Keep()}), Plan(RowInt8(), {"layers.0.mlp": Keep()}),
    Plan(Keep(), {"down_proj": Gptq(group_size=64)}), Plan(Awq(group_size=64), {"down_proj": Keep()}),
    Plan(Gptq(group_size=64), {"o_proj": Rtn(group_size=64)}, "block"),
    Plan(Awq(group_size=64), {"o_proj": Gptq(group_size=64, sym=False)}, "model"),
    Plan(Rtn(group_size=64), {"gate|up": Rtn(8, 64), r"1\.self_attn\.(q|k)": Keep(), "^model.*q_proj$": Rtn(8, 32)})], ids=str)
def test_plans_of_several_methods_are_written_and_read(plan, tiny, tmp_path):
    source = save(tiny, tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    outcome = quantize_model(model, plan, TOKENS)
    assert quantize_to(tmp_path / "out", source, plan, TOKENS).left == outcome.left
    assert outcome.codes.keys() == {n for n, _ in linears(model) if not plan.at(n).stays}
    assert same(load_simulated(tmp_path / "out"), model)


@pytest.mark.parametrize("make, said", [
    (lambda: Plan("exl2"), "a plan is made of methods, got 'exl2'"), (lambda: Rtn(9), "bits: expected 2 to 8"),
    (lambda: Rtn(group_size=0), "group_size: expected"), (lambda: Awq(1), "bits: expected 2 to 8"),
    (lambda: Gptq(damp_percent=-1), "damp_percent: expected"), (lambda: Nf4(20), "block_size: expected a multiple of 8"),
    (lambda: Plan(Rtn(), {"q_proj": {"bits": 8}}), r"made of methods, got \{'bits': 8\}"),
    (lambda: Plan(Rtn(), {"q_proj(": Keep()}), r"rules: 'q_proj\(' is no regular expression"),
    (lambda: Plan(Rtn(), inputs="linear"), "inputs: expected group, block or model, got 'linear'"),
    (lambda: Plan(AutoAwq()), "works on inputs of the model alone")])
def test_bad_settings_say_so(make, said):
    with pytest.raises(PlanError, match=said):
        make()


def test_a_rule_that_matches_nothing_is_no_silence(tiny):
    plans = [Plan(Rtn(), {"q_porj": Keep()}, inputs) for inputs in ("group", "model")]
    for work in (lambda: quantize_model(copy.deepcopy(tiny), plans[0]), lambda: quantize_many(tiny, plans[1:], ())):
        with pytest.raises(PlanError, match="'q_porj' matches no linear; there are model.layers.0"):
            work()


@pytest.mark.parametrize("plan, said", [
    (Plan(Awq(group_size=64), {"q_proj": Awq(8, 64)}),
     r"q_proj.*one input, which awq\(bits=8.*scales for all.*to awq\(group_size=64\)"),
    (Plan(Gptq(group_size=64), {"o_proj": AutoGptq(group_size=64)}), "batch their calibration differently")])
def test_methods_that_do_not_go_together(tiny, plan, said):
    with pytest.raises(PlanError, match=said):
        quantize_model(copy.deepcopy(tiny), plan, TOKENS)


def test_a_fold_may_reach_what_stays_in_16_bits(tiny):
    """Scales are folded into all that read an input: a reader that stays is scaled along, and the output with it unchanged."""
    model = copy.deepcopy(tiny)
    plan = Plan(Awq(8, 64, clip=False), {"q_proj": Keep()})
    outcome = quantize_model(model, plan, TOKENS)
    assert [n for n in outcome.left if "q_proj" in n] == outcome.left != []
    assert not torch.allclose(model.model.layers[0].self_attn.q_proj.weight, tiny.model.layers[0].self_attn.q_proj.weight)
    assert (logits(model) - logits(tiny)).norm() < 0.02 * logits(tiny).norm()


def test_gptq_never_turns_into_rounding(bundled):
    """Every linear of the bundled model: on the same inputs its output error is below rounding's, and codes differ."""
    tokens = windows(calibration(bundled.tokenizer), 128, 16)
    for step in walk(bundled.model, tokens):
        for name, gram in step.grams(Gram).items():
            W = step.block.get_submodule(name).weight.detach()
            assert gram.tokens == 2048 and gram.H.any()
            solved, rounded = gptq(W, gram.H).quantized, on_grid(W, fit_qparams(W, 4, 128))
            assert (solved.codes != rounded.codes).any()
            errors = [output_error(W - q.dequantize(), gram.H) for q in (solved, rounded)]
            assert errors[0] < 0.9 * errors[1], name


def test_many_plans_from_one_calibration(bundled):
    """The same codes and notes as each plan alone; the model stays as it was."""
    tokens = [tuple(range(5, 105))] * 4
    before = copy.deepcopy(bundled.model.state_dict())
    plans = [Plan(Awq(), inputs="model"), Plan(Gptq(), {"q_proj": Keep()}, "model"), Plan(Rtn(3), inputs="model")]
    many = quantize_many(bundled.model, plans, tokens)
    assert all(torch.equal(v, before[k]) for k, v in bundled.model.state_dict().items())
    for plan, outcome in zip(plans, many, strict=True):
        alone = quantize_model(copy.deepcopy(bundled.model), plan, tokens)
        assert outcome.left == alone.left and outcome.codes.keys() == alone.codes.keys()
        assert all(torch.equal(q.codes, alone.codes[n].codes) for n, q in outcome.codes.items())
        assert all(torch.equal(q.dequantize(), alone.codes[n].dequantize()) for n, q in outcome.codes.items())
        assert outcome.noted("ratio") == alone.noted("ratio") and outcome.noted("damp_percent") == alone.noted("damp_percent")


def test_plans_that_cannot_share_a_calibration(tiny):
    with pytest.raises(PlanError, match="gptq: many plans share the inputs of the unquantized model"):
        quantize_many(tiny, [Plan(Gptq())], TOKENS)
    with pytest.raises(PlanError, match="batch their calibration differently"):
        quantize_many(tiny, [Plan(Gptq(), inputs="model"), Plan(AutoAwq(), inputs="model")], TOKENS)


class Unrounded(Quantized):
    """Codes whose scales a file would not round."""

    def stored(self):
        return self


@dataclass(frozen=True)
class ExactGptq(Gptq):
    """GPTQ that leaves in the model the very weights that later linears were calibrated on."""

    name: ClassVar[str] = "exact gptq"
    stacks: ClassVar[bool] = False

    def solve(self, W, kept):
        found, notes = super().solve(W, kept)
        return Unrounded(found.codes, found.grid, found.g_idx), notes


def gptq_again(model, before, method):
    """The codes that GPTQ finds for the weights `before` on the Gram matrices of `model` as it is now."""
    return {f"{step.name}.{n}": gptq(before[f"{step.name}.{n}.weight"], gram.H, method.bits, method.group_size,
                                     search=method.search, act_group_aware=method.act_group_aware).quantized.codes
            for step in walk(model, TOKENS) for n, gram in step.grams(Gram).items()}


@pytest.mark.parametrize("inputs", ["group", "block", "model"])
def test_each_linear_is_calibrated_on_its_quantized_predecessors(tiny, inputs):
    """Its inputs in the finished model are those it was calibrated on; not so inside a block, or after the first, where
    the plan says otherwise."""
    model, method = copy.deepcopy(tiny).half().float(), ExactGptq(3, 64)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    codes = quantize_model(model, Plan(method, inputs=inputs), TOKENS).codes
    again = gptq_again(model, before, method)
    expected = {"group": lambda n: True, "block": lambda n: n.endswith(QKV), "model": lambda n: ".0." in n and n.endswith(QKV)}
    assert {n for n in codes if torch.equal(codes[n].codes, again[n])} == {n for n in codes if expected[inputs](n)}


def test_stacked_linears_get_the_codes_of_each_alone(tiny):
    alone, stacked = (quantize_model(copy.deepcopy(tiny), method, TOKENS).codes for method in (ExactGptq(3, 64), Gptq(3, 64)))
    assert list(alone) == list(stacked)
    assert sum(torch.equal(q.codes, stacked[n].codes) for n, q in alone.items()) == len(alone)


def test_the_gram_matrix_of_scaled_inputs():
    torch.manual_seed(0)
    X, s = torch.randn(50, 8), torch.rand(8) + 0.5
    (gram := Gram.of(8)).add(X)
    (expected := Gram.of(8)).add(X / s)
    scaled = gram.scaled(s)
    assert torch.allclose(scaled.H, expected.H, rtol=1e-4, atol=1e-4) and torch.allclose(scaled.x_mean(), expected.x_mean())


def test_grams_follow_the_scales(tiny):
    """After the folds, what is kept of the inputs is what the changed block sees: clipping and GPTQ go by it."""
    model = copy.deepcopy(tiny)
    step = first_step(model, TOKENS)
    before, kept = step.grams(Gram), step.grams(Gram)
    scale_folds(step, list(kept), step.layout.folds, kept, 3, 64)
    scaled = {n for fold in step.layout.folds for n in fold.linears}
    for name, gram in first_step(model, TOKENS).grams(Gram).items():
        assert torch.allclose(gram.H, kept[name].H, rtol=1e-3, atol=1e-4 * gram.H.abs().max())
        assert torch.allclose(gram.x_mean(), kept[name].x_mean(), rtol=1e-3)
        assert torch.allclose(gram.H, before[name].H, rtol=1e-2) is (name not in scaled)


def test_tokens_that_got_lost_are_noticed(tiny):
    class Deaf(Gram):
        def add(self, X):
            if X.shape[1] != 25:
                super().add(X)

    with pytest.raises(UnknownStructure, match="saw 184 tokens of 209"):
        first_step(tiny, TOKENS).grams(Deaf)


def test_equal_lengths_go_together(tiny):
    source = Source(tiny)
    shapes = [tuple(b.ids.shape) for b in Stream.start(source, TOKENS, at_once=80).batches]
    assert shapes == [(2, 40), (1, 40), (1, 25), (1, 64)]
    assert [tuple(b.ids.shape) for b in Stream.start(source, TOKENS, at_once=1).batches] == [(1, len(t)) for t in TOKENS]


def test_the_halves_of_awq_can_be_switched_off(tiny):
    changed = {}
    for scale, clip in ((False, False), (True, False), (False, True)):
        model = copy.deepcopy(tiny)
        outcome = quantize_model(model, Awq(3, 64, scale, clip), TOKENS)
        assert bool(outcome.noted("ratio")) is scale
        block = model.model.layers[0]
        assert torch.equal(block.input_layernorm.weight, tiny.model.layers[0].input_layernorm.weight) is not scale
        changed[scale, clip] = {n for n, m in linears(tiny) if not torch.equal(
            quantize_awq(m.weight.detach(), 3, 64).codes, outcome.codes[n].codes)}
    assert not changed[False, False] and changed[True, False]
    clippable = {n for n, _ in linears(tiny) if not n.endswith(("q_proj", "k_proj"))}
    assert changed[False, True] == clippable


@pytest.mark.parametrize("method", [Gptq(), Awq(), AutoGptq()], ids=str)
@pytest.mark.parametrize("tokens, said", [
    ([], "at least one"), ([()], "may be empty"), ([tuple(range(300))], "300 tokens, the model's context is 256")])
def test_bad_calibration(tiny, method, tokens, said):
    with pytest.raises(ValueError, match=said):
        quantize_model(copy.deepcopy(tiny), method, tokens)


@pytest.mark.parametrize("method, tokens, said", [
    (Gptq(), (), "needs calibration"), (Gptq(), [tuple(range(5, 2000))], "1995 tokens, the model's context is 1024")])
def test_a_failure_leaves_nothing_behind(method, tokens, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        quantize_to(tmp_path / "out", BUNDLED, method, tokens)
    assert list(tmp_path.iterdir()) == []


def test_several_files_have_a_true_index(tmp_path):
    plan, model = Plan(Rtn()), load().model
    with Writer(tmp_path / "out", plan, BUNDLED, GPTQ, shard_bytes=1_000_000) as writer:
        outcome = quantize_model(model, plan, done=writer.add)
        writer.finish({n: model.get_parameter(n) for n in Source(model).outside}, {}, outcome)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    files = {path.name: set(load_file(path)) for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(files) > 1 and {n: {t for t, where in index.items() if where == n} for n in files} == files
    assert same(load_simulated(tmp_path / "out"), model)


def test_the_first_rule_that_matches_decides():
    plan = Plan(Rtn(), {"q_proj$": Rtn(8), "proj": Rtn(3)})
    assert (plan.at("q_proj").bits, plan.at("k_proj").bits, plan.at("fc1").bits) == (8, 3, 4)


def test_settings_make_the_key_and_the_name():
    plans = [Gptq(), Gptq(3), Rtn(), Plan(Gptq(), inputs="block"), Plan(Gptq(), {"q": Keep()}), Plan(Gptq(), {"k": Keep()}),
             AutoGptq()]
    keys = [json.dumps(Plan.of(p).key()) for p in plans]
    assert len(set(keys)) == len(keys) and json.dumps(Plan(Gptq()).key()) == keys[0]
    assert str(Gptq()) == "gptq" and str(replace(Gptq(), bits=3, sym=False)) == "gptq(bits=3, sym=False)"


def test_a_scale_that_fp16_cannot_hold(tmp_path, tiny):
    model = copy.deepcopy(tiny)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.mul_(1e9)
    model.save_pretrained(tmp_path / "source")
    for method in (Rtn(group_size=64), Keep(), Plan(Rtn(group_size=64), {"o_proj": Keep()})):
        with pytest.raises(ValueError, match=r"layers.1.self_attn.o_proj.*fp16"):
            quantize_model(copy.deepcopy(model), method)
    with pytest.raises(ValueError, match=r"layers.1.self_attn.o_proj.*fp16"):
        quantize_to(tmp_path / "out", tmp_path / "source", Rtn(group_size=64))
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_only_an_earlier_artefact_is_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    quantize_to(out, BUNDLED, Nf4())  # an empty folder is nobody's
    before = read_artefact(out)
    quantize_to(out, BUNDLED, Rtn())
    after = read_artefact(out)
    assert after.linears.keys() == before.linears.keys() and (before.form, after.form) == (NF4_FORMAT, GPTQ)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (out / PROVENANCE).unlink()
    with pytest.raises(FileExistsError, match="choose another folder"):
        quantize_to(out, BUNDLED, Nf4())
    assert read_artefact(out).form is GPTQ


def test_what_is_no_artefact_says_so(tmp_path):
    with pytest.raises(BadCheckpoint, match=re.escape(str(tmp_path))):
        read_artefact(tmp_path)
    with pytest.raises(BadCheckpoint, match="quantization_config"):
        read_artefact(BUNDLED)


def test_artefacts_that_were_changed_say_so(tmp_path):
    out = tmp_path / "out"
    quantize_to(out, BUNDLED, Nf4())
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(BadCheckpoint, match="model.safetensors is not as it was written"):
        read_artefact(out)
    (out / PROVENANCE).write_text("{")
    with pytest.raises(BadCheckpoint, match=f"{PROVENANCE} cannot be read"):
        read_artefact(out)
    (out / PROVENANCE).unlink()
    with pytest.raises(BadCheckpoint, match="not a whole quantized model"):
        read_artefact(out)
    quantize_to(tmp_path / "other", BUNDLED, Nf4())
    (tmp_path / "other" / "model.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match="model.safetensors is missing"):
        read_artefact(tmp_path / "other")
    (tmp_path / "other" / PROVENANCE).unlink()
    (tmp_path / "other" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(BadCheckpoint, match=r"model.safetensors.index.json is no index of weights"):
        read_artefact(tmp_path / "other")


def test_one_of_two_that_put_a_folder_in_place_at_once_is_there_whole(tmp_path):
    """As the tests and the notebooks do with one cache."""
    def put(n):
        with tempfile.TemporaryDirectory(dir=tmp_path) as scratch:
            folder = Path(scratch) / "made"
            folder.mkdir()
            for name in "ab":
                (folder / name).write_text(str(n))
            put_in_place(folder, tmp_path / "out")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(400)))
    assert len({(tmp_path / "out" / name).read_text() for name in "ab"}) == 1


Q = "model.layers.0.self_attn.q_proj"


def without(end):
    return lambda t: t.pop(f"{Q}.{end}")


def put(end, change):
    """A change of one tensor of the first linear."""
    def work(t):
        t[f"{Q}.{end}"] = change(t[f"{Q}.{end}"].clone()).contiguous()

    return work


def first(value):
    def work(t):
        t.view(-1)[0] = value
        return t

    return work


@pytest.mark.parametrize("method, damage, said", [
    (Rtn(), without("scales"), rf"{Q}: has \['g_idx', 'qweight', 'qzeros'\]"),
    (Rtn(), put("scales", first(float("nan"))), f"{Q}: scales has values that are NaN"),
    (Rtn(sym=False), put("scales", first(-1.0)), f"{Q}: scales has values below zero"),
    (Rtn(), put("scales", lambda t: t.float()), f"{Q}: scales is torch.float32"),
    (Rtn(), put("qweight", lambda t: t[:-1]), rf"{Q}: qweight is torch.int32 \(31, 256\), expected torch.int32 \(32, 256\)"),
    (Rtn(), put("qzeros", first(0)), f"{Q}: qzeros has zero points other than 8, but the settings say sym"),
    (Rtn(), put("g_idx", first(2)), f"{Q}: g_idx has values outside of the 2 groups"),
    (Rtn(), put("g_idx", lambda t: t.flip(0)), f"{Q}: g_idx does not name neighbouring columns"),
    (Rtn(), lambda t: t.pop("model.norm.weight"), "has no tensor model.norm.weight"),
    (Rtn(), lambda t: t.update({"model.extra.weight": torch.ones(2)}), "model.extra.weight is no tensor of a LlamaForCausalLM"),
    (Rtn(), lambda t: t.update({"model.norm.weight": torch.ones(3).half()}), r"model.norm.weight is torch.float16 \(3,\)"),
    (Rtn(), lambda t: t["model.norm.weight"].fill_(torch.inf), "model.norm.weight has values that are NaN or infinite"),
    (Rtn(), lambda t: [t.pop(k) for k in list(t) if k.endswith(("qweight", "qzeros", "scales", "g_idx"))],
     "holds no quantized linear in the gptq format"),
    (Nf4(), put("weight.quant_map", first(0.5)), f"{Q}: weight.quant_map is not NF4's"),
    (Nf4(), put("weight.nested_absmax", first(torch.nan)), f"{Q}: weight.nested_absmax has values that are NaN"),
    (Nf4(), put(STATE, lambda t: t[:-5]), f"{Q}: .*nf4 cannot be read"),
    (RowInt8(), put("SCB", first(torch.inf)), f"{Q}: SCB has values that are NaN"),
    (RowInt8(), put("weight_format", lambda t: t + 1), f"{Q}: weight_format is not 0")])
def test_bad_tensors_are_named(method, damage, said, tmp_path):
    out = tmp_path / "out"
    quantize_to(out, BUNDLED, method)
    (out / PROVENANCE).unlink()
    tensors = load_file(out / "model.safetensors")
    damage(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadCheckpoint, match=said):
        read_artefact(out)


@pytest.mark.parametrize("settings", [
    {"bits": 3.5}, {"bits": 9}, {"group_size": None}, {"group_size": 100}, {"sym": "yes"}, {"quant_method": "exl2"},
    {"checkpoint_format": "marlin"}, {"bits": 8}, {"group_size": 64}, {"dynamic": "all"}, {"dynamic": {"+:(": {"bits": 4}}}],
    ids=str)
def test_bad_quantization_settings_say_so(settings, tmp_path):
    with pytest.raises(BadCheckpoint):
        read_artefact(with_settings(tmp_path / "out", settings))


def with_settings(out, settings):
    """An artefact of the bundled model with other settings than it was made with, and no hashes."""
    quantize_to(out, BUNDLED, Rtn())
    (out / PROVENANCE).unlink()
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= settings
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_settings_that_decide_nothing_are_no_matter(tmp_path):
    """GPTQModel's rules may name settings of its solver, which are nothing to a reader."""
    dynamic = {"+:.*q_proj.*": {"bits": 4, "damp_percent": 0.1, "mse": 2.4}, "-:lm_head": {}}
    out = with_settings(tmp_path / "out", {"dynamic": dynamic, "static_groups": False, "lm_head": False})
    assert len(read_artefact(out).linears) == 28
