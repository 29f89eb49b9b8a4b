"""GPTQ: round one column at a time and let the columns not yet rounded make up for the error.

Frantar et al. 2022 (arXiv 2210.17323). With H = X X^T (any positive factor drops out), the best correction of the other
columns after column k moved by e is -e / [H^-1]_kk [H^-1]_k,: (eq. 2 of the paper). Two forms of one algorithm:

- `gptq_columns`: the paper's algorithm 1 as auto-gptq 0.7.1 runs it, number for number; three factorisations, and an
  update of all later columns in a block after each column.
- `gptq`: the same minimisation written as error feedback through one factor H = L D L^T. The code to use.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helpers.quantizers.affine import QParams, Quantized, check, fit_qparams, quantize, search_qparams


class HessianError(ValueError):
    """A Hessian that no damping makes usable."""


class Solution(NamedTuple):
    """What GPTQ found, and the damping that it took (a share of the mean diagonal)."""

    quantized: Quantized
    damp_percent: float


def damped(H: Float[Tensor, "n n"], damp_percent: float, order: Int[Tensor, " n"] | None = None
           ) -> tuple[Float[Tensor, "n n"], Tensor]:
    """H + damping times the mean diagonal, with the diagonal of dead columns (no input ever) set to 1, and which are dead; in
    this order of its columns.

    Raises HessianError if H is not finite, has a negative diagonal, or is zero: then no calibration token arrived.
    """
    diagonal = H.diagonal()
    if not torch.isfinite(H).all() or (diagonal < 0).any():
        raise HessianError("H has values that are NaN, infinite, or negative on its diagonal: check the activations")
    if not diagonal.any():
        raise HessianError("H is zero: no calibration token reached this layer, and GPTQ would be nothing but rounding")
    H = H.clone() if order is None else H[order[:, None], order]
    dead = H.diagonal() == 0
    H[dead, dead] = 1
    H.diagonal().add_(damp_percent * torch.diag(H).mean())  # of a copy: the order of summing decides the last bits
    return H, dead


def _factorise(H: Tensor, damp_percent: float, factor, order: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """factor(damped H), the dead columns and the damping used: ten times as much after each failure, at most 1."""
    while True:
        ready, dead = damped(H, damp_percent, order)
        try:
            result = factor(ready)
            if torch.isfinite(result).all():
                return result, dead, damp_percent
        except torch.linalg.LinAlgError:
            pass  # not positive definite in fp32: more damping is the remedy, and is on record
        if damp_percent >= 1:
            raise HessianError(f"H [{len(H)}, {len(H)}] could not be factorised even with a damping of {damp_percent:g}")
        damp_percent = min(1.0, max(10 * damp_percent, 1e-4))


def rounding_order(H: Float[Tensor, "n n"], group_size: int = -1, desc_act: bool = False, act_group_aware: bool = False
                   ) -> Int[Tensor, " n"]:
    """The order in which columns are rounded: as they are; those with the largest inputs first (desc_act); or so inside of
    each group, and the groups likewise, by their largest (group aware: Gafni et al. 2025, arXiv 2505.14638)."""
    size = torch.diag(H)
    if desc_act:
        return torch.argsort(size, descending=True)
    order = torch.arange(len(H), device=H.device)
    if act_group_aware:
        size, inside = size.view(-1, len(H) if group_size == -1 else group_size).sort(1, descending=True)
        order = order.view_as(inside).gather(1, inside)[size[:, 0].argsort(descending=True, stable=True)].flatten()
    return order


def _assemble(codes: Tensor, scales: list[Tensor], zeros: list[Tensor], qmax: int, group_size: int, order: Tensor) -> Quantized:
    """Codes [out, in] in the order of rounding, back in the order of the weight; so are the groups, if each is whole."""
    back = torch.argsort(order)
    g_idx = (torch.arange(codes.shape[1], device=codes.device) // group_size)[back]
    scale, zero, groups = torch.cat(scales, 1), torch.cat(zeros, 1), g_idx.view(-1, group_size)
    if (groups == groups[:, :1]).all():
        scale, zero, g_idx = scale[:, groups[:, 0]], zero[:, groups[:, 0]], g_idx.sort().values
    return Quantized(codes[:, back], QParams(scale, zero, qmax), g_idx)


@torch.no_grad()
def gptq_columns(W: Float[Tensor, "out in_"], H: Float[Tensor, "in_ in_"], bits: int = 4, group_size: int = 128,
                 sym: bool = True, desc_act: bool = False, damp_percent: float = 0.01, block_size: int = 128,
                 act_group_aware: bool = False) -> Solution:
    """Algorithm 1 of the paper, in the arithmetic of auto-gptq, its stale scales included.

    Groups smaller than a block take their scale from weights that do not yet carry the corrections from inside the block.
    Raises GroupSizeError and HessianError.
    """
    whole = fit_qparams(W, bits, group_size, sym)  # checks W; the grid itself where one group is the whole row
    group_size = W.shape[1] if group_size == -1 else group_size
    order = rounding_order(H, group_size, desc_act, act_group_aware)

    def inverse_factor(A: Tensor) -> Tensor:  # U upper triangular with H^-1 = U^T U
        return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(A)), upper=True)

    if desc_act or act_group_aware:  # else not even a copy: its layout in memory decides the last bits of the factorisation
        W, H = W[:, order], H[order][:, order]
    U, dead, damp_percent = _factorise(H, damp_percent, inverse_factor)
    W = W.float().masked_fill(dead, 0)
    codes = torch.zeros_like(W, dtype=torch.int32)
    scales, zeros = ([whole.scale], [whole.zero_point]) if group_size == W.shape[1] else ([], [])
    for start in range(0, W.shape[1], block_size):
        stop = min(start + block_size, W.shape[1])
        block, errors = W[:, start:stop].clone(), W.new_zeros(len(W), stop - start)
        for k in range(start, stop):
            if group_size < W.shape[1] and k % group_size == 0:
                grid = fit_qparams(W[:, k:k + group_size], bits, -1, sym)
                scales.append(grid.scale)
                zeros.append(grid.zero_point)
            grid = QParams(scales[-1], zeros[-1], whole.qmax)
            w = block[:, k - start]
            codes[:, k] = quantize(w[:, None], grid)[:, 0]
            w_hat = grid.scale[:, 0] * (codes[:, k] - grid.zero_point[:, 0])
            errors[:, k - start] = (w - w_hat) / U[k, k]
            block[:, k - start:] -= torch.outer(errors[:, k - start], U[k, k:stop])
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return Solution(_assemble(codes, scales, zeros, whole.qmax, group_size, order), damp_percent)


def feedback_factor(H: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The unit lower triangular F of H = F^T D F: F_kj is how much of earlier column j's error column k takes over.

    Column k is best rounded to the grid value nearest to w_k + sum_{j<k} F_kj (w_j - w_hat_j) (Chee et al. 2023, QuIP,
    arXiv 2307.13304: GPTQ is this "LDLQ"). One Cholesky of H with its order reversed.
    """
    U = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1)  # upper triangular, H = U U^T
    return (U / U.diagonal()).T.contiguous()


