"""The uniform (affine) grid: real = (q - zero_point) * scale, with integer codes q and one scale per group of a row.

Round-to-nearest on this grid (RTN) is the baseline that every other method of the book is held against.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


class GroupSizeError(ValueError):
    """The group size does not divide the width of the weight."""


@dataclass(frozen=True)
class QParams:
    """The grid of each group: codes run from 0 to `qmax`; `scale` and `zero_point` are [out, groups]."""

    scale: Float[Tensor, "out groups"]
    zero_point: Float[Tensor, "out groups"]
    qmax: int

    @property
    def groups(self) -> int:
        return self.scale.shape[1]


def fit_qparams(W: Float[Tensor, "out in_"], bits: int = 4, group_size: int = -1, sym: bool = True) -> QParams:
    """The grid that just covers each group of `group_size` weights along a row (-1: the whole row).

    sym: scale = 2 max|w| / (2^bits - 1), zero in the middle, 2^(bits-1).
    asym: scale = (max - min) / (2^bits - 1) over a range that includes 0, zero = round(-min / scale).

    >>> q = fit_qparams(torch.tensor([[-1.0, 0.0, 0.5, 2.0]]), bits=2, sym=False)
    >>> q.scale.item(), q.zero_point.item()
    (1.0, 1.0)

    Raises GroupSizeError if the group does not divide the row, ValueError for other bits than 2..8 or weights that are
    not finite.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits: expected 2 to 8, got {bits}")
    width = W.shape[1]
    group_size = width if group_size == -1 else group_size
    if group_size < 1 or width % group_size:
        raise GroupSizeError(f"group_size {group_size} does not divide the {width} inputs of a weight {tuple(W.shape)}; "
                             "choose a divisor, or -1 for one group a row")
    if not torch.isfinite(W).all():
        raise ValueError(f"weight {tuple(W.shape)} has {(~torch.isfinite(W)).sum()} values that are NaN or infinite")
    grouped = W.float().unflatten(1, (-1, group_size))  # [out, groups, group_size]
    qmax = 2**bits - 1
    if sym:
        scale = 2 * grouped.abs().amax(2) / qmax
        zero_point = torch.full_like(scale, 2 ** (bits - 1))
    else:
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        scale = (high - low) / qmax
        zero_point = None
    # a group of zeros has no range; so has one of subnormals, whose scale rounds to zero
    scale = torch.where(scale > 0, scale, 1.0)
    if zero_point is None:
        zero_point = torch.round(-low / scale)
    return QParams(scale, zero_point, qmax)


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
