"""The uniform (affine) grid: real = (q - zero_point) * scale, with integer codes q and one scale per group of a row.

Round-to-nearest on this grid (RTN) is the baseline that every other method of the book is held against. The error that
counts is the output's: ||W X - W_hat X||^2 = tr(dW H dW^T) with H = X X^T, so a data set enters as one matrix.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

FP16_LEAST = 2.0**-24  # the smallest positive number that fp16 has


class GroupSizeError(ValueError):
    """The group size does not divide the width of the weight."""


class ScaleError(ValueError):
    """A scale that no file can hold."""


@dataclass(frozen=True)
class QParams:
    """The grid of each group: codes from 0 to `qmax`; `scale` (below zero it turns the grid around) and `zero_point`."""

    scale: Float[Tensor, "out groups"]
    zero_point: Float[Tensor, "out groups"]
    qmax: int

    @property
    def groups(self) -> int:
        return self.scale.shape[1]


def check(W: Float[Tensor, "out in_"], bits: int, group_size: int) -> int:
    """The width of a group. Raises GroupSizeError if it does not divide the row, ValueError for other bits than 2..8 or
    weights that are not finite."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits: expected 2 to 8, got {bits}")
    width = W.shape[1]
    group_size = width if group_size == -1 else group_size
    if group_size < 1 or width % group_size:
        raise GroupSizeError(f"group_size {group_size} does not divide the {width} inputs of a weight {tuple(W.shape)}; "
                             "choose a divisor, or -1 for one group a row")
    # a sum is finite only if all terms are; the slower test decides only where a sum of finite terms overflows
    if not W.sum().isfinite() and not W.isfinite().all():
        raise ValueError(f"weight {tuple(W.shape)} has {(~torch.isfinite(W)).sum()} values that are NaN or infinite")
    return group_size


def fit_qparams(W: Float[Tensor, "out in_"], bits: int = 4, group_size: int = -1, sym: bool = True) -> QParams:
    """The grid that just covers each group of `group_size` weights along a row (-1: the whole row).

    sym: scale = 2 max|w| / (2^bits - 1), zero in the middle, 2^(bits-1).
    asym: scale = (max - min) / (2^bits - 1) over a range that includes 0, zero = round(-min / scale).

    >>> q = fit_qparams(torch.tensor([[-1.0, 0.0, 0.5, 2.0]]), bits=2, sym=False)
    >>> q.scale.item(), q.zero_point.item()
    (1.0, 1.0)

    Raises what `check` does.
    """
    group_size = check(W, bits, group_size)
    grouped = W.float().unflatten(1, (-1, group_size))  # [out, groups, group_size]
    qmax = 2**bits - 1
    if sym:
        scale = 2 * grouped.abs().amax(2) / qmax
    else:
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        scale = (high - low) / qmax
    # a group of zeros has no range; so has one of subnormals, whose scale rounds to zero
    scale = torch.where(scale > 0, scale, 1.0)
    return QParams(scale, torch.full_like(scale, 2 ** (bits - 1)) if sym else torch.round(-low / scale), qmax)


def search_qparams(W: Float[Tensor, "out in_"], importance: Float[Tensor, " in_"], bits: int = 4, group_size: int = -1,
                   sym: bool = True, negative: bool = True, steps: int = 20, smallest: float = 0.5) -> QParams:
    """The grid of each group, shrunk so that sum_k importance_k (w_k - w_hat_k)^2 is least over `steps` shrink factors.

    A symmetric grid has 2^(bits-1) steps on one side of zero and one less on the other. With `negative` scales too both ways
    around are tried, from max|w| / 2^(bits-1) on, which the longer side just reaches (llama.cpp's Q4_0 and AutoRound give it to
    the largest weight). With importance = diag(H) the sum is the group's output error if inputs were uncorrelated. Raises as
    `fit_qparams`.
    """
    widest = fit_qparams(W, bits, group_size, sym)
    grouped = W.float().unflatten(1, (widest.groups, -1))
    weight = importance.unflatten(0, (widest.groups, -1))
    best, least = widest.scale, torch.full_like(widest.scale, torch.inf)
    shrinks = torch.linspace(1, smallest, steps)
    if sym and negative:
        shrinks = torch.cat([shrinks, -shrinks]) * (widest.qmax / (widest.qmax + 1))
    for shrink in shrinks.tolist():
        scale = shrink * widest.scale[..., None]
        q = (torch.round(grouped / scale) + widest.zero_point[..., None]).clamp_(0, widest.qmax)
        error = ((q - widest.zero_point[..., None]).mul_(scale).sub_(grouped).square_() * weight).sum(2)
        best = torch.where(error < least, scale[..., 0], best)
        least = torch.minimum(error, least)
    return QParams(best, widest.zero_point, widest.qmax)


