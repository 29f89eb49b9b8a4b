import pytest
from transformers import LlamaConfig

from helpers.measure.memory import measured_bytes, predicted_bytes
from helpers.models.loading import BUNDLED
from helpers.toolkits.artefacts import COMMITTED

LLAMA_2_70B = LlamaConfig(vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                          num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False)
LINEARS = 80 * (8192 * (2 * 8192 + 2 * 1024) + 3 * 8192 * 28672)  # weights inside the blocks
REST = 2 * (2 * 32000 * 8192 + (2 * 80 + 1) * 8192)  # embeddings, head and norms in fp16


def test_llama_2_70b_by_hand():
    assert predicted_bytes(LLAMA_2_70B, "fp16") == 2 * LINEARS + REST == 137_953_296_384
    awq = LINEARS // 2 + LINEARS // 128 * 2 + LINEARS // 128 // 2 + REST
    assert predicted_bytes(LLAMA_2_70B, "awq") == awq == 36_613_668_864
    g_idx = 80 * 4 * (6 * 8192 + 28672)  # seven linears: six read 8192 inputs, one reads 28672
    assert predicted_bytes(LLAMA_2_70B, "gptq") == awq + g_idx == 36_638_572_544
    maps = 80 * 7 * 4 * (16 + 256)
    assert predicted_bytes(LLAMA_2_70B, "nf4") == 36_362_993_664 + maps


def test_smaller_groups_cost_more():
    sizes = [predicted_bytes(LLAMA_2_70B, "gptq", g) for g in (32, 64, 128)]
    assert sizes[0] > sizes[1] > sizes[2]


def test_unknown_method():
    with pytest.raises(ValueError, match="got 'exl2'"):
        predicted_bytes(LLAMA_2_70B, "exl2")


@pytest.mark.parametrize("name", [None, "bitsandbytes-nf4", "gptqmodel-gptq", "gptqmodel-awq", "autogptq-gptq", "autoawq-awq"])
def test_files_hold_the_predicted_bytes(name):
    """To the byte: nothing forgotten and nothing padded."""
    folder, method = (COMMITTED / name, name.split("-")[1]) if name else (BUNDLED, "fp16")
    config = LlamaConfig.from_pretrained(BUNDLED)
    rows = config.num_hidden_layers * (3 * config.hidden_size + 2 * 128 + 2 * config.intermediate_size)
    biases = 2 * rows if name == "autogptq-gptq" else 0  # auto-gptq adds a bias of zeros to every linear
    assert measured_bytes(folder) == predicted_bytes(config, method) + biases