@torch.no_grad()
def gptq(W: Float[Tensor, "out in_"], H: Float[Tensor, "in_ in_"], bits: int = 4, group_size: int = 128, sym: bool = True,
         desc_act: bool = False, damp_percent: float = 0.01, search: bool = False, negative: bool = True,
         act_group_aware: bool = False) -> Solution:
    """Rounding with error feedback: minimises tr(dW H dW^T) greedily, column by column.

    A group's grid is fitted when its first column is reached, from weights that carry all corrections so far. With
    `search` its scale is the one of least error, each column weighed by D, what no later column can correct; for symmetric
    grids among `negative` ones too. Linears that share H can be stacked along `out`. Raises GroupSizeError and HessianError.
    """
    width, qmax, group_size = W.shape[1], 2**bits - 1, check(W, bits, group_size)
    order = rounding_order(H, group_size, desc_act, act_group_aware)
    F, dead, damp_percent = _factorise(H, damp_percent, feedback_factor, order)
    # one row for each column of W, so that what a step reads and writes is contiguous
    Wt = W.float().T[order].masked_fill(dead[:, None], 0).contiguous()
    Et, codes = torch.zeros_like(Wt), torch.empty_like(Wt)
    importance = _uncorrectable(F, damped(H, damp_percent, order)[0]) if search else None
    block = 128 if group_size == width else group_size
    scales, zeros, grid = [], [], None
    for start in range(0, width, block):
        stop = min(start + block, width)
        carried = F[start:stop, :start] @ Et[:start]  # what this block takes over from all before it
        target = Wt[start:stop] + carried
        if start % group_size == 0:
            # one grid a row is fitted to the row; that of a group to its weights as best corrected so far
            sample = Wt.T if group_size == width else (Wt[start:stop] + torch.linalg.solve_triangular(
                F[start:stop, start:stop], carried, upper=False, unitriangular=True)).T
            grid = (search_qparams(sample, importance[start:start + group_size], bits, -1, sym, negative) if search
                    else fit_qparams(sample, bits, -1, sym))
            scales.append(grid.scale)
            zeros.append(grid.zero_point)
            scale, zero, inverse = grid.scale[:, 0], grid.zero_point[:, 0], 1 / grid.scale[:, 0]
        E = Et[start:stop]
        for k, (w, t, e, q) in enumerate(zip(Wt[start:stop], target, E, codes[start:stop], strict=True)):
            t.addmv_(E[:k].T, F[start + k, start:start + k])  # and from the columns of this block
            torch.clamp(t.mul_(inverse).round_().add_(zero), 0, qmax, out=q)
            torch.addcmul(w, torch.sub(q, zero, out=t), scale, value=-1, out=e)
    return Solution(_assemble(codes.T.to(torch.int32), scales, zeros, qmax, group_size, order), damp_percent)


def targets(W: Float[Tensor, "out in_"], H: Float[Tensor, "in_ in_"], found: Solution, order: Int[Tensor, " in_"]
            ) -> Float[Tensor, "out in_"]:
    """What each weight was when it was rounded, with the errors of the columns before it taken over: in steps of the grid, and
    within the half step around its code (beyond the ends of the grid it was farther)."""
    q = found.quantized
    F, _, _ = _factorise(H, found.damp_percent, feedback_factor, order)
    W_hat = q.dequantize()
    carried = ((W.float() - W_hat)[:, order] @ F.T)[:, torch.argsort(order)]
    steps = (W_hat + carried) / q.grid.scale[:, q.g_idx] + q.grid.zero_point[:, q.g_idx]
    return steps.clamp(q.codes - 0.499, q.codes + 0.499)


def _uncorrectable(F: Tensor, H: Tensor) -> Tensor:
    """D of H = F^T D F: the weight of each column's squared error once later columns have made up for what they can."""
    return torch.linalg.solve_triangular(F.T, H, upper=True, unitriangular=True).diagonal()
