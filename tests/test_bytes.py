import weakref
from inspect import signature

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    Qwen3Config,
)

from helpers.measure.bytes import (
    SHARD,
    bits_a_weight,
    fits,
    kv_bytes,
    measured_bytes,
    predicted_bytes,
    quantizing_bytes,
)
from helpers.measure.shapes import SHAPES
from helpers.methods.awq import Awq
from helpers.methods.awq_gptq import AwqGptq
from helpers.methods.gptq import Gptq
from helpers.methods.int8 import RowInt8
from helpers.methods.keep import Keep
from helpers.methods.nf4 import Nf4
from helpers.methods.reference import AutoAwq
from helpers.methods.rtn import Rtn
from helpers.models.checkpoint import Writer, quantize_to
from helpers.models.formats import AWQ, GPTQ_V2
from helpers.models.method import Plan, PlanError
from helpers.models.source import BUNDLED
from helpers.toolkits.artefacts import ARTEFACTS, COMMITTED, plan_of

LLAMA_2_70B = SHAPES["70B"]
LINEARS = 80 * (8192 * (2 * 8192 + 2 * 1024) + 3 * 8192 * 28672)  # weights inside the blocks
ROWS = 80 * (2 * 8192 + 2 * 1024 + 2 * 28672 + 8192)
REST = 2 * (2 * 32000 * 8192 + (2 * 80 + 1) * 8192)  # embeddings, head and norms in fp16
G_IDX = 80 * 4 * (6 * 8192 + 28672)  # seven linears: six read 8192 inputs, one reads 28672
BUNDLED_CONFIG = LlamaConfig.from_pretrained(BUNDLED)
FEW = {"vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256,
       "max_position_embeddings": 64}
SMALL = FEW | {"num_key_value_heads": 2}
LARGE = FEW | {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 3}
WIDE = {"llama": LlamaConfig(**LARGE, num_key_value_heads=2), "phi3": Phi3Config(**LARGE, pad_token_id=0),
        "opt": OPTConfig(**{k: v for k, v in LARGE.items() if k != "intermediate_size"}, ffn_dim=1536, word_embed_proj_dim=384)}


def test_llama_2_70b_by_hand():
    assert predicted_bytes(LLAMA_2_70B) == 2 * LINEARS + REST == 137_953_296_384
    awq = LINEARS // 2 + LINEARS // 128 * 2 + LINEARS // 128 // 2 + REST
    assert predicted_bytes(LLAMA_2_70B, Awq()) == awq == 36_613_668_864
    assert predicted_bytes(LLAMA_2_70B, Gptq()) == predicted_bytes(LLAMA_2_70B, Rtn()) == awq + G_IDX == 36_638_572_544
    maps = 80 * 7 * 4 * (16 + 256)
    assert predicted_bytes(LLAMA_2_70B, Nf4()) == 36_362_993_664 + maps
    assert predicted_bytes(LLAMA_2_70B, RowInt8()) == LINEARS + 4 * ROWS + REST
    three = 3 * LINEARS // 8 + LINEARS // 128 * 2 + 3 * (LINEARS // 128) // 8 + G_IDX + REST
    assert predicted_bytes(LLAMA_2_70B, Gptq(bits=3)) == three
    one_a_row = LINEARS // 2 + 2 * ROWS + ROWS // 2 + G_IDX + REST
    assert predicted_bytes(LLAMA_2_70B, Gptq(group_size=-1)) == one_a_row


