"""Files of mixed plans in the engines: our reader, GPTQModel, transformers with bitsandbytes, vLLM."""

import random
import re

import pytest
import torch
from torch import nn

from helpers.harness.allocate import Allocation, pattern
from helpers.harness.portability import ENGINES, matrix
from helpers.harness.serve import available
from helpers.measure.tasks import questions
from helpers.methods.awq_gptq import AwqGptq
from helpers.methods.gptq import Gptq
from helpers.methods.keep import Keep
from helpers.methods.nf4 import Nf4
from helpers.methods.rtn import Rtn
from helpers.models.checkpoint import quantize_to
from helpers.models.formats import GPTQ, GPTQ_V2
from helpers.models.layers import linears
from helpers.models.method import Plan
from helpers.models.quantize import quantized
from helpers.models.reading import load_simulated, read_artefact
from helpers.models.source import BUNDLED, end_tokens, load, shell
from helpers.toolkits.answers import greedy_answer
from helpers.toolkits.artefacts import reload

WINDOWS = [tuple(range(5 + i, 105 + i)) for i in range(4)]
LAYERS = [f"model.layers.{n}" for n in range(4)]
QKV = [[f"{b}.self_attn.{n}_proj" for n in "qkv"] for b in LAYERS]
GATES = [[f"{b}.mlp.{n}_proj" for n in ("gate", "up")] for b in LAYERS]


def rules(*pairs):
    return tuple((pattern(unit), method) for unit, method in pairs)


def answered(engine, folder, asked):
    return matrix({"": folder}, {engine: ENGINES[engine]}, asked)[""][engine]


def test_gptqmodel_and_our_reader_have_the_codes_that_were_made(bundled, tmp_path):
    """3, 4 and 8 bits in groups of three sizes: read back they are the model quantized in memory, and so GPTQModel answers."""
    plan = Plan(Gptq(4, 64), rules((QKV[0], Gptq(8, 64)), (GATES[1], Gptq(3, 32)), (QKV[3], Keep()),
                                   ([f"{LAYERS[2]}.mlp.down_proj"], Gptq(8, 128)),
                                   ([f"{LAYERS[3]}.self_attn.o_proj"], Gptq(3, 128))))
    ours = quantized(load("bundled").model, plan, WINDOWS)
    quantize_to(tmp_path / "mixed", BUNDLED, plan, WINDOWS)
    read = read_artefact(tmp_path / "mixed")
    assert {n: q.bits for n, q in read.linears.items()} == {n: plan.at(n).bits for n, _ in linears(bundled.model)
                                                            if not plan.at(n).stays}
    simulated = load_simulated(tmp_path / "mixed").state_dict()
    assert all(torch.equal(w, simulated[name]) for name, w in ours.state_dict().items())
    cell = answered("GPTQModel", tmp_path / "mixed", questions(bundled.tokenizer, 8))
    assert (cell.loads, cell.right, cell.asked, cell.reason, cell.kernel) == (True, 8, 8, "", "TorchLinear")


def looked_up(settings, name):
    """As vLLM does it (get_dynamic_override and is_layer_gptq_quantized); None: in 16 bits."""
    for rule, said in settings.get("dynamic", {}).items():
        if re.match(rule[2:], name):
            return None if rule.startswith("-:") else settings | said
    return settings


@pytest.mark.parametrize("seed", range(8))
def test_engines_find_the_settings_of_what_they_fuse(seed):
    """By the names of the wholes as by those of the parts, in models with more than ten blocks."""
    draw, choices = random.Random(seed), [Rtn(4, 64), Rtn(4, 32), Rtn(8, 64), Keep()]
    units = [tuple(n.replace("layers.0.", f"layers.{b}.") for n in unit) for b in (0, 1, 11) for unit in (QKV[0], GATES[0])]
    singles = [(f"model.layers.{b}.{n}",) for b in (0, 1, 11) for n in ("self_attn.o_proj", "mlp.down_proj")]
    methods = {n: method for unit in units + singles for method in [draw.choice(choices)] for n in unit}
    names = list(methods)
    for plan in (Allocation(methods, 0, 0).plan(units), Allocation(methods, 0, 0).plan()):
        left = [n for n in names if methods[n].stays]
        settings = GPTQ.settings(plan, left, [n for n in names if n not in left])
        for unit in units + singles:
            module = unit[0].rpartition(".")[0]
            whole = {3: f"{module}.qkv_proj", 2: f"{module}.gate_up_proj", 1: unit[0]}[len(unit)]
            for name in (*unit, whole):
                found, method = looked_up(settings, name), methods[unit[0]]
                assert (found is None) == method.stays
                assert method.stays or (found["bits"], found["group_size"]) == (method.bits, method.group_size)


