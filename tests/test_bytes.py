import pytest
from transformers import LlamaConfig

from helpers.measure.bytes import measured_bytes, predicted_bytes
from helpers.methods.awq import Awq
from helpers.methods.gptq import Gptq
from helpers.methods.int8 import RowInt8
from helpers.methods.keep import Keep
from helpers.methods.nf4 import Nf4
from helpers.methods.rtn import Rtn
from helpers.models.checkpoint import quantize_to
from helpers.models.formats import AWQ, GPTQ_V2
from helpers.models.method import Plan, PlanError
from helpers.models.source import BUNDLED
from helpers.toolkits.artefacts import ARTEFACTS, COMMITTED, plan_of

LLAMA_2_70B = LlamaConfig(vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                          num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False)
LINEARS = 80 * (8192 * (2 * 8192 + 2 * 1024) + 3 * 8192 * 28672)  # weights inside the blocks
ROWS = 80 * (2 * 8192 + 2 * 1024 + 2 * 28672 + 8192)
REST = 2 * (2 * 32000 * 8192 + (2 * 80 + 1) * 8192)  # embeddings, head and norms in fp16
G_IDX = 80 * 4 * (6 * 8192 + 28672)  # seven linears: six read 8192 inputs, one reads 28672
BUNDLED_CONFIG = LlamaConfig.from_pretrained(BUNDLED)


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
