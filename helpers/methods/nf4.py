"""NF4: sixteen normal quantiles, in blocks, with double quantization; what bitsandbytes makes is the default."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from helpers.models.formats import NF4_FORMAT
from helpers.models.method import Format, Method, Notes, PlanError
from helpers.quantizers.nf4 import NF4, quantize_nf4


class SingleNF4(NF4):
    """NF4 with absmax left in fp32."""

    __slots__ = ()

    def stored(self) -> "SingleNF4":
        return self


@dataclass(frozen=True)
class Nf4(Method):
    """The grid of sixteen normal quantiles (chapter 4)."""

    name: ClassVar[str] = "nf4"
    block_size: int = field(default=64, metadata={"help": "weights that share an absmax; files have 64 (chapter 4)"})
    double: bool = field(default=True, metadata={"help": "double quantization of absmax, as files have it (chapter 4)"})

    def __post_init__(self) -> None:
        if self.block_size < 8 or self.block_size % 8:
            raise PlanError(f"block_size: expected a multiple of 8, got {self.block_size}")

    def formats(self) -> tuple[Format, ...]:
        return (NF4_FORMAT,) if self.block_size == 64 and self.double else ()

    def solve(self, W: Tensor, kept: Any) -> tuple[NF4, Notes]:
        found = quantize_nf4(W, self.block_size)
        return (found if self.double else SingleNF4(*found)), {}
