"""Eight bits, one scale a row: the weights of bitsandbytes' LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339).

At run time bitsandbytes rounds the activations to 8 bits too, but for outlier columns; what is simulated here does not.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from helpers.models.formats import INT8, Int8
from helpers.models.method import Format, Method, Notes
from helpers.quantizers.affine import check


@dataclass(frozen=True)
class RowInt8(Method):
    """Each row divided by its largest magnitude, to the nearest of 255 values."""

    name: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8

    def formats(self) -> tuple[Format, ...]:
        return (INT8,)

    def solve(self, W: Tensor, kept: Any) -> tuple[Int8, Notes]:
        check(W, 8, -1)
        absmax = W.float().abs().amax(1)
        codes = torch.round(W.float() * (127 / absmax.clamp(min=1e-38))[:, None]).clamp(-127, 127).to(torch.int8)
        return Int8(codes, absmax), {}
