import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.quantizers.affine import (
    GroupSizeError,
    ScaleError,
    dequantize,
    fit_qparams,
    on_grid,
    quantize,
    round_to_nearest,
)


def test_asymmetric_grid_by_hand():
    W = torch.tensor([[-1.0, 0.0, 0.5, 2.0]])
    q = fit_qparams(W, bits=2, sym=False)
    assert (q.scale.item(), q.zero_point.item(), q.qmax) == (1.0, 1.0, 3)
    codes = quantize(W, q)
    assert codes.tolist() == [[0, 1, 1, 3]]  # 0.5 rounds to even, 0, then + zero point
    assert dequantize(codes, q).tolist() == [[-1.0, 0.0, 0.0, 2.0]]


def test_symmetric_grid_by_hand():
    W = torch.tensor([[-3.0, 1.0, 0.2, 1.5]])
    q = fit_qparams(W, bits=2, sym=True)
    assert (q.scale.item(), q.zero_point.item()) == (2.0, 2.0)
    assert quantize(W, q).tolist() == [[0, 2, 2, 3]]
    assert dequantize(quantize(W, q), q).tolist() == [[-4.0, 0.0, 0.0, 2.0]]


@pytest.mark.parametrize("sym", [True, False])
def test_groups_are_independent(sym):
    W = torch.randn(3, 64)
    whole = round_to_nearest(W, 4, 32, sym)
    parts = torch.cat([round_to_nearest(W[:, i:i + 32].contiguous(), 4, -1, sym) for i in (0, 32)], 1)
    assert torch.equal(whole, parts)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.sampled_from([1, 2, 8, -1]), st.booleans(), st.integers(0, 10**6),
       st.sampled_from([1e-30, 1.0, 1e4]), st.sampled_from([0.0, 5.0]))
def test_error_is_at_most_one_step(bits, group, sym, seed, size, shift):
    """Half a step, and for the value that the symmetric grid cannot hold at its upper end one half more."""
    W = (torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)) + shift) * size
    q = fit_qparams(W, bits, group, sym)
    codes = quantize(W, q)
    assert codes.min() >= 0 and codes.max() <= q.qmax
    error = (dequantize(codes, q) - W).unflatten(1, (q.groups, -1)).abs() / q.scale[..., None]
    # asymmetric: the zero point is rounded as well, so an end of the range may lie half a step outside
    assert error.max() <= 1.0001


def test_more_bits_and_smaller_groups_are_nearer():
    W = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    error = {(b, g): (round_to_nearest(W, b, g) - W).square().mean() for b in (2, 3, 4, 8) for g in (-1, 128, 32)}
    assert error[8, -1] < error[4, -1] < error[3, -1] < error[2, -1]
    assert error[4, 32] < error[4, 128] < error[4, -1]


@pytest.mark.parametrize("W", [torch.zeros(2, 8), torch.full((2, 8), 1e-45), torch.full((2, 8), -3.0)])
@pytest.mark.parametrize("sym", [True, False])
def test_constant_groups_are_finite_and_near(W, sym):
    assert (round_to_nearest(W, 4, 8, sym) - W).abs().max() <= 0.25


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_what_is_not_finite(bad):
    W = torch.ones(2, 8)
    W[1, 3] = bad
    with pytest.raises(ValueError, match="1 values that are NaN or infinite"):
        fit_qparams(W)


def test_refuses_other_groups_and_bits():
    with pytest.raises(GroupSizeError, match="group_size 3 does not divide the 8 inputs"):
        fit_qparams(torch.ones(2, 8), group_size=3)
    with pytest.raises(ValueError, match="bits"):
        fit_qparams(torch.ones(2, 8), bits=1)


def test_keeps_dtype():
    assert round_to_nearest(torch.randn(2, 8).half()).dtype == torch.float16


def test_stored_codes_are_those_on_scales_in_fp16():
    W = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    q = on_grid(W, fit_qparams(W, 4, 32))
    stored = q.stored()
    assert torch.equal(stored.codes, q.codes) and torch.equal(stored.grid.scale, q.grid.scale.half().float())
    assert not torch.equal(stored.grid.scale, q.grid.scale)
    assert torch.equal(stored.stored().dequantize(), stored.dequantize())


def test_scales_beyond_fp16():
    W = torch.randn(2, 8)
    with pytest.raises(ScaleError, match="beyond fp16"):
        on_grid(W, fit_qparams(W * 1e8)).stored()
    tiny = on_grid(W * 1e-12, fit_qparams(W * 1e-12)).stored()  # not zero, which nothing could be divided by
    assert (tiny.grid.scale == 2**-24).all()


def test_a_stack_comes_apart():
    W = torch.randn(6, 64)
    parts = list(on_grid(W, fit_qparams(W, 4, 32)).split([1, 2, 3]))
    for part, w in zip(parts, W.split([1, 2, 3]), strict=True):
        alone = on_grid(w, fit_qparams(w, 4, 32))
        assert torch.equal(part.codes, alone.codes) and torch.equal(part.dequantize(), alone.dequantize())
