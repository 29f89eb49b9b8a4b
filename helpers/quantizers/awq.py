"""AWQ: scale up the input channels that matter before rounding, and undo it in the layer before.

Lin et al. 2023 (arXiv 2306.00978): Q(W diag(s)) diag(s)^-1 X, with one s for all linears that read the same input, chosen
from a one-dimensional family by the error of the output. Nothing stays in 16 bits. The arithmetic is autoawq 0.2.9's.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from helpers.quantizers.affine import QParams, Quantized, check

RATIOS = tuple(r / 20 for r in range(20))
SHRINKS = tuple(1 - i / 20 for i in range(10))  # of the clipping threshold


def awq_grid(W: Float[Tensor, "out in_"], bits: int = 4, group_size: int = 128) -> QParams:
    """Asymmetric grid over [min, max] of each group, in the dtype of W.

    Unlike `fit_qparams` the range need not contain 0, but the zero point is clamped to the codes all the same: a group
    whose weights have one sign loses part of its range.
    """
    grouped = W.unflatten(1, (-1, check(W, bits, group_size)))
    high, low, qmax = grouped.amax(2), grouped.amin(2), 2**bits - 1
    scale = (high - low).clamp(min=1e-5) / qmax
    return QParams(scale, (-torch.round(low / scale)).clamp_(0, qmax), qmax)


def _codes(W: Tensor, grid: QParams) -> Tensor:
    """Codes on a grid, computed in the dtype of W, [out, groups, group_size]."""
    ratio = W.unflatten(1, (grid.groups, -1)) / grid.scale[..., None]
    return torch.round(ratio).add_(grid.zero_point[..., None]).clamp_(0, grid.qmax)


def fake_quantize(W: Float[Tensor, "out in_"], bits: int = 4, group_size: int = 128) -> Float[Tensor, "out in_"]:
    """W through `awq_grid` and back, in its own dtype."""
    grid = awq_grid(W, bits, group_size)
    return _codes(W, grid).sub_(grid.zero_point[..., None]).mul_(grid.scale[..., None]).flatten(1)


def quantize_awq(W: Float[Tensor, "out in_"], bits: int = 4, group_size: int = 128) -> Quantized:
    """W rounded to `awq_grid`."""
    grid = awq_grid(W, bits, group_size)
    g_idx = torch.arange(W.shape[1], device=W.device) // (W.shape[1] // grid.groups)
    return Quantized(_codes(W, grid).flatten(1).to(torch.int32), grid, g_idx)


def weight_saliency(W: Float[Tensor, "out in_"], group_size: int = 128) -> Float[Tensor, " in_"]:
    """Mean over the rows of |w| as a share of its group's largest."""
    magnitude = W.abs().view(-1, check(W, 4, group_size))
    return (magnitude / (magnitude.amax(1, keepdim=True) + 1e-6)).view(W.shape).mean(0)


def candidate_scales(x_mean: Float[Tensor, " in_"], w_mean: Float[Tensor, " in_"] | None = None) -> list[Tensor]:
    """s = x^r / w^(1-r) for r = 0, 0.05 .. 0.95, divided by sqrt(max s min s); the paper's own code has x^r alone.

    x_mean [in]: mean |x| of each input channel. w_mean [in]: `weight_saliency`, or None for the paper's form.
    """
    scales = []
    for r in RATIOS:
        s = (x_mean.pow(r) if w_mean is None else x_mean.pow(r) / (w_mean.pow(1 - r) + 1e-4)).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        scales.append(torch.where(torch.isfinite(s), s, 1))
    return scales


class Search(NamedTuple):
    """The best of the candidates, its ratio, and the loss of each."""

    scale: Float[Tensor, " in_"]
    ratio: float
    losses: list[float]


def search_scale(candidates: Sequence[Tensor], loss: Callable[[Tensor], float]) -> Search:
    """The first candidate of least loss. Raises ValueError if no loss is finite."""
    losses = [loss(s) for s in candidates]
    finite = [x for x in losses if x < float("inf")]
    if not finite:
        raise ValueError("the loss is not finite for any scale: check the activations")
    best = losses.index(min(finite))
    return Search(candidates[best], RATIOS[best], losses)


def gram_loss(W: Float[Tensor, "out in_"], H: Float[Tensor, "in_ in_"], bits: int = 4,
              group_size: int = 128) -> Callable[[Tensor], float]:
    """s -> ||(Q(W s) / s - W) X||^2 as tr(dW H dW^T): no forward pass, whatever the number of tokens."""
    def loss(s: Tensor) -> float:
        dW = fake_quantize(W * s, bits, group_size).div_(s).sub_(W)
        return float(((dW @ H) * dW).sum())

    return loss


def clip_by_gram(W: Float[Tensor, "out in_"], H: Float[Tensor, "in_ in_"], bits: int = 4,
                 group_size: int = 128) -> Float[Tensor, "out groups"]:
    """The threshold t of each group for which clamping to [-t, t] before rounding gives least output error of that group.

    The error of a group alone is dw H_gg dw^T, with the group's block of H.
    """
    width = check(W, bits, group_size)
    grouped = W.unflatten(1, (-1, width))
    blocks = torch.stack([H[i:i + width, i:i + width] for i in range(0, len(H), width)])  # [groups, width, width]
    largest = grouped.abs().amax(2, keepdim=True)
    best, least = largest.clone(), torch.full_like(largest, torch.inf)
    for shrink in SHRINKS:
        threshold = largest * shrink
        dW = fake_quantize(grouped.clamp(-threshold, threshold).flatten(1), bits, width).unflatten(1, (-1, width)) - grouped
        d = dW.transpose(0, 1)  # [groups, out, width]
        error = ((d @ blocks) * d).sum(2).T[..., None]
        better = error < least
        best, least = torch.where(better, threshold, best), torch.where(better, error, least)
    return best[..., 0]


def clip_by_inputs(W: Float[Tensor, "out in_"], X: Float[Tensor, "tokens in_"], bits: int = 4, group_size: int = 128,
                   tokens: int = 512) -> Float[Tensor, "out groups"]:
    """The same search as autoawq does it: by the outputs of about `tokens` of the inputs, evenly drawn, in the dtype of W."""
    width = check(W, bits, group_size)
    X = X[None, ::max(1, len(X) // tokens)].unflatten(2, (-1, width))  # [1, tokens, groups, width]
    rows, thresholds = (256 if W.shape[0] % 256 == 0 else 64), []
    for part in W.split(rows):
        w = part.unflatten(1, (-1, width))[:, None]  # [rows, 1, groups, width]
        largest = w.abs().amax(-1, keepdim=True)
        best, least = largest.clone(), torch.full_like(largest, torch.inf)
        before = (X * w).sum(-1)
        for shrink in SHRINKS:
            threshold = largest * shrink
            q = fake_quantize(w.clamp(-threshold, threshold).view(-1, width), bits, width).view(w.shape)
            error = ((X * q).sum(-1) - before).pow(2).mean(1).view(least.shape)
            better = error < least
            least[better], best[better] = error[better], threshold[better]
        thresholds.append(best)
    return torch.cat(thresholds)[:, 0, :, 0]


def clip(W: Float[Tensor, "out in_"], thresholds: Float[Tensor, "out groups"]) -> Float[Tensor, "out in_"]:
    """W with each group clamped to its threshold."""
    return W.unflatten(1, (thresholds.shape[1], -1)).clamp(-thresholds[..., None], thresholds[..., None]).flatten(1)
