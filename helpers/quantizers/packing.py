"""4-bit codes and the words of the files: each format's packing beside its inverse.

All formats are one bit stream, little end first, cut into 32-bit words; they differ in the direction and in the order.
"""

from math import gcd

import torch
from jaxtyping import Int, Int32
from torch import Tensor

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word is column 8 c + AWQ_ORDER[i], for the sake of its GPU kernel


def pack(codes: Int[Tensor, "n columns"], bits: int) -> Int32[Tensor, "words columns"]:
    """Down each column, `bits` bits a code; with 3 bits, codes cross the borders of words.

    Raises ValueError if the codes do not fill whole words, or one does not fit its bits: it would spoil its neighbours.
    """
    period = 32 // gcd(bits, 32)
    if codes.shape[0] % period:
        raise ValueError(f"codes {tuple(codes.shape)}: the first size must be a multiple of {period} at {bits} bits")
    if codes.numel() and (codes.min() < 0 or codes.max() >= 2**bits):
        raise ValueError(f"codes run from {codes.min()} to {codes.max()}, outside of 0 to {2**bits - 1}")
    blocks = codes.to(torch.int64).unflatten(0, (-1, period))
    words = torch.zeros(len(blocks), bits * period // 32, codes.shape[1], dtype=torch.int64, device=codes.device)
    for j in range(period):
        word, shift = divmod(j * bits, 32)
        words[:, word] |= blocks[:, j] << shift
        if shift + bits > 32:
            words[:, word + 1] |= blocks[:, j] >> (32 - shift)
    return words.flatten(0, 1).to(torch.int32)  # keeps the low 32 bits


def unpack(words: Int32[Tensor, "words columns"], bits: int) -> Int32[Tensor, "n columns"]:
    """The inverse of `pack`."""
    period = 32 // gcd(bits, 32)
    blocks = (words.to(torch.int64) & 0xFFFFFFFF).unflatten(0, (-1, bits * period // 32))
    codes = torch.empty(len(blocks), period, words.shape[1], dtype=torch.int64, device=words.device)
    for j in range(period):
        word, shift = divmod(j * bits, 32)
        codes[:, j] = blocks[:, word] >> shift
        if shift + bits > 32:
            codes[:, j] |= blocks[:, word + 1] << (32 - shift)
    return (codes & (2**bits - 1)).flatten(0, 1).to(torch.int32)


def pack_gptq(codes: Int[Tensor, "out in_"], bits: int = 4) -> Int32[Tensor, "words out"]:
    """GPTQ `qweight`: neighbouring inputs of one output share a word."""
    return pack(codes.T, bits)


def unpack_gptq(qweight: Int32[Tensor, "words out"], bits: int = 4) -> Int32[Tensor, "out in_"]:
    return unpack(qweight, bits).T.contiguous()


def pack_gptq_zeros(zeros: Int[Tensor, "out groups"], bits: int = 4, v1: bool = True) -> Int32[Tensor, "groups words"]:
    """GPTQ `qzeros`: neighbouring outputs share a word. Version 1 of the format stores zero - 1, so it has no zero of 0:
    auto-gptq writes -1 there, which spoils the neighbours; here it is a ValueError."""
    if v1 and (zeros == 0).any():
        raise ValueError(f"{int((zeros == 0).sum())} zero points are 0, which version 1 of the format cannot hold: "
                         "write gptq_v2, or quantize symmetrically")
    return pack(zeros - 1 if v1 else zeros, bits).T.contiguous()


def unpack_gptq_zeros(qzeros: Int32[Tensor, "groups words"], bits: int = 4, v1: bool = True) -> Int32[Tensor, "out groups"]:
    zeros = unpack(qzeros.T, bits)
    return zeros + 1 if v1 else zeros


def pack_awq(codes: Int[Tensor, "out in_"]) -> Int32[Tensor, "in_ words"]:
    """AWQ GEMM `qweight` and `qzeros`: neighbouring outputs of one input share a word, even ones first."""
    if codes.shape[0] % 8:
        raise ValueError(f"codes {tuple(codes.shape)}: the AWQ format needs a multiple of 8 outputs")
    order = torch.tensor(AWQ_ORDER).to(codes.device)
    return pack(codes.unflatten(0, (-1, 8))[:, order].flatten(0, 1), 4).T.contiguous()


def unpack_awq(qweight: Int32[Tensor, "in_ words"]) -> Int32[Tensor, "out in_"]:
    codes = unpack(qweight.T, 4).unflatten(0, (-1, 8))
    return codes[:, torch.tensor(AWQ_ORDER).to(codes.device).argsort()].flatten(0, 1)
