"""Any model: small random ones of many families, two thirds of which no table ever named, through every method."""

import copy

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma3TextConfig,
    Glm4MoeConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
    Starcoder2Config,
)

from helpers.measure.bytes import measured_bytes, predicted_bytes
from helpers.measure.sensitivity import Panel
from helpers.measure.tasks import Item
from helpers.methods.awq import Awq
from helpers.methods.awq_gptq import AwqGptq
from helpers.methods.gptq import Gptq
from helpers.methods.int8 import RowInt8
from helpers.methods.nf4 import Nf4
from helpers.models.branches import branch
from helpers.models.checkpoint import quantize_to
from helpers.models.layers import UnknownStructure, common_group, hooked, left_alone, linears, linears_apart
from helpers.models.method import Gram, Method
from helpers.models.outliers import add_outliers
from helpers.models.quantize import quantize_model, quantized
from helpers.models.reading import load_simulated
from helpers.models.source import Source
from helpers.models.walk import walk
from helpers.toolkits.artefacts import reload

SIZES = {"vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
MLP = SIZES | {"intermediate_size": 256, "num_key_value_heads": 2}
HEADS = MLP | {"head_dim": 32}
SHORT = {"vocab_size": 320, "hidden_size": 128, "n_layer": 2, "n_head": 4}
CONFIGS = {
    "llama": LlamaConfig(**HEADS, tie_word_embeddings=True), "many values": LlamaConfig(**HEADS | {"num_key_value_heads": 4}),
    "mistral": MistralConfig(**HEADS), "qwen2": Qwen2Config(**HEADS), "qwen3": Qwen3Config(**HEADS),
    "opt": OPTConfig(**SIZES, ffn_dim=256, word_embed_proj_dim=128),
    "gemma3": Gemma3TextConfig(**HEADS, sliding_window=16, query_pre_attn_scalar=32,
                               layer_types=["sliding_attention", "full_attention"]),
    "phi3": Phi3Config(**MLP, pad_token_id=0), "olmo2": Olmo2Config(**MLP), "cohere": CohereConfig(**MLP),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=256), "starcoder2": Starcoder2Config(**MLP),
    "stablelm": StableLmConfig(**MLP), "granite": GraniteConfig(**MLP), "bloom": BloomConfig(**SHORT),
    "falcon": FalconConfig(vocab_size=320, hidden_size=128, num_hidden_layers=2, num_attention_heads=4),
    "mixtral": MixtralConfig(**MLP, num_local_experts=2),
    "glm4_moe": Glm4MoeConfig(**MLP, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
                              first_k_dense_replace=0, pad_token_id=0),
}
TOKENS = [tuple(torch.randint(5, 320, (n,), generator=torch.Generator().manual_seed(n)).tolist()) for n in (40, 40, 40, 25, 64)]
IDS = torch.tensor([TOKENS[3]])
# what is folded in each family, by how the names end: (maker, a reader)
FOLDS = {
    "llama": {("input_layernorm", "q_proj"), ("post_attention_layernorm", "gate_proj"), ("up_proj", "down_proj")},
    "many values": {("input_layernorm", "q_proj"), ("v_proj", "o_proj"), ("post_attention_layernorm", "gate_proj"),
                    ("up_proj", "down_proj")},
    "opt": {("self_attn_layer_norm", "q_proj"), ("v_proj", "out_proj"), ("final_layer_norm", "fc1"), ("fc1", "fc2")},
    "gemma3": {("input_layernorm", "q_proj"), ("pre_feedforward_layernorm", "gate_proj"), ("up_proj", "down_proj")},
    "phi3": {("input_layernorm", "qkv_proj"), ("post_attention_layernorm", "gate_up_proj")},
    "olmo2": {("up_proj", "down_proj")}, "cohere": {("input_layernorm", "q_proj"), ("up_proj", "down_proj")},
    "mixtral": {("input_layernorm", "q_proj")},
    "falcon": {("input_layernorm", "query_key_value")},
}


