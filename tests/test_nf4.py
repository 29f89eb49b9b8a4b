import bitsandbytes.functional as bnb
import pytest
import torch

from helpers.quantizers.nf4 import (
    codebook,
    dequantize_absmax,
    dequantize_nf4,
    dynamic_map,
    nearest,
    pack_pairs,
    quantize_absmax,
    quantize_nf4,
    unpack_pairs,
)


def test_maps_are_those_of_bitsandbytes():
    assert torch.equal(codebook(), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2048, 2048), (999, 1001), (3, 64), (7, 13), (1, 65), (1, 1)], ids=str)
def test_bit_for_bit_bitsandbytes(dtype, shape):
    """Over 5 million weights a dtype, with partial, zero, constant and positive blocks: all numbers identical."""
    W = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    if W.numel() > 1000:
        W.view(-1)[64:128], W.view(-1)[128:192] = 0, 0.5
        W.view(-1)[192:256] = W.view(-1)[192:256].abs()
    packed, state = bnb.quantize_4bit(W, quant_type="nf4", compress_statistics=False)
    q = quantize_nf4(W)
    assert torch.equal(q.packed, packed.flatten()) and torch.equal(q.absmax, state.absmax)
    assert torch.equal(dequantize_nf4(q, dtype), bnb.dequantize_4bit(packed, state))
    _, state = bnb.quantize_4bit(W, quant_type="nf4", compress_statistics=True)
    double = quantize_absmax(q.absmax)
    assert torch.equal(double.codes, state.absmax.flatten()) and torch.equal(double.absmax, state.state2.absmax)
    assert double.offset == state.offset
    assert torch.equal(dequantize_absmax(double), bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset)


@pytest.mark.parametrize("block_size", [32, 128, 4096])
def test_other_block_sizes(block_size):
    W = torch.randn(64, 200)
    packed, _ = bnb.quantize_4bit(W, quant_type="nf4", compress_statistics=False, blocksize=block_size)
    assert torch.equal(quantize_nf4(W, block_size).packed, packed.flatten())


def test_nearest_is_nearest_also_at_the_midpoints():
    values = codebook()
    midpoints = (values[:-1] + values[1:]) / 2
    edge = torch.stack([midpoints, torch.nextafter(midpoints, torch.tensor(2.0)), torch.nextafter(midpoints, -torch.ones(()))])
    v = torch.cat([edge.flatten(), torch.rand(8 * 1000 - edge.numel()) * 2 - 1, torch.tensor([-1.0, 1, 0, 0, 0, 0, 0, 0])])
    assert torch.equal(nearest(v).long(), torch.bucketize(v, midpoints))


def test_pairs_come_back():
    codes = torch.randint(0, 16, (101,), dtype=torch.uint8)
    assert torch.equal(unpack_pairs(pack_pairs(codes), 101), codes)


def test_stored_codes_have_double_quantized_scales():
    q = quantize_nf4(torch.randn(64, 100))
    stored = q.stored()
    assert torch.equal(stored.packed, q.packed) and torch.equal(stored.absmax, dequantize_absmax(quantize_absmax(q.absmax)))
    assert not torch.equal(stored.absmax, q.absmax)
    assert torch.equal(stored.stored().dequantize(), stored.dequantize())


def test_bad_input():
    with pytest.raises(ValueError, match="multiple of 8"):
        quantize_nf4(torch.ones(4), 20)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinite"):
            quantize_nf4(torch.tensor([1.0, bad]))
