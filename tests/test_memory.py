"""What a process holds, measured in one of its own. The numbers of the bundled model carry some MB of libraries."""

import math
import os
import signal
import sys
import types
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.measure import memory
from helpers.measure.bytes import kv_bytes
from helpers.measure.memory import Died, alone, forget_most, held, most_held, peaks
from helpers.models.source import load

LINUX = held() == held()  # not NaN
MB = 1_000_000
BIG = LlamaConfig(vocab_size=4096, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
                  max_position_embeddings=1024, tie_word_embeddings=False)


def model_of(name: str, dtype: str):
    return load(name, None, dtype).model


def big(dtype: str = "float32"):
    return LlamaForCausalLM._from_config(BIG, dtype=getattr(torch, dtype)).eval()


def product(n: int) -> tuple[float, int]:
    return float((torch.ones(n, n) @ torch.ones(n, n)).sum()), os.getpid()


def end_by(what: int) -> None:
    os.kill(os.getpid(), what)


def end_with(status: int) -> None:
    os._exit(status)


def too_much() -> None:
    torch.empty(1 << 60)


def held_after(megabytes: int) -> list[float]:
    """What is held above the start: with an array, without it, at most, and at most once that was forgotten."""
    before = held()
    forget_most()
    array = torch.ones(megabytes * MB // 4)
    found = [held()]
    del array
    found += [held(), most_held()]
    forget_most()
    return [n - before for n in (*found, most_held())]


def test_work_is_done_elsewhere_and_torch_multiplies_there():
    (total, process), (_, another) = alone(product, 300), alone(product, 300)
    assert total == 300**3 and len({process, another, os.getpid()}) == 3


@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_process_is_an_error_with_the_signal(what):
    with pytest.raises(Died, match=f"end_by .*{what.name}"):
        alone(end_by, what)


def test_a_process_that_fails_says_why():
    with pytest.raises(Died, match="end_with .*exit 3"):
        alone(end_with, 3)
    with pytest.raises(Died, match=r"too_much .*(?s:.*)Error"):
        alone(too_much)
    here = types.ModuleType("of_a_notebook")
    exec("def work(): pass", vars(here))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Died, match=r"work .*(?s:.*)of_a_notebook"):
        patch.setitem(sys.modules, "of_a_notebook", here)
        here.work.__module__ = "of_a_notebook"
        alone(here.work)
    with pytest.raises(Died, match=r"model_of|_peaks.*(?s:.*)ModelUnavailable"):
        peaks(partial(model_of, "/nowhere", "float32"), 8, 1)


@pytest.mark.skipif(not LINUX, reason="the system does not say what is held")
def test_freed_memory_is_given_back_and_peaks_forgotten():
    whole, after, most, forgotten = alone(held_after, 200)
    assert 0.95 * 200 * MB < whole < 1.2 * 200 * MB and most > whole - MB  # Linux counts pages in batches
    assert after < 20 * MB and forgotten < 20 * MB


@pytest.mark.skipif(not LINUX, reason="the system does not say what is held")
@pytest.mark.parametrize("dtype, each", [("float32", 4), ("bfloat16", 2)])
def test_a_model_holds_its_parameters(dtype, each):
    parameters = sum(p.numel() for p in LlamaForCausalLM._from_config(BIG, dtype=torch.bfloat16).parameters())
    found = peaks(partial(big, dtype), prompt_tokens=512, new_tokens=8)
    ratio = found["loaded"] / (each * parameters)
    print(f"{parameters:,} parameters in {dtype}: {found['loaded']:,.0f} bytes, {ratio:.3f} of {each} each")
    # a little less where the system took pages of the libraries' files back meanwhile
    assert 0.95 < ratio < 1.25 and found["load_s"] > 0
    assert found["peak_load"] >= found["loaded"]
    prefill = found["peak_prefill"] - found["loaded"]
    predicted = kv_bytes(BIG, 512, bytes_each=each) + each * 512 * (2 * 768 + 3 * 2048)
    print(f"prefill of 512: {prefill:,.0f} bytes more, {prefill / predicted:.2f} of KV cache and activations")
    assert 0.7 < prefill / predicted < 3
    assert found["loaded"] <= found["peak_decode"] <= 1.1 * found["peak_prefill"]


@pytest.mark.skipif(not LINUX, reason="the system does not say what is held")
def test_the_bundled_model_from_its_file():
    found = peaks(partial(model_of, "bundled", "float32"), 128, 4)
    parameters = load().model.num_parameters()
    print(f"bundled: {found['loaded']:,.0f} bytes, {found['loaded'] / (4 * parameters):.2f} of 4 a parameter")
    assert 4 * parameters < found["loaded"] < 4 * parameters + 100 * MB
    assert found["loaded"] <= found["peak_load"] <= found["loaded"] + 50 * MB


def test_where_nothing_is_known_it_is_nan(monkeypatch):
    monkeypatch.setattr(memory, "held", lambda device="cpu": math.nan)
    monkeypatch.setattr(memory, "forget_most", lambda device="cpu": False)
    found = memory._peaks(partial(model_of, "bundled", "float32"), 8, 2, "cpu")
    assert found.pop("load_s") > 0 and all(math.isnan(n) for n in found.values()) and len(found) == 4