def test_rules_by_kind_need_no_more(tmp_path):
    """A pattern that is found in the whole's name as well has one rule; parts that differ have none of the whole."""
    names = [n for n, _ in linears(shell(BUNDLED))]
    for kind, extra in (("mlp", 0), ("(gate|up)_proj", 0), ("[qkv]_proj", 0), ("self_attn.(q|k|v)", 0), ("[.](q|k|v)_proj", 4),
                        ("k_proj", 0), ("q_proj", 0)):
        said = GPTQ.settings(Plan(Rtn(4), ((kind, Rtn(8)),)), [], names)["dynamic"]
        assert len(said) == 1 + extra and list(said)[-1] == f"+:.*(?:{kind}).*", kind
    assert "dynamic" not in GPTQ.settings(Plan(Rtn(4)), [], names)


def test_nf4_with_linears_left_in_16_bits(bundled, tmp_path):
    """transformers leaves them as they are, and answers as exact dequantization does."""
    kept = [*QKV[0], f"{LAYERS[3]}.mlp.down_proj"]
    quantize_to(tmp_path / "nf4", BUNDLED, Plan(Nf4(), rules((QKV[0], Keep()), (kept[3:], Keep()))))
    model, exact = reload(tmp_path / "nf4"), load_simulated(tmp_path / "nf4")
    for name, _ in linears(exact):
        module = model.get_submodule(name)
        assert (type(module) is nn.Linear) == (name in kept), name
        if name in kept:
            assert module.weight.is_floating_point() and module.weight.element_size() == 2
            assert torch.equal(module.weight.float(), bundled.model.get_submodule(name).weight)
    for prompt in questions(bundled.tokenizer, 8):
        said = [greedy_answer(m, prompt, 24, end_tokens(tmp_path / "nf4")) for m in (model, exact)]
        assert said[0] == said[1] and said[0]


@pytest.mark.skipif(available() is not None, reason=str(available()))
def test_vllm_serves_groups_and_16_bits_by_linear(bundled, tmp_path):
    """4 bits in groups of three sizes and 16 bits, what it fuses alike, AWQ's scales before the rest; its build for
    CPUs has no kernel for other widths."""
    plan = Plan(AwqGptq(4, 64, sym=True), rules(
        (QKV[0], Keep()), (QKV[1], Gptq(4, 32)), (GATES[1], Gptq(4, 128)), (GATES[2], Keep()),
        ([f"{LAYERS[2]}.mlp.down_proj"], Gptq(4, 32)), ([f"{LAYERS[3]}.self_attn.o_proj"], Keep())))
    outcome = quantize_to(tmp_path / "mixed", BUNDLED, plan, WINDOWS)
    assert outcome.noted("ratio")  # some linears were scaled
    served_right(tmp_path / "mixed", bundled.tokenizer)


def test_gptqmodel_reads_asymmetric_gptq_in_an_awq_file(bundled, tmp_path):
    quantize_to(tmp_path / "awq", BUNDLED, AwqGptq(4, 64), WINDOWS)
    cell = answered("GPTQModel", tmp_path / "awq", questions(bundled.tokenizer, 20))
    assert (cell.loads, cell.right, cell.asked, cell.reason) == (True, 20, 20, "") and cell.kernel.startswith("Awq")


@pytest.mark.skipif(available() is not None, reason=str(available()))
def test_vllm_serves_asymmetric_gptq_in_an_awq_file(bundled, tmp_path):
    """In a GPTQ file its build for CPUs refuses zero points; the codes are the same in both."""
    for name, form in (("gptq", GPTQ_V2), ("awq", None)):
        quantize_to(tmp_path / name, BUNDLED, AwqGptq(4, 64), WINDOWS, form)
    both = (load_simulated(tmp_path / name).parameters() for name in ("gptq", "awq"))
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
    served_right(tmp_path / "awq", bundled.tokenizer)


def served_right(folder, tokenizer):
    cell = answered("vLLM", folder, questions(tokenizer, 20))
    if not torch.cuda.is_available() and torch.backends.cpu.get_cpu_capability() != "AVX512":
        assert not cell.loads and "cpu_gemm_wna16" in cell.reason
        pytest.skip("no kernel for 4 bits on processors without AVX-512")
    assert (cell.loads, cell.right, cell.asked, cell.reason) == (True, 20, 20, "")
    assert torch.cuda.is_available() or cell.kernel == "CPUWNA16LinearKernel"
