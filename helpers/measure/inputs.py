"""What the inputs of linears look like: a few loud channels, a loud first token, and what they leave of a share of the mean.

Outlier channels: Dettmers et al. 2022 (arXiv 2208.07339). The first token as the place where attention rests: Xiao et al. 2023
(arXiv 2309.17453); its large values in the residual stream: Sun et al. 2024 (arXiv 2402.17762).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from helpers.models.method import Gram
from helpers.models.walk import walk

SHARES = (0.0, *np.geomspace(0.002, 1, 16).round(4).tolist())  # of the channels, the largest first
POSITIONS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 255)


@dataclass
class FirstApart(Gram):
    """A Gram matrix, and how much of its diagonal the first token of every sequence brought."""

    of_first: Tensor = field(default_factory=lambda: torch.zeros(()))  # sum of its x^2, fp32 [in]

    def add(self, X: Tensor) -> None:
        super().add(X)
        self.of_first = self.of_first.to(X.device) + X[:, 0].float().square().sum(0)


def look_at(model: nn.Module, sequences: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """A row for each group of linears that share an input, in the order of the model, of its unquantized inputs."""
    rows = []
    for n, step in enumerate(walk(model, sequences)):
        positions = by_position([b.hidden for b in step.stream.batches])
        for group, kept in ((g, step.grams(FirstApart)[g[0]]) for g in step.layout.groups):
            rows.append({"block": n, "linear": group[0], "positions": positions, **shape_of(kept)})
    return rows


def shape_of(kept: FirstApart) -> dict[str, Any]:
    """Of one input. `channels`: the mean square of the channel at each of SHARES, `spectrum`: the eigenvalue there, both over
    the mean; `damping`: 1 % of the mean diagonal, over the median of the diagonal, and the same without first tokens."""
    diagonal = kept.H.diagonal()
    rest = (diagonal - kept.of_first).clamp(min=0)
    eigenvalues = torch.linalg.eigvalsh(kept.H.double()).clamp(min=0)
    return {"channels": at_shares(diagonal), "spectrum": at_shares(eigenvalues), "damping": damping(diagonal),
            "damping_after_first": damping(rest), "of_first": float(kept.of_first.sum() / diagonal.sum()),
            "of_largest": float(diagonal.topk(max(1, len(diagonal) // 100)).values.sum() / diagonal.sum())}


def damping(diagonal: Tensor, share: float = 0.01) -> float:
    """That share of the mean of H's diagonal, in units of the median channel."""
    return float(share * diagonal.mean() / diagonal.median())


def at_shares(values: Tensor) -> list[float]:
    ranked = values.double().sort(descending=True).values / values.double().mean()
    return [float(f"{ranked[min(len(ranked) - 1, int(share * len(ranked)))]:.4g}") for share in SHARES]


def by_position(hidden: Sequence[Tensor]) -> list[float]:
    """Root mean square of the residual stream at each of POSITIONS that the texts have, over their median."""
    rms = torch.cat([h.float().square().mean(-1) for h in hidden]).mean(0).sqrt()
    return [float(f"{rms[p] / rms.median():.4g}") for p in POSITIONS if p < len(rms)]