@pytest.fixture(params=CONFIGS)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
        elif p.ndim == 1:
            p.data += 0.2 * torch.randn_like(p)
    return model.half().float()


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def test_groups_and_folds_are_found(family, model):
    layouts = [step.layout for step in walk(model, TOKENS)]
    assert layouts[0] == layouts[1]
    inside = {n.split(".", 3)[-1] if n.startswith("model.") else n for n, _ in linears(model)}
    assert len([n for g in layouts[0].groups for n in g]) == len(list(linears(model))) / 2, inside
    found = {(f.before.rsplit(".", 1)[-1], f.linears[0].rsplit(".", 1)[-1]) for f in layouts[0].folds}
    assert family not in FOLDS or found == FOLDS[family]
    assert {f.plus_one for f in layouts[0].folds if "norm" in f.before} <= {family == "gemma3"}
    if family == "cohere":  # attention and MLP in parallel: five linears share one input
        assert max(map(len, layouts[0].groups)) == 5


def test_the_walk_is_the_models_own_forward_pass(model):
    """Grams collected block by block, in batches, are those of plain forward passes; the last states give its logits."""
    seen = {name: [] for name, _ in linears(model)}
    handles = [m.register_forward_pre_hook(lambda _, args, n=n: seen[n].append(args[0].flatten(0, -2)))
               for n, m in linears(model)]
    expected = {}
    with torch.inference_mode():
        for sequence in TOKENS:
            expected[sequence] = model(torch.tensor([sequence])).logits[0]
    for handle in handles:
        handle.remove()
    for step in walk(model, TOKENS, at_once=80):
        for linear, gram in step.grams(Gram).items():
            X = torch.cat(seen[f"{step.name}.{linear}"])
            assert gram.tokens == len(X) == sum(map(len, TOKENS))
            assert torch.allclose(gram.H, X.T @ X, rtol=1e-3, atol=1e-3 * gram.H.abs().max())
    end = step.stream.through(step.block)
    for batch, rows in zip(end.batches, end.logits(Source(model)), strict=True):
        for ids, row in zip(batch.ids, rows, strict=True):
            assert torch.allclose(row, expected[tuple(ids.tolist())], rtol=1e-3, atol=1e-4)
        some = batch.logits(Source(model), batch.hidden.flatten(0, 1)[None, 3:40:5])  # of any positions
        assert torch.allclose(some[0], rows.flatten(0, 1)[3:40:5], rtol=1e-4, atol=1e-5)


def test_answers_do_not_need_all_of_the_last_block(family, model):
    """Modules that work on each position by itself leave out all but the answers; keys and values do not."""
    panel = Panel(model, [Item(t, len(t) - 4, id=str(n)) for n, t in enumerate(TOKENS)])
    mixing = ("k_proj", "v_proj", "qkv_proj", "query_key_value", "self_attn", "self_attention", "attention", "input_layernorm")
    assert panel.local and not [n for n in panel.local if n.endswith(mixing)]
    assert family != "llama" or set(panel.local) == {"self_attn.q_proj", "self_attn.o_proj", "mlp", "post_attention_layernorm"}
    seen = []
    with hooked([(panel.source.blocks[-1].get_submodule(panel.local[0]), lambda _, out: seen.append(out))], after=True):
        short = panel.score(panel.to_end(panel.entrance))
    assert len(seen) == len(panel.batches)
    for out, mask in zip(seen, panel.answers, strict=True):  # 4 tokens of each question
        assert 0 < (out != 0).any(-1).sum() <= mask.sum() == 4 * len(mask)
    whole = panel.score(panel.entrance.through(*panel.source.blocks))
    for what in ("answer_nll", "answer_kl"):
        assert np.allclose(short[what], whole[what], rtol=1e-4, atol=1e-4), what
    assert np.array_equal(short["exact"], whole["exact"])


def test_a_branch_needs_nothing_before_its_linear(model):
    """Each linear of each block changed alone, twice, what came before it put out again: the scores of whole passes."""
    panel, stream = Panel(model, [Item(t, len(t) - 4, id=str(n)) for n, t in enumerate(TOKENS[2:])]), None
    stream = panel.entrance
    for name, block in panel.source:
        after, known = panel.through(stream, block)
        for linear, outputs in known.items():
            change = {f"{name}.{linear}.weight": 0.9 * block.get_submodule(linear).weight}
            whole = panel.score(branch(panel.source, stream, change))
            for _ in range(2):
                short = panel.branches_off(stream, f"{name}.{linear}", outputs, change[f"{name}.{linear}.weight"])
                for what in ("answer_nll", "answer_kl"):
                    assert np.allclose(short[what], whole[what], rtol=1e-4, atol=1e-4), (linear, what)
        stream = after


