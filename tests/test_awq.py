import pytest
import torch

from helpers.quantizers.affine import output_error
from helpers.quantizers.awq import (
    RATIOS,
    awq_grid,
    candidate_scales,
    clip,
    clip_by_gram,
    clip_by_inputs,
    fake_quantize,
    gram_loss,
    quantize_awq,
    search_scale,
    weight_saliency,
)


@pytest.fixture
def linear():
    g = torch.Generator().manual_seed(0)
    X = torch.randn(600, 256, generator=g) * torch.cat([torch.full((8,), 30.0), torch.rand(248, generator=g)])
    return torch.randn(256, 256, generator=g) * 0.02, X


def test_gram_loss_is_the_forward_loss(linear):
    """The same losses, and so the same choice, without a forward pass."""
    W, X = linear
    candidates = candidate_scales(X.abs().mean(0), weight_saliency(W))

    def forward(s):
        return ((X / s) @ fake_quantize(W * s).T - X @ W.T).square().sum().item()

    by_forward, by_gram = search_scale(candidates, forward), search_scale(candidates, gram_loss(W, X.T @ X))
    assert by_gram.ratio == by_forward.ratio
    assert by_gram.losses == pytest.approx(by_forward.losses, rel=1e-3)


def test_scaling_helps_where_channels_stand_out(linear):
    W, X = linear
    H = X.T @ X
    best = search_scale(candidate_scales(X.abs().mean(0), weight_saliency(W)), gram_loss(W, H))
    assert min(best.losses) < 0.8 * output_error(fake_quantize(W) - W, H) and best.ratio > 0


def test_candidates():
    x, w = torch.tensor([1.0, 4.0]), torch.tensor([0.5, 0.5])
    plain = candidate_scales(x)
    assert len(plain) == len(RATIOS) == 20 and plain[0].tolist() == [1, 1]
    assert plain[10].tolist() == pytest.approx([2**-0.5, 2**0.5])  # x^0.5 = 1, 2, divided by sqrt(2)
    assert all(s.max() * s.min() == pytest.approx(1) for s in candidate_scales(x, w))
    assert all(torch.isfinite(s).all() for s in candidate_scales(torch.zeros(4), torch.zeros(4)))


def test_the_first_of_equals_wins_and_nothing_finite_is_an_error():
    candidates = [torch.tensor([float(i)]) for i in range(20)]
    assert search_scale(candidates, lambda s: 1.0).ratio == 0
    with pytest.raises(ValueError, match="not finite"):
        search_scale(candidates, lambda s: float("nan"))


def test_clip_by_gram_chooses_as_clip_by_all_inputs(linear):
    W, X = linear
    by_gram, by_inputs = clip_by_gram(W, X.T @ X), clip_by_inputs(W, X, tokens=len(X))
    assert (by_gram == by_inputs).float().mean() > 0.99
    assert (clip(W, by_gram).abs().view(256, 2, 128).amax(2) <= by_gram).all()


def test_grid():
    W = torch.tensor([[-1.0, 0, 0.5, 2.0], [1, 1, 1, 1], [1, 2, 3, 4]])
    grid = awq_grid(W, bits=2, group_size=4)
    assert grid.scale[0].item() == 1 and grid.zero_point[0].item() == 1
    assert torch.equal(quantize_awq(W, 2, 4).dequantize(), fake_quantize(W, 2, 4))
    # a range that does not contain zero has no zero point for it, and is cut off: 4 becomes 3
    assert fake_quantize(W, 2, 4)[2].tolist() == [1, 2, 3, 3]
    assert torch.isfinite(fake_quantize(torch.zeros(2, 4), 4, 4)).all()
