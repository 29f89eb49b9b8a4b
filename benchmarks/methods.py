"""Methods that are there to be measured: they show why a method works, and no file format needs to hold them."""

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from helpers.methods.awq_gptq import AwqGptq
from helpers.methods.gptq import Gptq
from helpers.methods.gptq_signround import GptqSignRound
from helpers.methods.rtn import Rtn
from helpers.models.method import Gram, Notes
from helpers.quantizers.affine import Quantized


class Mixed(NamedTuple):
    """A rounded weight with some columns as they were."""

    W_hat: Tensor

    def dequantize(self) -> Tensor:
        return self.W_hat

    def stored(self) -> "Mixed":
        return self


@dataclass(frozen=True)
class LargestInputs(Rtn):
    """The observation that AWQ starts from (Lin et al. 2023, table 1): rounding, but the columns of the largest inputs stay
    in 16 bits. No file format has them, so `formats` is empty."""

    name: ClassVar[str] = "rtn, largest inputs in 16 bits"
    keeps: ClassVar[type[Gram]] = Gram
    calibrated: ClassVar[bool] = True
    share: float = 0.01
    least: int = 4  # the outlier variant has 4

    def formats(self) -> tuple:
        return ()

    def solve(self, W: Tensor, kept: Gram) -> tuple[Mixed, Notes]:
        W_hat = super().solve(W, kept)[0].stored().dequantize()
        largest = kept.x_mean().topk(max(self.least, round(self.share * W.shape[1]))).indices
        W_hat[:, largest] = W[:, largest].float()
        return Mixed(W_hat), {}


class AfterFirst(Gram):
    """A Gram matrix without the first token of each sequence."""

    def add(self, X: Tensor) -> None:
        super().add(X[:, 1:])
        self.tokens += len(X)  # they went by, all the same


@dataclass(frozen=True)
class GptqAfterFirst(Gptq):
    """GPTQ that does not see first tokens, on which attention rests and whose inputs are unlike all others."""

    name: ClassVar[str] = "gptq without first tokens"
    keeps: ClassVar[type[Gram]] = AfterFirst


@dataclass
class FirstBeside(Gram):
    """A Gram matrix, and beside it those of first tokens and of all others: their difference would be mostly rounding."""

    first: Tensor = field(default_factory=lambda: torch.zeros(()))  # fp32 [in, in]
    rest: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, X: Tensor) -> None:
        super().add(X)
        first, rest = X[:, 0].float(), X[:, 1:].flatten(0, -2).float()
        self.first, self.rest = self.first.to(X.device) + first.T @ first, self.rest.to(X.device) + rest.T @ rest


@dataclass(frozen=True)
class GptqBesideFirst(Gptq):
    """GPTQ that may or may not see first tokens, linear by linear, where several share their input."""

    name: ClassVar[str] = "gptq, first tokens apart"
    keeps: ClassVar[type[Gram]] = FirstBeside
    first: bool = True

    def solve(self, W: Tensor, kept: FirstBeside) -> tuple[Quantized, Notes]:
        return super().solve(W, kept if self.first else Gram(kept.rest, kept.absolute, kept.tokens))


@dataclass(frozen=True)
class GptqFirstCounted(Gptq):
    """GPTQ to which a first token, to which all later ones attend, is as many tokens."""

    name: ClassVar[str] = "gptq, first tokens counted more"
    keeps: ClassVar[type[Gram]] = FirstBeside
    times: int = 16

    def solve(self, W: Tensor, kept: FirstBeside) -> tuple[Quantized, Notes]:
        return super().solve(W, Gram(kept.rest + self.times * kept.first, kept.absolute, kept.tokens))


@dataclass(frozen=True)
class AwqGptqFirstCounted(AwqGptq, GptqFirstCounted):
    """The same after AWQ's scales, which are searched with every token counted once."""

    name: ClassVar[str] = "awq+gptq, first tokens counted more"


@dataclass(frozen=True)
class GptqMedian(Gptq):
    """GPTQ damped by a share of the median of H's diagonal, which a few loud channels do not move, instead of the mean."""

    name: ClassVar[str] = "gptq, damped by the median"

    def solve(self, W: Tensor, kept: Gram) -> tuple[Quantized, Notes]:
        diagonal = kept.H.diagonal()
        return super().solve(W, kept, damp_percent=self.damp_percent * float(diagonal.median() / diagonal.mean()))


@dataclass(frozen=True)
class GptqOneWay(Gptq):
    """GPTQ whose symmetric grids all have their longer side below zero, as auto-gptq's: searched scales are positive."""

    name: ClassVar[str] = "gptq, scales above zero"

    def solve(self, W: Tensor, kept: Gram) -> tuple[Quantized, Notes]:
        return super().solve(W, kept, negative=False)


@dataclass(frozen=True)
class SignRound(GptqSignRound):
    """Learned roundings in smaller batches, for a comparison that takes a quarter of an hour a row."""

    name: ClassVar[str] = "signround by shares, best"
    at_once: ClassVar[int] = 1024


@dataclass(frozen=True)
class SignRoundToTheEnd(SignRound):
    """What is there after the last step, whatever other windows say of it."""

    name: ClassVar[str] = "signround by shares, to the end"

    @staticmethod
    def pick(trail, key):
        *_, last = trail
        return last


@dataclass(frozen=True)
class SignRoundBySquares(SignRound):
    """By plain squared errors, as SignRound has it."""

    name: ClassVar[str] = "signround by squares, best"
    distance = staticmethod(mse_loss)


@dataclass(frozen=True)
class SignRoundBySquaresToTheEnd(SignRoundBySquares, SignRoundToTheEnd):
    """Both."""

    name: ClassVar[str] = "signround by squares, to the end"
