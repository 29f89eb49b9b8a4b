import copy
import re
import time

import numpy as np
import pytest
import torch

from helpers.measure.answers import greedy
from helpers.measure.latency import (
    beside,
    generate_timed,
    greedy_tokens,
    interleaved,
    kernels,
    throughput,
    tokens_per_second,
)
from helpers.measure.memory import alone
from helpers.toolkits.artefacts import COMMITTED, reload


def test_beside_sets_sides_against_ours():
    side = {"least": 1.0, "median": 2.0, "most": 4.0, "runs": 3}
    table = beside({"work": {"ours": side, "theirs": {"least": 8.0, "median": 20.0, "most": 30.0, "runs": 3}, "note": 0.5}})
    assert list(table.index) == [("work", "theirs")]
    row = table.loc[("work", "theirs")]
    assert row["theirs / ours"] == "10" and row["range"] == "2 to 30" and row["ours (s)"] == "2"


def test_a_single_run_has_no_range():
    once = {"least": 1.0, "median": 1.0, "most": 1.0, "runs": 1}
    assert beside({"work": {"ours": once, "theirs": once}}).loc[("work", "theirs"), "range"] == "one run"


def test_generation_has_a_speed(tiny):
    median, fastest = tokens_per_second(tiny, new_tokens=4, repeats=2)
    assert 0 < median <= fastest


def slow(model, milliseconds, calls=None, name=""):
    """A copy that takes so many ms more for each forward pass, and one for each token that comes in."""
    model = copy.deepcopy(model)

    def wait(_, args, kwargs):
        if calls is not None and kwargs["past_key_values"] is None:
            calls.append((name, tuple(kwargs["input_ids"][0].tolist())))
        time.sleep((milliseconds + kwargs["input_ids"].shape[1]) / 1000)

    model.register_forward_pre_hook(wait, with_kwargs=True)
    return model


def test_tokens_are_those_of_generate(tiny):
    ids = torch.arange(5, 29).view(2, 12)
    ours = torch.cat(list(greedy_tokens(tiny, ids, 6)), 1)
    theirs = tiny.generate(input_ids=ids, attention_mask=torch.ones_like(ids),
                           generation_config=greedy(6, min_new_tokens=6, pad_token_id=0, eos_token_id=None))
    assert torch.equal(ours, theirs[:, 12:])


@pytest.mark.flaky(reruns=2)  # a busy machine lengthens times
def test_times_of_a_known_wait(tiny):
    there = generate_timed(slow(tiny, 20), torch.arange(5, 45)[None], 5)
    assert there.shape == (5,) and there[0] >= 0.06 and (np.diff(there) >= 0.021).all()
    itl = [np.median(np.diff(generate_timed(slow(tiny, ms), torch.arange(5, 45)[None], 7))) for ms in (20, 80)]
    assert 0.03 < itl[1] - itl[0] < 0.2  # 60 ms, whatever the model takes


def test_rounds_pair_the_models_in_an_order_drawn_anew(tiny):
    calls = []
    models = {name: slow(tiny, ms, calls, name) for name, ms in (("a", 0), ("b", 4), ("c", 8))}
    prompts = [list(range(5, 5 + n)) for n in (8, 64, 16, 40)]
    found = interleaved(models, prompts, 4, warm_up=2)
    rounds = [calls[i:i + 3] for i in range(0, len(calls), 3)]
    assert [r[0][1] for r in rounds] == [tuple(p) for p in (*prompts[:2], *prompts)]  # warm-up, then each prompt
    assert all({name for name, _ in r} == set("abc") and len({p for _, p in r}) == 1 for r in rounds)
    assert len({tuple(name for name, _ in r) for r in rounds}) > 1
    for name, ms in (("a", 0), ("b", 4), ("c", 8)):
        times = found[name]
        assert times["ttft_ms"].shape == times["e2el_ms"].shape == (4,) and times["itl_ms"].shape == (4, 3)
        assert (times["ttft_ms"] >= [ms + n for n in (8, 64, 16, 40)]).all() and (times["itl_ms"] >= ms + 1).all()
        assert np.allclose(times["ttft_ms"] + times["itl_ms"].sum(1), times["e2el_ms"])
    before, calls[:] = [name for name, _ in calls], []
    interleaved(models, prompts, 2, warm_up=2)
    assert [name for name, _ in calls] == before  # the seed decides


@pytest.mark.parametrize("prompts", [[], [[5, 6], []]])
def test_prompts_are_checked(tiny, prompts):
    with pytest.raises(ValueError, match="prompts"):
        interleaved({"a": tiny}, prompts, 2)


@pytest.mark.flaky(reruns=2)  # a busy machine lengthens times
def test_throughput_counts_all_sequences_and_not_the_prefill(tiny):
    model = slow(tiny, 20)
    found = throughput(model, [1, 4], [8, 100], 5, repeats=1)
    assert set(found) == {(1, 8), (1, 100), (4, 8), (4, 100)}
    assert all(batch / 0.2 < speed < batch / 0.02 for (batch, _), speed in found.items())
    with pytest.raises(ValueError, match="new_tokens"):
        throughput(tiny, [1], [8], 1)


def test_kernels_have_names(tiny):
    assert kernels(tiny) == {"Linear, float32": 14}  # the head is no part of it
    half = copy.deepcopy(tiny).half()
    half.model.layers[0].mlp.down_proj.float()
    assert kernels(half) == {"Linear, float16": 13, "Linear, float32": 1}


def kernels_of(name):
    return kernels(reload(COMMITTED / name))


@pytest.mark.parametrize("name, kernel", [("bitsandbytes-nf4", "Linear4bit"), ("gptqmodel-gptq", "Torch.*Linear"),
                                          ("autoawq-awq", "Torch.*Linear|Awq.*Linear")])
def test_kernels_of_toolkits(name, kernel):
    [(found, count)] = alone(kernels_of, name).items()
    print(name, found)
    assert re.fullmatch(kernel, found) and count % 7 == 0