@pytest.mark.parametrize("method", [Awq(8, 32, clip=False), AwqGptq(8, 32, sym=False)], ids=str)
def test_folded_scales_change_nothing_but_the_rounding(model, method):
    """At 8 bits the rounding is small: what is left shows that scales were folded where they belong."""
    before = logits(model)
    outcome = quantize_model(model, method, TOKENS)
    assert (logits(model) - before).norm() < 0.02 * before.norm() and outcome.noted("ratio")


def test_outlier_channels_change_no_output(model):
    loud = add_outliers(copy.deepcopy(model))
    assert torch.allclose(logits(loud), logits(model), rtol=1e-4, atol=1e-4)
    changed = sum(not torch.equal(a, b) for a, b in zip(loud.parameters(), model.parameters(), strict=True))
    assert changed > 0 or all(isinstance(model.get_submodule(f"{s.name}.{f.before}"), torch.nn.Linear)
                              for s in walk(model, TOKENS) for f in s.layout.folds)


# those that follow a toolkit write the same files (tests/test_quantize.py)
@pytest.mark.parametrize("name", sorted(n for n, m in Method.known.items() if m.inputs is None and m().formats()
                                        and not m.__module__.endswith("reference")))
def test_every_method_to_a_file_and_back(model, name, tmp_path):
    """From disk to disk, read back: to the last bit the model that was quantized in memory, and of the predicted size."""
    kind = Method.known[name]
    method = kind(group_size=32) if hasattr(kind, "group_size") else kind()
    model.half().save_pretrained(tmp_path / "source")
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    ours = quantized(source, method, TOKENS)
    outcome = quantize_to(tmp_path / "out", tmp_path / "source", method, TOKENS)
    read = load_simulated(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), read.parameters(), strict=True))
    assert outcome.left == [] and len(outcome.notes) <= len(list(linears(source)))
    assert (logits(ours) - logits(source)).norm() < 0.5 * logits(source).norm()
    assert measured_bytes(tmp_path / "out") == predicted_bytes(source.config, method)


@pytest.mark.parametrize("method", [Nf4(), RowInt8(), Awq(4, 32)], ids=str)
def test_linears_outside_of_the_blocks_stay_in_transformers(method, tmp_path):
    """As in OPT-350m, whose embeddings are narrower than its blocks."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OPTConfig(**SIZES, ffn_dim=256, word_embed_proj_dim=64)).half().eval()
    assert linears_apart(model) == ["model.decoder.project_out", "model.decoder.project_in"]
    model.save_pretrained(tmp_path / "source")
    quantize_to(tmp_path / "out", tmp_path / "source", method, TOKENS)
    theirs = logits(reload(tmp_path / "out")).float()
    ours = logits(load_simulated(tmp_path / "out"))
    assert (theirs - ours).norm() < 0.02 * ours.norm()


def test_what_is_no_linear_is_named():
    mixtral = AutoModelForCausalLM.from_config(CONFIGS["mixtral"])
    assert {n.rsplit(".", 1)[-1] for n in left_alone(mixtral)} == {"weight", "gate_up_proj", "down_proj"}
    assert left_alone(AutoModelForCausalLM.from_config(CONFIGS["llama"])) == []


def test_a_model_without_linears_says_what_was_looked_for():
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=320, n_embd=128, n_layer=2, n_head=4))
    with pytest.raises(UnknownStructure, match=r"transformer.h is 2 x GPT2Block without a single nn.Linear"):
        quantize_model(model, Gptq(), TOKENS)


def test_the_group_that_fits():
    widths = {(128, 256): 128, (192, 384): 64, (192, 352): 32, (96, 100): 32}
    for (hidden, inner), group in widths.items():
        config = LlamaConfig(**MLP | {"hidden_size": hidden, "intermediate_size": inner, "head_dim": 32})
        assert common_group(AutoModelForCausalLM.from_config(config)) == group
