"""What is asked of a quantization, and what became of it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace

from helpers.quantizers.affine import Quantized
from helpers.quantizers.nf4 import NF4

METHODS = ("rtn", "gptq", "awq", "awq+gptq", "nf4")


@dataclass(frozen=True)
class Scheme:
    """How the linears of a model are quantized.

    `overrides` maps a regular expression on a linear's name to other settings for it, or to None: it stays in 16 bits.
    `search` looks for the group scales of least output error. `reference` follows the archived toolkits number for number
    (gptq: auto-gptq; awq: autoawq, with autoawq's objective, the block's output). `scale` and `clip` are the halves of AWQ.
    """

    method: str = "gptq"
    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    damp_percent: float = 0.01
    search: bool = False
    scale: bool = True
    clip: bool = True
    true_sequential: bool = True
    reference: bool = False
    overrides: Mapping[str, Mapping | None] = field(default_factory=dict)

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {METHODS}, got {self.method!r}")
        if self.reference and self.method not in ("gptq", "awq"):
            raise ValueError(f"reference: there is no toolkit to follow for {self.method!r}, only for gptq and awq")
        if self.bits not in range(2, 9):
            raise ValueError(f"bits: expected 2 to 8, got {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group_size: expected a positive number, or -1 for one group a row, got {self.group_size}")
        if not 0 <= self.damp_percent <= 1:
            raise ValueError(f"damp_percent: expected a share from 0 to 1 of the mean diagonal, got {self.damp_percent}")
        for pattern, settings in self.overrides.items():
            if unknown := set(settings or ()) - {f.name for f in fields(self)}:
                raise ValueError(f"overrides: {pattern!r} sets {sorted(unknown)}, which Scheme does not have")
            replace(self, overrides={}, **(settings or {}))

    def check_names(self, names: Iterable[str]) -> None:
        """Raises ValueError for an override that matches none of a model's linears: it would do nothing, in silence."""
        names = list(names)
        for pattern in self.overrides:
            if not any(re.search(pattern, n) for n in names):
                raise ValueError(f"overrides: {pattern!r} matches no linear; there are {names[0]} to {names[-1]}")

    def at(self, name: str) -> "Scheme | None":
        """The settings for one linear; the first override that matches decides."""
        for pattern, settings in self.overrides.items():
            if re.search(pattern, name):
                return None if settings is None else replace(self, **settings)
        return self


@dataclass
class Outcome:
    """What became of a model: codes by linear, linears left in 16 bits, output error in dB, damping that GPTQ took."""

    codes: dict[str, Quantized | NF4] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    error_db: dict[str, float] = field(default_factory=dict)
    damp_percent: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
