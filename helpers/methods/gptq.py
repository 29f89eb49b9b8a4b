"""GPTQ: rounding with error feedback through the Gram matrix of a linear's inputs."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from helpers.methods.rtn import Rtn
from helpers.models.formats import AWQ
from helpers.models.method import Format, Gram, Notes, PlanError
from helpers.quantizers.affine import Quantized
from helpers.quantizers.gptq import gptq

# As auto-gptq has it: scales fitted to the range of each group, columns in the order as they are
PLAIN = {"search": False, "act_group_aware": False}
SETTINGS = ("bits", "group_size", "sym", "desc_act", "act_group_aware", "damp_percent", "search")


@dataclass(frozen=True)
class Gptq(Rtn):
    """GPTQ (`helpers/quantizers/gptq.py`)."""

    name: ClassVar[str] = "gptq"
    keeps: ClassVar[type[Gram]] = Gram
    calibrated: ClassVar[bool] = True
    stacks: ClassVar[bool] = True
    desc_act: bool = field(default=False, metadata={"help": "columns of the largest inputs first (chapter 5)"})
    act_group_aware: bool = field(default=True, metadata={
        "help": "largest inputs first inside of each group, and groups by theirs; desc_act overrides it (chapter 5)"})
    damp_percent: float = field(default=0.01, metadata={"help": "damping, as a share of the mean diagonal (chapter 5)"})
    search: bool = field(default=True, metadata={"help": "scales of least output error, not of the range (chapter 5)"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damp_percent <= 1:
            raise PlanError(f"damp_percent: expected a share from 0 to 1 of the mean diagonal, got {self.damp_percent}")

    def formats(self) -> tuple[Format, ...]:
        return tuple(f for f in super().formats() if not (self.desc_act and f is AWQ))  # which has no order of columns

    def solve(self, W: Tensor, kept: Gram, **instead: Any) -> tuple[Quantized, Notes]:
        found = gptq(W, kept.H, **{k: getattr(self, k) for k in SETTINGS} | instead)
        return found.quantized, {"damp_percent": found.damp_percent}
