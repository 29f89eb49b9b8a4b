"""AWQ's scales, which even out the inputs, then GPTQ on asymmetric grids; before symmetric ones they can harm (chapter 12)."""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from helpers.methods.awq import scale_folds
from helpers.methods.gptq import Gptq
from helpers.models.layers import Fold
from helpers.models.method import Notes
from helpers.models.walk import Step


@dataclass(frozen=True)
class AwqGptq(Gptq):
    """GPTQ after AWQ's scaling; without clipping, which GPTQ's feedback would work against."""

    name: ClassVar[str] = "awq+gptq"
    prepares: ClassVar[bool] = True
    folds: ClassVar[bool] = True
    sym: bool = field(default=False, metadata={"help": "a symmetric grid, without zero points (chapter 3)"})

    def prepare(self, step: Step, mine: Sequence[str], folds: Sequence[Fold], kept: MutableMapping[str, Any]
                ) -> dict[str, Notes]:
        return scale_folds(step, mine, folds, kept, self.bits, self.group_size)
