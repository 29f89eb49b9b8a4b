"""Whole models: calibration, schemes, artefacts; on small random models of every architecture in the table."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from helpers.models.calibration import Gram, Walk
from helpers.models.checkpoints import PROVENANCE, BadCheckpoint, Writer, load_simulated, quantize_to, read_artefact
from helpers.models.layers import ARCHITECTURES, architecture, linears
from helpers.models.loading import BUNDLED, load
from helpers.models.quantize import quantize_many, quantize_model
from helpers.models.scheme import Scheme
from helpers.models.texts import calibration, windows
from helpers.quantizers.affine import fit_qparams, on_grid, output_error
from helpers.quantizers.awq import quantize_awq
from helpers.quantizers.gptq import gptq
from helpers.results import folder_hash

SIZES = {"vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
GATED = SIZES | {"intermediate_size": 256, "num_key_value_heads": 2, "head_dim": 32}
CONFIGS = {"llama": LlamaConfig(**GATED, tie_word_embeddings=True), "mistral": MistralConfig(**GATED),
           "qwen2": Qwen2Config(**GATED), "qwen3": Qwen3Config(**GATED),
           "opt": OPTConfig(**SIZES, ffn_dim=256, word_embed_proj_dim=128)}
TOKENS = [tuple(torch.randint(5, 320, (n,), generator=torch.Generator().manual_seed(n)).tolist()) for n in (40, 40, 40, 25, 64)]
IDS = torch.tensor([TOKENS[3]])


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
    return model


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def test_every_architecture_of_the_table_is_tested():
    assert set(CONFIGS) == set(ARCHITECTURES)


def test_grams_are_of_the_inputs_that_the_linears_see(model):
    """Collected block by block, batch by batch, they are those of the plain forward passes of the whole model."""
    seen = {name: [] for name, _ in linears(model)}
    handles = [m.register_forward_pre_hook(lambda _, args, n=n: seen[n].append(args[0].flatten(0, -2)))
               for n, m in linears(model)]
    with torch.inference_mode():
        for sequence in TOKENS:
            model(torch.tensor([sequence]))
    for handle in handles:
        handle.remove()
    walk = Walk(model)
    assert walk.begin(TOKENS, batch_tokens=80) == sum(map(len, TOKENS))
    groups = ARCHITECTURES[model.config.model_type].groups
    for name, block in walk.blocks():
        for linear, gram in walk.grams(block, groups).items():
            X = torch.cat(seen[f"{name}.{linear}"])
            assert gram.tokens == len(X)
            assert torch.allclose(gram.H, X.T @ X, rtol=1e-3, atol=1e-3 * gram.H.abs().max())
            assert torch.allclose(gram.x_mean(), X.abs().mean(0), rtol=1e-3, atol=1e-5)
        walk.advance(block)


@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
def test_folded_scales_change_nothing_but_the_rounding(model, method):
    """At 8 bits the rounding is small: what is left shows that scales were folded where they belong."""
    before = logits(model)
    outcome = quantize_model(model, Scheme(method, bits=8, sym=False, clip=False), TOKENS)
    assert (logits(model) - before).norm() < 0.02 * before.norm() and len(outcome.ratios) >= 2 * 3
    assert outcome.tokens == sum(map(len, TOKENS))


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "awq+gptq", "nf4"])
def test_artefacts_hold_the_quantized_model(model, method, tmp_path):
    """Streamed from disk to disk, in several shards, then read back: the weights of the model quantized in memory."""
    model.half().save_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    scheme = Scheme(method, sym=method != "awq+gptq", group_size=32)
    outcome = quantize_model(model, scheme, TOKENS)
    written = quantize_to(tmp_path / "out", tmp_path / "source", scheme, TOKENS, revision="abc")
    assert written.skipped == outcome.skipped == []
    assert written.error_db == pytest.approx(outcome.error_db, abs=0.1)
    again = load_simulated(tmp_path / "out")
    # scales are rounded to fp16 on the way; those of NF4 to 8 bits, in memory too
    assert (logits(again) - logits(model)).norm() < (1e-5 if method == "nf4" else 0.01) * logits(model).norm()
    record = json.loads((tmp_path / "out" / PROVENANCE).read_text())
    assert record["revision"] == "abc" and record["source_sha256"] == folder_hash(tmp_path / "source")
    assert record["tokens"] == (0 if method in ("rtn", "nf4") else sum(map(len, TOKENS)))


def test_overrides_and_what_no_group_fits(tiny, tmp_path):
    model = copy.deepcopy(tiny)  # its MLP is 192 wide: 128 does not divide the inputs of down_proj
    scheme = Scheme("rtn", overrides={r"q_proj$": {"bits": 8}, r"layers\.1\..*o_proj": None, "v_proj": {"group_size": 64}})
    outcome = quantize_model(model, scheme)
    assert outcome.skipped == [f"model.layers.{n}" for n in ("0.mlp.down_proj", "1.self_attn.o_proj", "1.mlp.down_proj")]
    assert all(torch.equal(model.get_submodule(n).weight, tiny.get_submodule(n).weight) for n in outcome.skipped)
    assert outcome.codes["model.layers.0.self_attn.q_proj"].grid.qmax == 255
    assert outcome.codes["model.layers.0.self_attn.v_proj"].grid.groups == 2
    copy.deepcopy(tiny).half().save_pretrained(tmp_path / "source")
    assert quantize_to(tmp_path / "out", tmp_path / "source", scheme).skipped == outcome.skipped
    linears_read, others = read_artefact(tmp_path / "out")
    assert f"{outcome.skipped[0]}.weight" in others and linears_read["model.layers.0.self_attn.q_proj"].grid.qmax == 255
    assert "lm_head.weight" not in others  # tied


@pytest.mark.parametrize("settings, said", [
    ({"method": "exl2"}, "method: expected one of"), ({"bits": 9}, "bits: expected 2 to 8"),
    ({"group_size": 0}, "group_size: expected"), ({"damp_percent": -1}, "damp_percent: expected"),
    ({"overrides": {"q_proj": {"bit": 8}}}, r"overrides: 'q_proj' sets \['bit'\]"),
    ({"overrides": {"q_proj": {"bits": 1}}}, "bits: expected 2 to 8")])
def test_bad_settings_say_so(settings, said):
    with pytest.raises(ValueError, match=said):
        Scheme(**settings)


def test_an_override_that_matches_nothing_is_no_silence(tiny):
    with pytest.raises(ValueError, match="'q_porj' matches no linear; there are model.layers.0"):
        quantize_model(copy.deepcopy(tiny), Scheme("rtn", overrides={"q_porj": None}))


def test_gptq_never_turns_into_rounding(bundled):
    """Every linear of the bundled model: on the same inputs its output error is below rounding's, and codes differ."""
    tokens = windows(calibration(bundled.tokenizer), 128, 16)
    walk = Walk(bundled.model)
    walk.begin(tokens)
    for _, block in walk.blocks():
        for name, gram in walk.grams(block, ARCHITECTURES["llama"].groups).items():
            W = block.get_submodule(name).weight.detach()
            assert gram.tokens == 2048 and gram.H.any()
            solved, rounded = gptq(W, gram.H).quantized, on_grid(W, fit_qparams(W, 4, 128))
            assert (solved.codes != rounded.codes).any()
            errors = [output_error(W - q.dequantize(), gram.H) for q in (solved, rounded)]
            assert errors[0] < 0.9 * errors[1], name
        walk.advance(block)


