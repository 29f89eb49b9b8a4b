"""NF4: a grid of 16 values at the quantiles of a normal distribution, scaled to each block's largest weight.

Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), section 3. Codes, absmax and double quantization are those of
bitsandbytes 0.50.2, bit for bit; nothing here looks at data.
"""

from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

OFFSET = 0.9677083  # the outermost quantile, as bitsandbytes has it; 1 would be infinity
CHUNK = 1 << 19  # weights that fit a core's cache with what is worked out of them
RESOLUTION = 1 << 14  # cells of the lookup table on each side of zero
_UNSURE = 255


@cache
def codebook(device: torch.device | str = "cpu") -> Float[Tensor, "16"]:
    """The 16 values: 7 negative quantiles, 0, 8 positive ones, divided by the largest. A zero weight has a code of its own.

    >>> codebook()[[0, 7, 8, 15]].tolist()
    [-1.0, 0.0, 0.07958029955625534, 1.0]
    """
    def quantiles(n: int) -> list[float]:
        return [NormalDist().inv_cdf(p) for p in torch.linspace(OFFSET, 0.5, n)[:-1].tolist()]

    values = torch.tensor(sorted([-x for x in quantiles(8)] + [0.0] + quantiles(9)))
    return (values / values.max()).to(device)


@cache
def _tables(device: torch.device) -> tuple[Float[Tensor, "15"], UInt8[Tensor, " cells"]]:
    """The midpoints between neighbours of the codebook, and the code of each of many narrow cells of [-1, 1].

    A cell that a midpoint cuts has no single code and is marked; with 2^15 cells that is 15 of them.
    """
    values = codebook()
    midpoints = (values[:-1] + values[1:]) / 2
    centres = torch.arange(-RESOLUTION, RESOLUTION + 1) / RESOLUTION
    low, high = (torch.bucketize(centres + side * 0.51 / RESOLUTION, midpoints) for side in (-1, 1))
    return midpoints.to(device), torch.where(low == high, low, _UNSURE).to(torch.uint8).to(device)


def nearest(v: Float[Tensor, " n"]) -> UInt8[Tensor, " n"]:
    """The code of the nearest value for each v in [-1, 1], ties to the lower one; n divisible by 8.

    One table lookup each, then the few that fell into a marked cell are settled by comparison.
    """
    midpoints, cells = _tables(v.device)
    codes = cells.index_select(0, (v * RESOLUTION).add_(RESOLUTION + 0.5).to(torch.int32))
    # eight codes as one word: those with a mark in them have a top bit set somewhere
    unsure = (codes.view(torch.int64) & -0x7F7F7F7F7F7F7F80).nonzero().squeeze(1)
    codes.view(-1, 8)[unsure] = torch.bucketize(v.view(-1, 8)[unsure], midpoints, out_int32=True).to(torch.uint8)
    return codes


class DoubleQuantized(NamedTuple):
    """absmax in 8 bits: codes, one fp32 absmax for each 256 of them, and the mean that was taken off first."""

    codes: UInt8[Tensor, " blocks"]
    absmax: Float[Tensor, " nested"]
    offset: Float[Tensor, ""]


class NF4(NamedTuple):
    """A tensor in NF4. `packed`: two codes a byte, the first in the high half. `double`: what `absmax` was in the file."""

    packed: UInt8[Tensor, " bytes"]
    absmax: Float[Tensor, " blocks"]
    shape: tuple[int, ...]
    block_size: int
    double: DoubleQuantized | None = None

    def dequantize(self) -> Float[Tensor, "..."]:
        """W_hat, fp32."""
        return dequantize_nf4(self)

    def stored(self) -> "NF4":
        """With double quantization, as the files have it."""
        double = self.double or quantize_absmax(self.absmax)
        return self._replace(absmax=dequantize_absmax(double), double=double)


