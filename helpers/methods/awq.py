"""AWQ: scale the inputs of a block's linears, fold the scales into what comes before, clip, round.

The scale of a fold is the one of least error of its linears' outputs, through their Gram matrix.
"""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from helpers.models.formats import AWQ, GPTQ_V2
from helpers.models.layers import Fold, fold_scale
from helpers.models.method import Format, Gram, Method, Notes
from helpers.models.walk import Step
from helpers.quantizers import awq
from helpers.quantizers.affine import Quantized

# autoawq's list, by how the last part of a name begins: the product of queries and keys is hard to clip for
NOT_CLIPPED = ("q_", "k_", "query", "key", "Wqkv", "qkv")


@dataclass(frozen=True)
class Awq(Method):
    """AWQ (`helpers/quantizers/awq.py`): asymmetric, with a scale for the input channels and a threshold for each group."""

    name: ClassVar[str] = "awq"
    keeps: ClassVar[type[Gram]] = Gram
    prepares: ClassVar[bool] = True
    folds: ClassVar[bool] = True
    bits: int = field(default=4, metadata={"help": "bits a weight, 2 to 8 (chapter 3)"})
    group_size: int = field(default=128, metadata={"help": "weights that share a scale, -1 for a whole row (chapter 6)",
                                                   "aliases": ["--group"]})
    scale: bool = field(default=True, metadata={"help": "search scales for the input channels (chapter 6)"})
    clip: bool = field(default=True, metadata={"help": "clip the weights of each group (chapter 6)"})

    def formats(self) -> tuple[Format, ...]:
        return (AWQ, GPTQ_V2) if self.bits == 4 else (GPTQ_V2,)

    def prepare(self, step: Step, mine: Sequence[str], folds: Sequence[Fold], kept: MutableMapping[str, Any]
                ) -> dict[str, Notes]:
        notes = scale_folds(step, mine, folds, kept, self.bits, self.group_size) if self.scale else {}
        for n in clippable(mine) if self.clip else ():
            W = step.block.get_submodule(n).weight
            if divides(self.group_size, W):
                W.copy_(awq.clip(W, awq.clip_by_gram(W.float(), kept[n].H, self.bits, self.group_size)))
        return notes

    def solve(self, W: Tensor, kept: Any) -> tuple[Quantized, Notes]:
        return awq.quantize_awq(W.float(), self.bits, self.group_size), {}


def divides(group_size: int, W: Tensor) -> bool:
    return group_size == -1 or W.shape[1] % group_size == 0


def clippable(names: Sequence[str]) -> list[str]:
    """All but queries and keys."""
    return [n for n in names if not n.rsplit(".", 1)[-1].startswith(NOT_CLIPPED)]


@torch.no_grad()
def scale_folds(step: Step, mine: Sequence[str], folds: Sequence[Fold], kept: MutableMapping[str, Any], bits: int,
                group_size: int) -> dict[str, Notes]:
    """Find the scale of each fold that is best for those of its readers that are rounded (`mine`), and fold it; `kept`
    follows. Readers that stay in 16 bits are scaled along, and not hurt."""
    notes = {}
    for fold in folds:
        readers = [n for n in fold.linears if n in mine]
        gram, W = kept[readers[0]], torch.cat([step.block.get_submodule(n).weight for n in readers]).float()
        if not divides(group_size, W):
            continue
        candidates = awq.candidate_scales(gram.x_mean(), awq.weight_saliency(W, group_size))
        best = awq.search_scale(candidates, awq.gram_loss(W, gram.H, bits, group_size))
        fold_scale(step.block, fold, best.scale)
        kept |= dict.fromkeys(fold.linears, gram.scaled(best.scale))
        step.folded |= dict.fromkeys(fold.linears, best.scale)
        notes[readers[0]] = {"ratio": best.ratio}
    return notes
