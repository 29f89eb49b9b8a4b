import math

import numpy as np
import pytest
import torch

from helpers.measure import quality
from helpers.measure.answers import generate
from helpers.measure.quality import Judge, Scores, compare, score
from helpers.measure.tasks import Item, encode, examples
from helpers.methods.rtn import Rtn
from helpers.models.quantize import quantized


@pytest.fixture(scope="module")
def items():
    g = torch.Generator().manual_seed(0)
    return [Item(tuple(torch.randint(5, 1280, (n,), generator=g).tolist()), start) for n, start in
            ((9, 1), (30, 20), (17, 5), (64, 60))]


def test_score_is_the_definition(tiny, items):
    """Each text alone, one token at a time, with the formulas written out."""
    other = quantized(tiny, Rtn(3, 64, sym=False))
    scores = score(other, items, tiny, batch_tokens=80)
    for n, item in enumerate(items):
        ids = torch.tensor([item.ids])
        p, q = (m(ids).logits[0, :-1].double().softmax(-1) for m in (tiny, other))
        nll = -q[range(len(item.ids) - 1), ids[0, 1:]].log()
        kl = (p * (p / q).log()).sum(-1)
        for sums, start in ((scores.all, 1), (scores.answer, item.start)):
            assert sums.nll[n] == pytest.approx(nll[start - 1:].sum().item(), rel=1e-4)
            assert sums.kl[n] == pytest.approx(kl[start - 1:].sum().item(), rel=1e-2, abs=1e-5)
            assert sums.tokens[n] == len(item.ids) - start
    assert scores.all.perplexity() == pytest.approx(math.exp(scores.all.nll.sum() / scores.all.tokens.sum()))


def test_a_model_against_itself(tiny, items):
    scores = score(tiny, items, tiny)
    assert scores.all.agreement() == 1 and np.abs(scores.all.kl).max() < 1e-5
    assert tuple(scores.all.delta_nll(scores.all)) == (0, 0, 0)


def test_refuses_nothing_other_texts_and_damage(tiny, items):
    with pytest.raises(ValueError, match="at least one text"):
        score(tiny, [])
    with pytest.raises(ValueError, match="same texts"):
        score(tiny, items[:2]).all.delta_nll(score(tiny, items[1:3]).all)
    broken = quantized(tiny, Rtn(4, 64, sym=False))
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        score(broken, items)
    with pytest.raises(ValueError, match="same id twice"):
        score(tiny, [Item((5, 6, 7), 1, id="a"), Item((5, 6, 8), 1, id="a")])


def equal(one, other):
    return all(np.allclose(a, other.arrays()[k], rtol=1e-4, atol=1e-5) if a.dtype.kind == "f" else
               np.array_equal(a, other.arrays()[k]) for k, a in one.arrays().items())


@pytest.mark.parametrize("piece", [5 * 1280, quality.PIECE])
@pytest.mark.parametrize("remembered", ["log-probabilities", "states", None])
def test_memory_is_bounded_and_changes_nothing(tiny, items, piece, remembered, monkeypatch):
    """Logits some positions at a time, and a reference of which the states are kept, or that is run again for each model: the
    same scores."""
    other = quantized(tiny, Rtn(3, 64, sym=False))
    whole = score(other, items, tiny)
    judge, calls = Judge(items, tiny, batch_tokens=64), []
    padded_tokens = sum(len(b) * max(len(items[i].ids) for i in b) for b in judge.batches)
    room = {"log-probabilities": padded_tokens * 1280, "states": padded_tokens * 128, None: padded_tokens * 128 - 1}
    monkeypatch.setattr(quality, "PIECE", piece)
    monkeypatch.setattr(quality, "REMEMBERED", room[remembered])
    handle = tiny.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    once, again = judge.score(other), judge.score(other)
    handle.remove()
    assert equal(once, whole) and equal(again, whole)
    assert judge.keeps == remembered and len(judge.batches) > 1
    assert len(calls) == len(judge.batches) * (1 if remembered else 2)
    forward = type(tiny.model).forward
    assert tiny.model.forward.__func__ is forward and other.model.forward.__func__ is forward


def test_a_judge_runs_the_reference_once(tiny, items):
    calls = []
    handle = tiny.register_forward_hook(lambda *_: calls.append(1))
    models = {f"{b} bits": quantized(tiny, Rtn(b, 64)) for b in (3, 4)}
    for m in models.values():
        m._forward_hooks.clear()
    judge = Judge(items, tiny)
    alone = {name: judge.score(m) for name, m in models.items()}
    assert len(calls) == len(judge.batches)
    handle.remove()
    together = compare(models | {"itself": tiny}, items, tiny)
    assert all(equal(together[name], alone[name]) for name in models) and not together["itself"].all.kl.any()


def test_scores_come_back_from_arrays(bundled):
    asked = examples("tune", ["facts", "json"], limit=3)
    scores = score(bundled.model, [encode(bundled.tokenizer, e) for e in asked])
    again = Scores.of(scores.arrays())
    assert scores.ids.tolist() == [e.id for e in asked]
    assert all(np.array_equal(a, again.arrays()[k]) for k, a in scores.arrays().items())
    chosen = again.select("json")
    assert chosen.ids.tolist() == [e.id for e in asked[3:]] and np.array_equal(chosen.answer.nll, scores.answer.nll[3:])


def test_exact_agrees_with_greedy_decoding(bundled):
    asked = examples("tune", limit=12)
    scores = score(bundled.model, [encode(bundled.tokenizer, e) for e in asked])
    said = generate(bundled.model, bundled.tokenizer, asked)
    assert [s == e.answer for s, e in zip(said, asked, strict=True)] == scores.exact.tolist()
