"""GPTQ, and then SignRound from where it ended: signed gradient descent decides anew which weights to round up.

SignRound (Cheng et al. 2023, arXiv 2309.05516; AutoRound is its successor) begins at the nearest codes and learns, block by
block, what to add to each weight before it is rounded, so that the block's outputs come near the unquantized model's. Here it
begins at what GPTQ rounded, whose errors make up for each other already; the scales stay GPTQ's.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import functional_call

from helpers.methods.gptq import Gptq
from helpers.models.layers import Fold
from helpers.models.method import Notes, PlanError
from helpers.models.walk import Step
from helpers.quantizers.affine import Quantized, decibel, output_error
from helpers.quantizers.gptq import Solution, rounding_order, targets


@dataclass(frozen=True)
class GptqSignRound(Gptq):
    """GPTQ with learned roundings; minutes to hours, as each block is trained. Did harm on a real model (chapter 12)."""

    name: ClassVar[str] = "gptq+signround"
    stacks: ClassVar[bool] = False
    prepares: ClassVar[bool] = True
    aims: ClassVar[bool] = True
    inputs: ClassVar[str] = "block"
    at_once: ClassVar[int] = 2048  # tokens a step, as AutoRound has
    act_group_aware: bool = field(default=False, metadata={"help": "as for gptq; off, as it was measured (chapter 12)"})
    steps: int = field(default=200, metadata={"help": "steps of gradient descent for each block (chapter 12)"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise PlanError(f"steps: expected 1 or more steps of gradient descent a block, got {self.steps}")

    def prepare(self, step: Step, mine: Sequence[str], folds: Sequence[Fold], kept: MutableMapping[str, Any]
                ) -> dict[str, Notes]:
        start, points, notes = {}, {}, {}
        for n in mine:
            W, H = step.block.get_submodule(n).weight, kept[n].H
            start[n], notes[n] = super().solve(W, kept[n])
            order = rounding_order(H, self.group_size, self.desc_act, self.act_group_aware)
            points[n] = targets(W, H, Solution(start[n], **notes[n]), order)
        descend(step, start, points, self.steps)
        for n, q in start.items():
            W, H = step.block.get_submodule(n).weight.float(), kept[n].H
            kept[n] = replace(q, codes=rounded(q, points[n]).to(torch.int32))
            notes[n]["error_db"] = decibel(output_error(W - kept[n].dequantize(), H), output_error(W, H))
        return notes

    def solve(self, W: Tensor, kept: Quantized) -> tuple[Quantized, Notes]:
        return kept, {}


def rounded(start: Quantized, point: Tensor) -> Tensor:
    """Codes of points on the grid, in fp32, with the gradient that they would have without rounding (straight-through)."""
    return (point + (point.round() - point).detach()).clamp(0, start.grid.qmax)


def descend(step: Step, start: Mapping[str, Quantized], points: Mapping[str, Tensor], steps: int) -> None:
    """Move the points [out, in], in grid steps, down the error of the block's output; a batch a step, each point by the same
    amount, which falls from 1 / steps to 0."""
    pairs = list(zip(step.stream.batches, (step.aim or step.stream.through(step.block)).batches, strict=True))
    drawn = torch.Generator().manual_seed(0)
    for i in range(steps):
        batch, aim = pairs[int(torch.randint(len(pairs), (), generator=drawn))]
        with torch.enable_grad():
            moving = {n: point.requires_grad_() for n, point in points.items()}
            weights = {f"{n}.weight": ((rounded(q, moving[n]) - q.grid.zero_point[:, q.g_idx]) * q.grid.scale[:, q.g_idx]
                                       ).to(batch.hidden.dtype) for n, q in start.items()}
            out = step.stream.run(lambda *args, w=weights, **also: functional_call(step.block, w, args, also), batch)
            gradients = torch.autograd.grad((out - aim.hidden).float().square().mean(), list(moving.values()))
        for point, gradient in zip(moving.values(), gradients, strict=True):
            point.detach_().sub_(gradient.sign(), alpha=(1 - i / steps) / steps)
