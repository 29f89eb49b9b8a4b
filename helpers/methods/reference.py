"""The archived toolkits' arithmetic, number for number, for `tests/test_reference.py` and chapters 5 and 6."""

import math
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from helpers.methods.awq import Awq, clippable, divides
from helpers.methods.gptq import Gptq
from helpers.models.layers import Fold, fold_scale
from helpers.models.method import Gram, Notes
from helpers.models.walk import Step
from helpers.quantizers import awq
from helpers.quantizers.affine import Quantized
from helpers.quantizers.gptq import gptq_columns


@dataclass
class AutoGptqGram(Gram):
    """2 / n X^T X over n sequences, added up as auto-gptq does: the order of operations decides the last bits."""

    sequences: int = 0

    def add(self, X: Tensor) -> None:
        self.H *= self.sequences / (self.sequences + 1)
        self.sequences += 1
        self.tokens += X.shape[-2]
        x = math.sqrt(2 / self.sequences) * X.flatten(0, -2).T.float()
        self.H += x @ x.T


@dataclass(frozen=True)
class AutoGptq(Gptq):
    """GPTQ as auto-gptq 0.7.1: sequence by sequence, linear by linear, with stale scales inside a block of 128."""

    name: ClassVar[str] = "autogptq"
    reference: ClassVar[bool] = True
    keeps: ClassVar[type[Gram]] = AutoGptqGram
    stacks: ClassVar[bool] = False
    at_once: ClassVar[int] = 1
    act_group_aware: bool = False  # auto-gptq has no such order
    search: bool = False  # and does not search

    def solve(self, W: Tensor, kept: Gram) -> tuple[Quantized, Notes]:
        found = gptq_columns(W, kept.H, self.bits, self.group_size, self.sym, self.desc_act, self.damp_percent,
                             act_group_aware=self.act_group_aware)
        return found.quantized, {"damp_percent": found.damp_percent}


@dataclass
class Inputs:
    """The inputs of a linear themselves."""

    X: list[Tensor] = field(default_factory=list)
    tokens: int = 0

    @classmethod
    def of(cls, width: int, device: Any) -> "Inputs":
        return cls()

    def add(self, X: Tensor) -> None:
        self.X.append(X)
        self.tokens += X.shape[:-1].numel()


@dataclass(frozen=True)
class AutoAwq(Awq):
    """AWQ as autoawq 0.2.9: by the output of the attention or of the MLP, in the model's dtype, one forward pass for each
    of 20 candidates. All sequences must be equally long, and go through at once, on the inputs of the unquantized model."""

    name: ClassVar[str] = "autoawq"
    reference: ClassVar[bool] = True
    keeps: ClassVar[type] = Inputs
    inputs: ClassVar[str] = "model"
    at_once: ClassVar[int] = 2**62

    def prepare(self, step: Step, mine: Sequence[str], folds: Sequence[Fold], kept: MutableMapping[str, Any]
                ) -> dict[str, Notes]:
        notes = {}
        inputs = {n: kept[n].X[0] for g in step.layout.groups for n in g if n in kept}
        for fold in folds if self.scale else ():
            if divides(self.group_size, step.block.get_submodule(fold.linears[0]).weight):
                best = self._search(step, fold, inputs[fold.linears[0]])
                notes[fold.linears[0]] = {"ratio": best.ratio}
                fold_scale(step.block, fold, best.scale)
                inputs |= {n: inputs[n].div(best.scale) for n in fold.linears}
        for n in clippable(mine) if self.clip else ():
            W = step.block.get_submodule(n).weight
            if divides(self.group_size, W):
                W.copy_(awq.clip(W, awq.clip_by_inputs(W, inputs[n].flatten(0, -2), self.bits, self.group_size)))
        return notes

    def solve(self, W: Tensor, kept: Any) -> tuple[Quantized, Notes]:
        return awq.quantize_awq(W, self.bits, self.group_size), {}

    def _search(self, step: Step, fold: Fold, x: Tensor) -> awq.Search:
        """The candidate of least error of what holds the fold's linears: the attention, the MLP, or the one linear."""
        linears = [step.block.get_submodule(n) for n in fold.linears]
        watched = step.block.get_submodule(fold.linears[0].rsplit(".", 1)[0]) if len(linears) > 1 else linears[0]
        [batch] = step.stream.batches
        # the attention takes the block's own arguments
        arguments = batch.arguments[step.stream.index][1] if any("q_proj" in n for n in fold.linears) else {}
        W = torch.cat([m.weight for m in linears])
        x_mean = (x.abs().view(-1, x.shape[-1]).float().sum(0) / (x.numel() // x.shape[-1])).to(x.dtype)

        def output() -> Tensor:
            out = watched(x, **arguments)
            out = out[0] if isinstance(out, tuple) else out
            return out.clip(torch.finfo(out.dtype).min, torch.finfo(out.dtype).max)

        before, saved = output(), [m.weight.clone() for m in linears]

        def loss(s: Tensor) -> float:
            for m, w in zip(linears, saved, strict=True):
                m.weight.copy_(awq.fake_quantize(w * s, self.bits, self.group_size) / s)
            return (before.view(-1) - output().view(-1)).float().pow(2).sum().item() / before.numel()

        best = awq.search_scale(awq.candidate_scales(x_mean, awq.weight_saliency(W, self.group_size)), loss)
        for m, w in zip(linears, saved, strict=True):
            m.weight.copy_(w)
        return best
