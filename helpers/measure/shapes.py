"""Shapes of public models, to plan with before anything is fetched.

From the config.json of meta-llama/Llama-2-7b-hf, -13b-hf and -70b-hf, and table 1 of Touvron et al. 2023 (arXiv 2307.09288).
"""

from transformers import LlamaConfig


def _llama_2(width: int, mlp: int, blocks: int, heads: int, kv_heads: int | None = None) -> LlamaConfig:
    return LlamaConfig(vocab_size=32000, hidden_size=width, intermediate_size=mlp, num_hidden_layers=blocks,
                       num_attention_heads=heads, num_key_value_heads=kv_heads or heads, max_position_embeddings=4096,
                       tie_word_embeddings=False)


SHAPES: dict[str, LlamaConfig] = {
    "7B": _llama_2(4096, 11008, 32, 32), "13B": _llama_2(5120, 13824, 40, 40), "70B": _llama_2(8192, 28672, 80, 64, 8)}
