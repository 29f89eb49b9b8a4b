"""AWQ's scales before GPTQ: the inputs are evened out first, and the weights that then remain go through GPTQ."""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
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

    def prepare(self, step: Step, mine: Sequence[str], folds: Sequence[Fold], kept: MutableMapping[str, Any]
                ) -> dict[str, Notes]:
        return scale_folds(step, mine, folds, kept, self.bits, self.group_size)
