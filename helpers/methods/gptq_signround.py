"""GPTQ, and then SignRound (helpers/quantizers/signround.py) from where it ended, block by block.

GPTQ's errors make up for each other already, and its scales stay. What is learned is kept as far as batches apart, which are
not learned from, say that it brings the block's outputs nearer to the unquantized model's.
"""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import functional_call

from helpers.methods.gptq import Gptq
from helpers.models.layers import Fold
from helpers.models.method import Notes, PlanError
from helpers.models.walk import Batch, Step
from helpers.quantizers.affine import Quantized, decibel, output_error
from helpers.quantizers.gptq import Solution, rounding_order, targets
from helpers.quantizers.signround import Points, descend, rounded, share_of_each


@dataclass(frozen=True)
class GptqSignRound(Gptq):
    """GPTQ with learned roundings; minutes to hours, as each block is trained (chapter 12)."""

    name: ClassVar[str] = "gptq+signround"
    stacks: ClassVar[bool] = False
    prepares: ClassVar[bool] = True
    aims: ClassVar[bool] = True
    inputs: ClassVar[str] = "block"
    at_once: ClassVar[int] = 2048  # tokens a step, as AutoRound has
    distance = staticmethod(share_of_each)
    pick = staticmethod(min)  # the points of least error on the batches apart
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
        batches = list(zip(step.stream.batches, (step.aim or step.stream.through(step.block)).batches, strict=True))
        apart, learned = batches[::8], [b for i, b in enumerate(batches) if i % 8] or batches  # of one batch none is apart
        error = partial(self.error, step, start)
        points = self.pick(descend(points, error, learned, self.steps),
                           key=lambda points: sum(float(error(points, *batch)) for batch in apart))
        for n, q in start.items():
            W, H = step.block.get_submodule(n).weight.float(), kept[n].H
            kept[n] = replace(q, codes=rounded(points[n], q.grid.qmax).to(torch.int32))
            notes[n]["error_db"] = decibel(output_error(W - kept[n].dequantize(), H), output_error(W, H))
        return notes

    def error(self, step: Step, start: dict[str, Quantized], points: Points, batch: Batch, aim: Batch) -> Tensor:
        """The distance of the block's output, with these points rounded, from what is aimed at."""
        weights = {f"{n}.weight": ((rounded(points[n], q.grid.qmax) - q.grid.zero_point[:, q.g_idx]) * q.grid.scale[:, q.g_idx]
                                   ).to(batch.hidden.dtype) for n, q in start.items()}
        out = step.stream.run(lambda *args, **also: functional_call(step.block, weights, args, also), batch)
        return self.distance(out.float(), aim.hidden.float())

    def solve(self, W: Tensor, kept: Quantized) -> tuple[Quantized, Notes]:
        return kept, {}
