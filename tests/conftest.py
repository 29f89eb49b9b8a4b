"""Shapes written in the types of helpers/quantizers are checked while the tests run."""

import os

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook("helpers.quantizers", "beartype.beartype")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from helpers.models.source import load  # noqa: E402


@pytest.fixture(autouse=True)
def as_found():
    """A test leaves threads and environment as they were: who starts workers of Dask has OMP_NUM_THREADS=1 afterwards, and a
    toolkit that is run then, in a process of its own, adds up in another order than this process."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    yield
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def bundled():
    """The model that ships in data/, and its tokenizer."""
    return load("bundled")


@pytest.fixture(scope="session")
def tiny():
    """A random Llama of another shape than the bundled one; its MLP width has no divisor 128."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=1280, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True)).eval()
