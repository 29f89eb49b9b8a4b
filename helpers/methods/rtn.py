"""Round to nearest: the baseline, which looks at nothing but the weights of a group."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from helpers.models.formats import AWQ, GPTQ, GPTQ_V2
from helpers.models.method import Format, Method, Notes
from helpers.quantizers.affine import Quantized, fit_qparams, on_grid


@dataclass(frozen=True)
class Rtn(Method):
    """Rounding to nearest on a uniform grid."""

    name: ClassVar[str] = "rtn"
    bits: int = field(default=4, metadata={"help": "bits a weight, 2 to 8 (chapter 3)"})
    group_size: int = field(default=128, metadata={"help": "weights that share a scale, -1 for a whole row (chapter 3)",
                                                   "aliases": ["--group"]})
    sym: bool = field(default=True, metadata={"help": "a symmetric grid, without zero points (chapter 3)"})

    def formats(self) -> tuple[Format, ...]:
        return (GPTQ, GPTQ_V2) if self.sym else (AWQ, GPTQ_V2) if self.bits == 4 else (GPTQ_V2,)

    def solve(self, W: Tensor, kept: Any) -> tuple[Quantized, Notes]:
        return on_grid(W, fit_qparams(W, self.bits, self.group_size, self.sym)), {}