def test_many_schemes_from_one_calibration(bundled):
    """The same codes as each scheme alone, calibrated on the unquantized model; the model stays as it was."""
    tokens = [tuple(range(5, 105))] * 4
    before = copy.deepcopy(bundled.model.state_dict())
    schemes = [Scheme("awq", clip=False), Scheme("gptq", true_sequential=False), Scheme("rtn", 3)]
    many = quantize_many(bundled.model, schemes, tokens)
    assert all(torch.equal(v, before[k]) for k, v in bundled.model.state_dict().items())
    for scheme, outcome in zip(schemes, many, strict=True):
        alone = quantize_model(copy.deepcopy(bundled.model), scheme, tokens)
        first = [n for n in alone.codes if ".layers.0." in n]
        assert all(torch.equal(outcome.codes[n].codes, alone.codes[n].codes) for n in first)


def gptq_again(model, before, tokens, scheme):
    """The codes that GPTQ finds for the weights `before` on the Gram matrices of `model` as it is now."""
    codes, (_, groups, _) = {}, architecture(model)
    walk = Walk(model)
    walk.begin(tokens)
    for name, block in walk.blocks():
        grams = walk.grams(block, groups)
        for group in groups:
            W = [before[f"{name}.{n}.weight"] for n in group]
            found = gptq(torch.cat(W), grams[group[0]].H, scheme.bits, scheme.group_size, scheme.sym).quantized.codes
            codes |= {f"{name}.{n}": c for n, c in zip(group, found.split([len(w) for w in W]), strict=True)}
        walk.advance(block)
    return codes


def test_each_linear_is_calibrated_on_its_quantized_predecessors(tiny):
    """Its inputs in the finished model are those it was calibrated on; not so inside a block without true_sequential."""
    before = {n: p.detach().clone() for n, p in tiny.named_parameters()}
    for sequential in (True, False):
        model, scheme = copy.deepcopy(tiny), Scheme(bits=3, group_size=64, true_sequential=sequential)
        codes = quantize_model(model, scheme, TOKENS).codes
        again = gptq_again(model, before, TOKENS, scheme)
        same = {n for n in codes if torch.equal(codes[n].codes, again[n])}
        assert same == {n for n in codes if sequential or n.endswith(("q_proj", "k_proj", "v_proj"))}


