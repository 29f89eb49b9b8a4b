"""SignRound: signed gradient descent decides which weights to round up (Cheng et al. 2023, arXiv 2309.05516, algorithm 1).

AutoRound is its successor. Both begin at the nearest codes; the points to begin at are given here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Points = Mapping[str, Tensor]  # {linear: [out, in], in steps of its grid, before they are rounded}


def rounded(points: Tensor, qmax: int) -> Tensor:
    """Codes, in fp32, with the gradient that they would have without rounding (straight-through)."""
    return (points + (points.round() - points).detach()).clamp(0, qmax)


def share_of_each(out: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of the squared error of [..., token, width] as a share of what the token has: the norms that read it
    divide by that, and in plain squares, which SignRound has, a loud token outweighs all others (chapter 12)."""
    return ((out - wanted).square().mean(-1) / wanted.square().mean(-1)).mean()


def descend(points: Points, error: Callable[..., Tensor], batches: Sequence[Any], steps: int) -> Iterator[Points]:
    """The points on their way down `error(points, *batch)`: as they are, and after each tenth of the steps. A batch a step;
    every point moves by the same amount, which falls from 1 / steps to 0."""
    drawn, shown = torch.Generator().manual_seed(0), {round(steps * tenth / 10) for tenth in range(11)}
    points = {n: point.clone() for n, point in points.items()}
    for i in range(steps + 1):
        if i in shown:
            yield {n: point.clone() for n, point in points.items()}
        if i == steps:
            return
        with torch.enable_grad():
            moving = {n: point.requires_grad_() for n, point in points.items()}
            batch = batches[int(torch.randint(len(batches), (), generator=drawn))]
            gradients = torch.autograd.grad(error(moving, *batch), list(moving.values()))
        for point, gradient in zip(moving.values(), gradients, strict=True):
            point.detach_().sub_(gradient.sign(), alpha=(1 - i / steps) / steps)