@pytest.mark.parametrize("method", [Gptq, Awq])
def test_smaller_groups_cost_more(method):
    sizes = [predicted_bytes(LLAMA_2_70B, method(group_size=g)) for g in (32, 64, 128, -1)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4 and sizes[-1] > LINEARS // 2 + REST


def test_a_format_can_be_asked_for():
    assert predicted_bytes(LLAMA_2_70B, Awq(), GPTQ_V2) == predicted_bytes(LLAMA_2_70B, Awq()) + G_IDX
    with pytest.raises(PlanError, match="does not fit the awq format"):
        predicted_bytes(LLAMA_2_70B, Gptq(), AWQ)


def test_a_plan_is_the_sum_of_its_parts():
    fp16, four, eight = (predicted_bytes(LLAMA_2_70B, p) for p in (None, Gptq(), Gptq(8)))

    def only(pattern, method):
        """What a method saves in the linears of this name alone."""
        return predicted_bytes(LLAMA_2_70B, Plan(Keep(), {pattern: method})) - fp16

    parts = only("gate|up|[kvo]_proj", Gptq()) + only("down_proj", Gptq(8))
    plan = Plan(Gptq(), {"down_proj": Gptq(8), "q_proj": Keep()})
    assert predicted_bytes(LLAMA_2_70B, plan) == fp16 + parts
    assert only("gate|up|[qkvo]_proj", Gptq()) + only("down_proj", Gptq()) == four - fp16
    assert four < predicted_bytes(LLAMA_2_70B, plan) and only("down_proj", Gptq(8)) > eight - fp16
    q_proj = 80 * 8192 * 8192
    left = q_proj * 2 - (q_proj // 2 + q_proj // 128 * 2 + q_proj // 256 + 80 * 8192 * 4)
    assert predicted_bytes(LLAMA_2_70B, Plan(Gptq(), {"q_proj": Keep()})) == four + left
    assert predicted_bytes(LLAMA_2_70B, Keep()) == fp16


def test_a_method_without_a_file_has_no_size():
    with pytest.raises(PlanError, match="nf4.*has no file format"):
        predicted_bytes(LLAMA_2_70B, Nf4(block_size=128))


@pytest.mark.parametrize("name", [None, *(n for n in ARTEFACTS if n != "bitsandbytes-int8")])
def test_files_hold_the_predicted_bytes(name):
    """To the byte: nothing forgotten and nothing padded."""
    folder, plan = (COMMITTED / name, plan_of(name, BUNDLED_CONFIG)) if name else (BUNDLED, None)
    c = BUNDLED_CONFIG
    rows = c.num_hidden_layers * (3 * c.hidden_size + 2 * 128 + 2 * c.intermediate_size)
    biases = 2 * rows if name == "autogptq-gptq" else 0  # auto-gptq adds a bias of zeros to every linear
    assert measured_bytes(folder) == predicted_bytes(c, plan) + biases


@pytest.mark.parametrize("plan", [
    Rtn(3), Rtn(2, 32), Rtn(8, -1), Rtn(group_size=512), RowInt8(), Nf4(),
    Plan(Rtn(), {"q_proj": Rtn(8), "v_proj": Keep()}), Plan(RowInt8(), {"o_proj": Keep()})], ids=str)
def test_our_files_hold_the_predicted_bytes(plan, tmp_path):
    quantize_to(tmp_path / "out", BUNDLED, plan)
    assert measured_bytes(tmp_path / "out") == predicted_bytes(BUNDLED_CONFIG, plan)


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes(name):
    parameters = {"7B": 6_738_415_616, "13B": 13_015_864_320, "70B": 68_976_648_192}[name]
    assert predicted_bytes(SHAPES[name]) == 2 * parameters


def test_bits_a_weight_by_hand():
    assert bits_a_weight(LLAMA_2_70B, Awq()) == 4 + 16 / 128 + 4 / 128
    assert bits_a_weight(LLAMA_2_70B, Gptq()) == 4 + 20 / 128 + 8 * G_IDX / LINEARS
    assert bits_a_weight(LLAMA_2_70B, RowInt8()) == 8 + 32 * ROWS / LINEARS
    assert bits_a_weight(LLAMA_2_70B, Nf4()) == pytest.approx(4 + 8 / 64 + 32 / 16384, abs=1e-4)  # and the maps
    assert bits_a_weight(LLAMA_2_70B, Keep()) == 16
    down = 80 * 8192 * 28672 / LINEARS
    mixed = bits_a_weight(LLAMA_2_70B, Plan(Awq(), {"down_proj": Keep()}))
    assert mixed == pytest.approx(16 * down + 4.15625 * (1 - down))


def test_kv_cache_by_hand():
    assert kv_bytes(LLAMA_2_70B, 1) == 2 * 80 * 8 * 128 * 2 == 327_680
    assert kv_bytes(SHAPES["7B"], 1) == 2 * 32 * 4096 * 2 == 524_288
    assert kv_bytes(LLAMA_2_70B, 4096, batch=3, bytes_each=1) == 4096 * 3 * 327_680 // 2


@pytest.mark.parametrize("config, share", [
    (LlamaConfig(**SMALL), 1), (Qwen3Config(**SMALL, head_dim=48), 1), (GPTNeoXConfig(**FEW), 1),
    (Phi3Config(**SMALL, pad_token_id=0), 1),
    (Gemma3TextConfig(**SMALL, head_dim=32, sliding_window=8, layer_types=["sliding_attention", "full_attention"]), None),
    (DeepseekV3Config(**FEW, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
                      first_k_dense_replace=2, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, kv_lora_rank=16,
                      q_lora_rank=16), 1)], ids=lambda x: getattr(x, "model_type", ""))
def test_kv_cache_is_what_transformers_holds(config, share):
    """To the byte; where a window lets go of tokens (None), no more than said."""
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        cache = model(input_ids=torch.arange(2 * 24).view(2, 24) + 5, use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    predicted = kv_bytes(config, 24, batch=2, bytes_each=1)
    assert held == predicted if share else held < predicted


def test_fit_by_hand_and_at_the_byte():
    seven = SHAPES["7B"]
    fit = fits(seven, Gptq(), 12, context=4096)
    assert fit.fits and fit.weights == predicted_bytes(seven, Gptq()) and fit.kv == 4096 * 524_288
    assert fit.activations == 2048 * 2 * (2 * 4096 + 3 * 11008) + 6 * 32000
    assert fit.total == fit.weights + fit.kv + fit.activations and fit.limit == int(0.9 * 12 * 2**30)
    assert not fits(seven, None, 12, 4096).fits and fits(seven, None, 12, 4096).most_context == 0
    assert fits(seven, None, fit.total / 2**30, 1, reserve=0).limit == fit.total  # what is asked for next is exact
    for plan, batch in ((Gptq(), 1), (Nf4(), 4), (None, 1)):
        total = fits(seven, plan, 1, 3000, batch).total
        exact, less = (fits(seven, plan, n / 2**30, 3000, batch, reserve=0) for n in (total, total - 1))
        assert exact.fits and exact.most_context == 3000 and not less.fits and less.most_context == 2999
    assert "does not fit" in str(less) and "which fits" in str(exact) and "3,000 tokens" in str(exact)


def test_quantizing_7b_by_hand():
    """GPTQ, at the last linear of the last block: down_proj reads 11008 inputs."""
    d, ff, n = 4096, 11008, 128 * 2048
    block = 4 * d * d + 3 * d * ff
    assert quantizing_bytes(SHAPES["7B"], Gptq(), n) == {
        "block": 4 * (block + 2 * d), "its inputs": 4 * n * d, "held before a linear": 4 * n * (2 * d + ff),
        "Gram matrices": 4 * ff * ff, "codes of linears before": 4 * (block - d * ff),
        "damped, its factor, and a test of it": 15 * ff * ff, "weights at work": 4 * d * ff,
        "artefact so far": 31 * (block // 2 + block // 128 * 2 + block // 256 + 4 * (6 * d + ff) + 2 * 2 * d)}
    passes = [sum(quantizing_bytes(SHAPES["7B"], Plan(Gptq(), inputs=i), n).values()) for i in ("group", "block")]
    assert passes[0] > 1.9 * passes[1]
    data_free = [sum(quantizing_bytes(SHAPES["7B"], Rtn(), tokens).values()) for tokens in (0, n)]
    assert data_free[0] == data_free[1] < passes[1] / 2
    assert signature(Writer).parameters["shard_bytes"].default == SHARD
    with pytest.raises(PlanError, match="toolkits"):
        quantizing_bytes(SHAPES["7B"], AutoAwq(), n)


class Most(TorchDispatchMode):
    """The most bytes of tensors that were alive at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if not isinstance(t, torch.Tensor) or t.device.type != "cpu":
                continue
            if (storage := t.untyped_storage())._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata)
        self.most = max(self.most, self.now)
        return out

    def gone(self, which: int) -> None:
        self.now -= self.alive.pop(which)


HOLDS = {Gptq(): 0.85, Plan(Gptq(), inputs="block"): 0.85, Awq(): 0.85, AwqGptq(): 0.85, Rtn(): 0.85, Nf4(): 0.6,
         RowInt8(): 0.6}


@pytest.mark.parametrize("kind, plan", [*((k, p) for k in ("llama", "opt") for p in HOLDS), ("phi3", AwqGptq())], ids=str)
def test_quantizing_holds_the_predicted_bytes(kind, plan, tmp_path):
    """Counted tensor by tensor. For nf4 and int8, whose codes are smaller than a number, the prediction is a bound."""
    config = WIDE[kind]
    AutoModelForCausalLM.from_config(config).half().save_pretrained(tmp_path / "model")
    tokens = torch.randint(5, 300, (4, 64), generator=torch.Generator().manual_seed(0)).tolist()
    with Most() as count:
        quantize_to(tmp_path / "out", tmp_path / "model", plan, tokens)
    ratio = count.most / sum(quantizing_bytes(config, plan, 256).values())
    print(f"{kind}, {plan}: {count.most:,} bytes, {ratio:.3f} of the prediction")
    assert HOLDS[plan] < ratio < 1.15