def test_the_gram_matrix_of_scaled_inputs():
    torch.manual_seed(0)
    X, s = torch.randn(50, 8), torch.rand(8) + 0.5
    (gram := Gram.of(8)).add(X)
    (expected := Gram.of(8)).add(X / s)
    scaled = gram.scaled(s)
    assert torch.allclose(scaled.H, expected.H, rtol=1e-4, atol=1e-4) and torch.allclose(scaled.x_mean(), expected.x_mean())


def test_tokens_that_got_lost_are_noticed(tiny):
    class Deaf(Gram):
        def add(self, X):
            if X.shape[1] != 25:
                super().add(X)

    walk = Walk(tiny)
    walk.begin(TOKENS)
    _, block = next(walk.blocks())
    with pytest.raises(AssertionError, match="saw 184 tokens of 209"):
        walk.grams(block, architecture(tiny).groups, Deaf)


def test_the_halves_of_awq_can_be_switched_off(tiny):
    changed = {}
    for scale, clip in ((False, False), (True, False), (False, True)):
        model = copy.deepcopy(tiny)
        outcome = quantize_model(model, Scheme("awq", 3, group_size=64, scale=scale, clip=clip), TOKENS)
        assert bool(outcome.ratios) is scale
        block = model.model.layers[0]
        assert torch.equal(block.input_layernorm.weight, tiny.model.layers[0].input_layernorm.weight) is not scale
        changed[scale, clip] = {n for n, m in linears(tiny) if not torch.equal(
            quantize_awq(m.weight.detach(), 3, 64).codes, outcome.codes[n].codes)}
    assert not changed[False, False] and changed[True, False]
    clippable = {n for n, _ in linears(tiny) if not n.endswith(("q_proj", "k_proj"))}
    assert changed[False, True] == clippable


def test_bad_calibration(tiny):
    too_long = [tuple(range(300))]
    for tokens, said in (([], "at least one"), ([()], "may be empty"), (too_long, "300 tokens, the model's context is 256")):
        with pytest.raises(ValueError, match=said):
            quantize_model(copy.deepcopy(tiny), Scheme("gptq"), tokens)


def test_a_failure_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="calibration needs"):
        quantize_to(tmp_path / "out", BUNDLED, Scheme("gptq"))
    assert list(tmp_path.iterdir()) == []


def test_several_files_have_a_true_index(tmp_path):
    with Writer(tmp_path / "out", Scheme("rtn"), BUNDLED, shard_bytes=1_000_000) as writer:
        model = load().model
        outcome = quantize_model(model, Scheme("rtn"), done=writer.add)
        walk = Walk(model)
        writer.finish({n: model.get_parameter(n) for n in walk.outside}, outcome)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    files = {path.name: set(load_file(path)) for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(files) > 1 and {n: {t for t, where in index.items() if where == n} for n in files} == files


def test_the_first_override_that_matches_decides():
    scheme = Scheme(overrides={"q_proj$": {"bits": 8}, "proj": {"bits": 3}})
    assert (scheme.at("q_proj").bits, scheme.at("k_proj").bits, scheme.at("fc1").bits) == (8, 3, 4)


def test_a_scale_that_fp16_cannot_hold(tmp_path, tiny):
    model = copy.deepcopy(tiny)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.mul_(1e9)
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="fp16"):
        quantize_to(tmp_path / "out", tmp_path / "source", Scheme("rtn", group_size=64))
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_only_an_earlier_artefact_is_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    quantize_to(out, BUNDLED, Scheme("nf4"))  # an empty folder is nobody's
    before = read_artefact(out)[0]
    quantize_to(out, BUNDLED, Scheme("rtn"))
    assert read_artefact(out)[0].keys() == before.keys() and [p.name for p in tmp_path.iterdir()] == ["out"]
    (out / PROVENANCE).unlink()
    with pytest.raises(FileExistsError, match="choose another folder"):
        quantize_to(out, BUNDLED, Scheme("nf4"))
    assert read_artefact(out)[0].keys() == before.keys()


def test_bad_artefacts_say_so(tmp_path):
    with pytest.raises(BadCheckpoint, match=re.escape(str(tmp_path))):
        read_artefact(tmp_path)
    with pytest.raises(BadCheckpoint, match="quantization_config"):
        read_artefact(BUNDLED)
    out = tmp_path / "out"
    quantize_to(out, BUNDLED, Scheme("nf4"))
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(BadCheckpoint, match="not a whole quantized model"):
        read_artefact(out)
