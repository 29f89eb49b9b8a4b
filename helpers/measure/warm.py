"""What a process of its own imported and ran before it measures (`memory.peaks`)."""

import torch
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaForCausalLM

import helpers.models.source  # noqa: F401  (imports most of what loading needs)
from helpers.measure.latency import greedy_tokens


def answered(device: str) -> None:
    """Let a model of almost no size answer, so that the code that this takes is in memory."""
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                         num_attention_heads=2)).eval().to(device)
    for _ in greedy_tokens(model, torch.zeros(1, 8, dtype=torch.long, device=device), 2):
        pass