def quantize(W: Float[Tensor, "out in_"], q: QParams) -> Int[Tensor, "out in_"]:
    """Codes clamp(round(w / scale) + zero_point, 0, qmax); halves round to even."""
    grouped = W.float().unflatten(1, (q.groups, -1))
    codes = torch.round(grouped / q.scale[..., None]) + q.zero_point[..., None]
    return codes.clamp(0, q.qmax).flatten(1).to(torch.int32)


def dequantize(W_q: Int[Tensor, "out in_"], q: QParams) -> Float[Tensor, "out in_"]:
    """The reconstruction W_hat = (q - zero_point) * scale, fp32."""
    grouped = W_q.unflatten(1, (q.groups, -1))
    return ((grouped - q.zero_point[..., None]) * q.scale[..., None]).flatten(1)


def round_to_nearest(W: Float[Tensor, "out in_"], bits: int = 4, group_size: int = -1,
                     sym: bool = True) -> Float[Tensor, "out in_"]:
    """W through the grid and back, in the dtype of W: the RTN baseline."""
    q = fit_qparams(W, bits, group_size, sym)
    return dequantize(quantize(W, q), q).to(W.dtype)


@dataclass(frozen=True)
class Quantized:
    """A weight as codes on a grid. `g_idx` names the group of each column: columns of a group need not be neighbours."""

    codes: Int[Tensor, "out in_"]
    grid: QParams
    g_idx: Int[Tensor, " in_"]

    @property
    def bits(self) -> int:
        return self.grid.qmax.bit_length()

    def dequantize(self) -> Float[Tensor, "out in_"]:
        """W_hat, in the dtype of the scales."""
        return (self.codes - self.grid.zero_point[:, self.g_idx]) * self.grid.scale[:, self.g_idx]

    def stored(self) -> "Quantized":
        """With its scales rounded to fp16, as every file has them; raises ScaleError if one is too large for that."""
        scale = self.grid.scale.float()
        scale = scale.abs().clamp(min=FP16_LEAST).copysign(scale).half().float()
        if not torch.isfinite(scale).all():
            raise ScaleError(f"a scale of {self.grid.scale.max():g} is beyond fp16, in which all formats store it: "
                             "leave this linear in 16 bits, or rescale the model")
        return replace(self, grid=replace(self.grid, scale=scale, zero_point=self.grid.zero_point.float()))

    def split(self, rows: Sequence[int]) -> "Iterator[Quantized]":
        """The parts of a stacked weight."""
        parts = (t.split(rows) for t in (self.codes, self.grid.scale, self.grid.zero_point))
        for codes, scale, zero_point in zip(*parts, strict=True):
            yield Quantized(codes, QParams(scale, zero_point, self.grid.qmax), self.g_idx)


def on_grid(W: Float[Tensor, "out in_"], grid: QParams) -> Quantized:
    """Round to nearest on a given grid."""
    g_idx = torch.arange(W.shape[1], device=W.device) // (W.shape[1] // grid.groups)
    return Quantized(quantize(W, grid), grid, g_idx)


def output_error(dW: Float[Tensor, "out in_"], H: Float[Tensor, "in_ in_"]) -> float:
    """||dW X||^2 = tr(dW H dW^T), for H = X X^T (any other factor in H is in the result too)."""
    return float(((dW @ H) * dW).sum(dtype=torch.float64))


def decibel(error: float, signal: float) -> float:
    """10 log10(error / signal): -20 dB is an error of 1 % of the signal's energy. No error is minus infinity."""
    if not signal:
        return math.nan
    return 10 * math.log10(error / signal) if error > 0 else -math.inf
