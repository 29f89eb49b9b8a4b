import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.quantizers.packing import (
    pack,
    pack_awq,
    pack_gptq,
    pack_gptq_zeros,
    unpack,
    unpack_awq,
    unpack_gptq,
    unpack_gptq_zeros,
)


def codes(rows: int, columns: int, bits: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


@given(bits=st.sampled_from([2, 3, 4, 8]), words=st.integers(1, 5), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_everything_comes_back(bits, words, columns, seed):
    c = codes(32 * words, columns, bits, seed)
    assert torch.equal(unpack(pack(c, bits), bits), c)
    assert torch.equal(unpack_gptq(pack_gptq(c.T, bits), bits), c.T)
    z = codes(32 * words, columns, bits, seed + 1)
    assert torch.equal(unpack_gptq_zeros(pack_gptq_zeros(z, bits, v1=False), bits, v1=False), z)
    if (z > 0).all():
        assert torch.equal(unpack_gptq_zeros(pack_gptq_zeros(z, bits), bits), z)
    c = codes(8 * words, columns, 4, seed)
    assert torch.equal(unpack_awq(pack_awq(c)), c)


def test_by_hand():
    assert pack(torch.arange(8)[:, None], 4).item() == 0x76543210
    # three words of 3-bit codes: code 10 has two bits in the first word and one in the second
    only_tenth = torch.zeros(32, 1, dtype=torch.int32)
    only_tenth[10] = 0b101
    assert pack(only_tenth, 3).flatten().tolist() == [0b01 << 30, 1, 0]
    assert pack_awq(torch.arange(8)[:, None]).item() == 0x75316420
    assert pack_gptq_zeros(torch.full((8, 1), 8)).item() == 0x77777777


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="multiple of 32 at 3 bits"):
        pack(torch.zeros(40, 1, dtype=torch.int32), 3)
    with pytest.raises(ValueError, match="-1 to 3"):
        pack(torch.tensor([[-1], [3], *[[0]] * 6]), 4)
    with pytest.raises(ValueError, match="gptq_v2"):
        pack_gptq_zeros(torch.zeros(8, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="multiple of 8"):
        pack_awq(torch.zeros(12, 4, dtype=torch.int32))
