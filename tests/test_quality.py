import math

import numpy as np
import pytest
import torch

from helpers.measure.quality import generate, is_correct, parses, score
from helpers.models.quantize import rtn
from helpers.models.texts import Example, Item, encode, examples


@pytest.fixture(scope="module")
def items():
    g = torch.Generator().manual_seed(0)
    return [Item(tuple(torch.randint(5, 1280, (n,), generator=g).tolist()), start) for n, start in
            ((9, 1), (30, 20), (17, 5), (64, 60))]


def test_score_is_the_definition(tiny, items):
    """Each text alone, one token at a time, with the formulas written out."""
    other = rtn(tiny, 3, 64)[0]
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
    broken = rtn(tiny, 4, 64)[0]
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        score(broken, items)


def test_exact_agrees_with_greedy_decoding(bundled):
    asked = examples("tune", limit=12)
    scores = score(bundled.model, [encode(bundled.tokenizer, e) for e in asked])
    said = generate(bundled.model, bundled.tokenizer, asked)
    assert [s == e.answer for s, e in zip(said, asked, strict=True)] == scores.exact.tolist()


def test_generate_does_not_depend_on_the_batch(bundled):
    asked = examples("tune", ["json", "facts", "recall_12"], limit=4)
    together = generate(bundled.model, bundled.tokenizer, asked)
    alone = [generate(bundled.model, bundled.tokenizer, [e])[0] for e in asked]
    assert together == alone


@pytest.mark.parametrize("task, answer, said, right", [
    ("facts", "cooper", "Cooper.", True), ("facts", "cooper", "cooper of Brask", False),
    ("json", '{"a": 1, "b": "x"}', '{"b":"x","a":1}', True), ("json", '{"a": 1}', '{"a": "1"}', False),
    ("tool", '{"a": 1}', '{"a": 1', False)])
def test_is_correct(task, answer, said, right):
    assert is_correct(Example(task, "", answer), said) is right


def test_parses():
    assert parses("[1]") and not parses("{'a': 1}")
