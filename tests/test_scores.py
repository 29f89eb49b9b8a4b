"""Cheap scores against their formulas written out: token by token, by autograd on the weights themselves."""

import copy

import pytest
import torch
from torch import nn

from helpers.measure.scores import BY_GRADIENTS, BY_WEIGHTS, cheap_scores
from helpers.methods.rtn import Rtn

NAMES = ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj", "lm_head")
SEQUENCES = [tuple(torch.randint(5, 1280, (n,), generator=torch.Generator().manual_seed(n)).tolist()) for n in (12, 1, 7)]


@pytest.fixture
def model(tiny):
    return copy.deepcopy(tiny)


@pytest.fixture
def rounded(tiny):
    """{(linear, setting): W_hat} of three linears inside the blocks, at two widths."""
    return {(n, bits): Rtn(bits, 64).solve(tiny.get_submodule(n).weight.detach(), None)[0].dequantize()
            for n in NAMES[:3] for bits in (2, 4)}


def by_hand(model: nn.Module, name: str, W_hat: torch.Tensor) -> dict[str, float]:
    """The six, from each token's input x and gradient g alone."""
    module, found = model.get_submodule(name), dict.fromkeys(BY_WEIGHTS | BY_GRADIENTS, 0.0)
    dW = module.weight.detach() - W_hat
    for sequence in SEQUENCES:
        if len(sequence) < 2:
            continue
        seen = {}

        def see(_, args, out, seen=seen):
            out.retain_grad()
            seen.update(x=args[0][0], y=out)

        handle = module.register_forward_hook(see)
        ids = torch.tensor([sequence])
        log_p = model(ids).logits[0].log_softmax(-1)
        loss = -sum(log_p[t, sequence[t + 1]] for t in range(len(sequence) - 1))
        handle.remove()
        model.zero_grad()
        loss.backward()
        found["weight error"] += float((dW**2).sum())
        found["gradient x error"] += float((module.weight.grad * dW).abs().sum())
        for x, g in zip(seen["x"].detach(), seen["y"].grad[0], strict=True):
            found["error x input energy"] += float((dW**2 @ x**2).sum())
            found["output error"] += float(((dW @ x) ** 2).sum())
            found["Fisher x error"] += float(((g[:, None] * x[None]) ** 2 * dW**2).sum())
            found["gradient x output error"] += float((g**2 * (dW @ x) ** 2).sum())
    return found


def test_every_score_is_its_formula(model, rounded):
    expected = {key: by_hand(copy.deepcopy(model), key[0], W_hat) for key, W_hat in rounded.items()}
    found = cheap_scores(model, rounded, SEQUENCES)
    assert set(found) == set(BY_WEIGHTS | BY_GRADIENTS) and len(found) == 6
    for score, values in found.items():
        assert values.keys() == rounded.keys()
        for key, value in values.items():
            assert value == pytest.approx(expected[key][score], rel=1e-3) and value > 0, (score, key)
        assert all(values[n, 2] > 4 * values[n, 4] or score == "gradient x error" for n in NAMES[:3])
    without = cheap_scores(model, rounded, SEQUENCES, gradients=False)
    assert set(without) == set(BY_WEIGHTS)
    assert all(without[s][k] == pytest.approx(v, rel=1e-6) for s in without for k, v in found[s].items())


def test_a_scores_sum_is_over_its_sequences(model, rounded):
    whole, parts = cheap_scores(model, rounded, SEQUENCES), [cheap_scores(model, rounded, [s]) for s in SEQUENCES[::2]]
    for score, values in whole.items():
        for key, value in values.items():
            assert value == pytest.approx(sum(p[score][key] for p in parts), rel=1e-5)
    assert cheap_scores(model, {}, SEQUENCES) == {score: {} for score in BY_WEIGHTS | BY_GRADIENTS}


def test_the_head_is_a_linear_too(model):
    W_hat = Rtn(3, 64).solve(model.lm_head.weight.detach(), None)[0].dequantize()
    found = cheap_scores(model, {("lm_head", ""): W_hat}, SEQUENCES)
    untied = copy.deepcopy(model)  # else the embedding's gradient is in the head's
    untied.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    expected = by_hand(untied, "lm_head", W_hat)
    assert all(found[s]["lm_head", ""] == pytest.approx(v, rel=1e-3) for s, v in expected.items())


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(model, rounded, fails):
    model.model.norm.weight.requires_grad_(False)
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert not all(wanted.values()) and any(wanted.values())
    if fails:  # in the second sequence
        key = next(iter(rounded))
        with pytest.raises(IndexError):
            cheap_scores(model, {key: rounded[key]}, [SEQUENCES[0], (5, 99999)])
    else:
        cheap_scores(model, rounded, SEQUENCES)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()) and torch.is_grad_enabled()


def test_half_precision_and_no_grad(model, rounded):
    """Sums are of fp32 whatever the model computes in, and a caller's no_grad does not take the gradients away."""
    full = cheap_scores(model, rounded, SEQUENCES)
    half = cheap_scores(model.bfloat16(), rounded, SEQUENCES)
    for score in ("error x input energy", "output error"):
        assert all(half[score][n, 2] == pytest.approx(full[score][n, 2], rel=0.05) for n in NAMES[:3])
    with torch.no_grad():
        again = cheap_scores(model.float(), rounded, SEQUENCES)
    assert all(v > 0 for values in again.values() for v in values.values())


@pytest.mark.parametrize("sequences", [[], [()], [(5,), (6,)]])
def test_there_must_be_a_token_to_foresee(model, rounded, sequences):
    with pytest.raises(ValueError, match="at least one of two tokens or more"):
        cheap_scores(model, rounded, sequences)