def quantize_nf4(W: Float[Tensor, "..."], block_size: int = 64) -> NF4:
    """Each block of `block_size` neighbours, in the order of memory, divided by its largest magnitude, to the nearest code.

    A block of zeros gets code 7, which is zero. Raises ValueError for values that are not finite, or a block size that is
    not a multiple of 8.
    """
    if block_size < 8 or block_size % 8:
        raise ValueError(f"block_size: expected a multiple of 8, got {block_size}")
    flat = W.detach().reshape(-1).float()
    if not torch.isfinite(flat.sum()) and not torch.isfinite(flat).all():
        raise ValueError(f"weight {tuple(W.shape)} has values that are NaN or infinite")
    whole = flat.numel() // block_size
    blocks = flat[:whole * block_size].view(-1, block_size)
    absmax, codes = flat.new_empty(whole), flat.new_empty(whole * block_size, dtype=torch.uint8)
    rows = max(1, CHUNK // block_size)
    for i in range(0, whole, rows):
        x = blocks[i:i + rows]
        absmax[i:i + rows] = x.abs().amax(1)
        inverse = 1 / absmax[i:i + rows].clamp(min=1e-38)
        codes[i * block_size:(i + rows) * block_size] = nearest((x * inverse[:, None]).clamp_(-1, 1).view(-1))
    rest = flat[whole * block_size:]
    if len(rest):  # bitsandbytes divides here where it multiplies by the reciprocal above
        absmax = torch.cat([absmax, rest.abs().max().clamp(min=1e-38)[None]])
        padded = torch.nn.functional.pad((rest / absmax[-1]).clamp(-1, 1), (0, -len(rest) % 8))
        codes = torch.cat([codes, nearest(padded)[:len(rest)]])
    return NF4(pack_pairs(codes), absmax, tuple(W.shape), block_size)


def dequantize_nf4(q: NF4, dtype: torch.dtype = torch.float32) -> Float[Tensor, "..."]:
    """codebook[code] * absmax, computed in fp32, then cast."""
    n, size = torch.Size(q.shape).numel(), q.block_size
    whole, flat = n // size, q.absmax.new_empty(n)
    # both values of a byte at once: a table of 256 pairs, each moved as one 8-byte number
    values = codebook(q.packed.device)
    pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], 1).view(torch.int64).squeeze(1)

    def looked_up(part: slice) -> Tensor:
        return pairs.index_select(0, q.packed[part.start // 2:(part.stop + 1) // 2].int()).view(torch.float32)

    rows = max(1, CHUNK // size)
    for i in range(0, whole, rows):  # looked up in the cache, written to memory once
        part = slice(i * size, min(i + rows, whole) * size)
        torch.mul(looked_up(part).view(-1, size), q.absmax[i:min(i + rows, whole), None], out=flat[part].view(-1, size))
    if n % size:
        rest = slice(whole * size, n)
        flat[rest] = looked_up(rest)[:n % size] * q.absmax[-1]
    return flat.view(q.shape).to(dtype)


def pack_pairs(codes: UInt8[Tensor, " n"]) -> UInt8[Tensor, " bytes"]:
    """Two 4-bit codes a byte, the first in the high half; an odd last one is followed by 0's code, 7."""
    if len(codes) % 2:
        codes = torch.cat([codes, codes.new_tensor([7])])
    both = codes.view(torch.int16)  # little-endian: the first code is the low byte
    return ((both << 4) | (both >> 8)).to(torch.uint8)


def unpack_pairs(packed: UInt8[Tensor, " bytes"], n: int) -> UInt8[Tensor, " n"]:
    """The inverse of `pack_pairs`."""
    return torch.stack([packed >> 4, packed & 0xF], 1).view(-1)[:n]


@cache
def dynamic_map(device: torch.device | str = "cpu") -> Float[Tensor, "256"]:
    """The 8-bit grid for the absmax values: in each of 7 decades twice as many evenly spaced values as in the one below.

    Dettmers 2015 (dynamic tree quantization), with the signs of bitsandbytes: 127 negative, 0, 128 positive.
    """
    magnitudes = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        magnitudes += (10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
    return torch.tensor(sorted([-m for m in magnitudes] + [0.0] + magnitudes + [1.0])).to(device)


NESTED_BLOCK = 256
_BINS = 65535


def quantize_absmax(absmax: Float[Tensor, " blocks"]) -> DoubleQuantized:
    """Double quantization (QLoRA, section 3): absmax less its mean, in blocks of 256, to the dynamic 8-bit grid.

    The nearest value is looked up by one of 65,536 bins, as bitsandbytes does on a CPU; at 117 bins of 65,536 that is a
    neighbour of the nearest.
    """
    offset = absmax.mean()
    centred = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested = centred.abs().amax(1)
    scaled = torch.where(nested[:, None] > 0, centred * (1 / nested)[:, None], -1)  # code 0 where all is 0, as there
    bins = ((scaled.clamp(-1, 1) + 1) * 0.5 * _BINS + 0.5).int()
    return DoubleQuantized(_bin_codes(absmax.device)[bins].view(-1)[:len(absmax)], nested, offset)


@cache
def _bin_codes(device: torch.device) -> UInt8[Tensor, "65536"]:
    values = dynamic_map()
    centres = torch.arange(_BINS + 1, dtype=torch.float32) / _BINS * 2 - 1
    return torch.bucketize(centres, (values[:-1] + values[1:]) / 2).to(torch.uint8).to(device)


def dequantize_absmax(q: DoubleQuantized) -> Float[Tensor, " blocks"]:
    """map[code] * nested absmax + offset, fp32."""
    return dynamic_map(q.codes.device)[q.codes.int()] * q.absmax.repeat_interleave(NESTED_BLOCK)[:len(q.codes)] + q.offset
