"""What a process of its own imported and ran before it measures (`memory.peaks`)."""

import logging

import torch

for chatty in ("torchao", "torch.utils._pytree"):  # what they say while they are imported would be a chapter's output
    logging.getLogger(chatty).setLevel(logging.ERROR)

from transformers.models.llama.modeling_llama import LlamaConfig, LlamaForCausalLM  # noqa: E402

import helpers.models.source  # noqa: E402, F401  (imports most of what loading needs)
from helpers.measure.latency import greedy_tokens  # noqa: E402


def answered(device: str) -> None:
    """Let a model of almost no size answer, so that the code that this takes is in memory."""
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                         num_attention_heads=2)).eval().to(device)
    for _ in greedy_tokens(model, torch.zeros(1, 8, dtype=torch.long, device=device), 2):
        pass
