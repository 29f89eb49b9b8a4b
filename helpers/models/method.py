"""What a method is, and a plan: which method each linear of a model gets.

A new method is one file: a frozen dataclass that extends `Method`. Its fields are its settings; nothing else names it.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from helpers.models.layers import Fold

Notes = dict[str, Any]  # what a method has to say of a linear: the damping it took, the scale it chose


class PlanError(ValueError):
    """A plan or a method's settings that cannot be carried out."""


class Codes(Protocol):
    """A quantized weight."""

    def dequantize(self) -> Tensor:
        """W_hat [out, in]."""

    def stored(self) -> "Codes":
        """As a file has it, with its scales rounded: `stored().dequantize()` is what is judged, because it is what ships."""

    def split(self, rows: Sequence[int]) -> "Iterator[Codes]":
        """The parts of a stacked weight; needed where `Method.stacks`."""


@dataclass
class Gram:
    """What calibration keeps of the inputs X [tokens, in] of a linear."""

    H: Tensor  # X^T X, fp32 [in, in]
    absolute: Tensor  # sum of |x|, fp32 [in]
    tokens: int = 0

    @classmethod
    def of(cls, width: int, device: torch.device | str = "cpu") -> "Gram":
        return cls(torch.zeros(width, width, device=device), torch.zeros(width, device=device))

    def add(self, X: Tensor) -> None:
        X = X.flatten(0, -2).float()
        self.H.addmm_(X.T, X)
        self.absolute += X.abs().sum(0)
        self.tokens += len(X)

    def x_mean(self) -> Tensor:
        """Mean |x| of each channel."""
        return self.absolute / self.tokens

    def scaled(self, s: Tensor) -> "Gram":
        """That of X / s."""
        return Gram(self.H / s / s[:, None], self.absolute / s, self.tokens)


@dataclass(frozen=True)
class Method:
    """How a weight is quantized: what it must know of the inputs, what it does to a block first, and its codes."""

    name: ClassVar[str]  # in records, plots and on the command line
    keeps: ClassVar[type[Gram] | None] = None  # what `solve` and `prepare` are given of a linear's inputs
    stacks: ClassVar[bool] = False  # linears that share an input may go through `solve` as one
    calibrated: ClassVar[bool] = False  # `solve` looks at the inputs
    prepares: ClassVar[bool] = False  # `prepare` does, once all inputs of the block were seen
    folds: ClassVar[bool] = False  # by scaling inputs, for all that read them
    aims: ClassVar[bool] = False  # `prepare` wants the unquantized model's outputs of the block (Step.aim)
    stays: ClassVar[bool] = False  # nothing is quantized
    inputs: ClassVar[str | None] = None  # the one value of `Plan.inputs` that it can work with
    reference: ClassVar[bool] = False  # another library's arithmetic, for comparison, not for use
    at_once: ClassVar[int] = 4096  # tokens in a calibration batch
    known: ClassVar[dict[str, "type[Method]"]] = {}  # by name, for command lines

    def __init_subclass__(cls) -> None:
        Method.known[cls.name] = cls

    def __post_init__(self) -> None:
        """The settings that several methods have."""
        bits, group = getattr(self, "bits", 4), getattr(self, "group_size", 128)
        if bits not in range(2, 9):
            raise PlanError(f"bits: expected 2 to 8, got {bits}")
        if group != -1 and group < 1:
            raise PlanError(f"group_size: expected a positive number, or -1 for one group a row, got {group}")

    def formats(self) -> tuple["Format", ...]:
        """The file formats that hold its codes, the preferred one first; none: it can only be simulated."""
        return ()

    def prepare(self, step: Any, mine: Sequence[str], folds: Sequence[Fold], kept: MutableMapping[str, Any]
                ) -> dict[str, Notes]:
        """Change the weights of `step.block` before they are quantized, and `kept` with them. `mine`: the linears of this
        method; `folds`: those whose readers are all its own, or stay in 16 bits."""
        return {}

    def solve(self, W: Tensor, kept: Any) -> tuple[Codes | None, Notes]:
        """Codes of a weight [out, in]; None: it stays in 16 bits. Raises GroupSizeError, which comes to the same."""
        raise NotImplementedError

    def key(self) -> dict:
        """Name and settings."""
        return {"method": self.name, **asdict(self)}

    @staticmethod
    def of(key: Mapping) -> "Method":
        """The inverse of `key`; raises PlanError for a method or a setting that is not known."""
        settings = dict(key) if isinstance(key, Mapping) else {}
        if (known := Method.known.get(str(name := settings.pop("method", None)))) is None:
            raise PlanError(f"method: {name!r} is none of {', '.join(sorted(Method.known))}")
        try:
            method = known(**settings)
        except TypeError as error:
            raise PlanError(f"method: {name}: {error}") from error
        for f in fields(method):
            kinds = (int, float) if isinstance(f.default, float) else (type(f.default),)
            if type(value := getattr(method, f.name)) not in kinds:
                raise PlanError(f"method: {name}: {f.name}: expected a {type(f.default).__name__}, got {value!r}")
        return method

    def __str__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{self.name}({', '.join(changed)})" if changed else self.name


class Format(Protocol):
    """How a quantized linear lies in a file: the tensors it has, their packing, and the settings for config.json."""

    name: str
    mixes: bool  # bits and group size may differ between linears

    def specs(self, rows: int, columns: int, method: Any) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """{end of the tensor's name: (dtype, shape)} of a linear; `method` has the settings that decide it (bits, group)."""

    def pack(self, codes: Codes) -> dict[str, Tensor]:
        """The tensors of a linear; raises ValueError for what the format cannot hold."""

    def unpack(self, tensors: Mapping[str, Tensor], method: Any) -> Codes:
        """The inverse of `pack`, for files of any toolkit; raises ValueError naming a tensor with a value out of range."""

    def settings(self, plan: "Plan", left: Sequence[str], quantized: Sequence[str], apart: Sequence[str] = ()) -> dict:
        """`quantization_config`; `left` are linears inside of the blocks that stay in 16 bits, `apart` those outside."""

    def reads(self, settings: Mapping) -> bool:
        """Whether a `quantization_config` is this format's."""


@dataclass(frozen=True)
class Plan:
    """A default method, and rules (pattern, method): the first whose regular expression is found in a linear's name decides.

    `inputs` is what linears are calibrated on: the outputs of all that is quantized already, group by group ("group", the
    toolkits' true_sequential); of the quantized blocks before ("block", two forward passes, and less memory); or those of
    the unquantized model ("model", which lets many plans share one calibration).
    """

    default: Method
    rules: tuple[tuple[str, Method], ...] = ()
    inputs: Literal["group", "block", "model"] = "group"

    def __post_init__(self) -> None:
        rules = tuple(self.rules.items() if isinstance(self.rules, Mapping) else self.rules)
        object.__setattr__(self, "rules", rules)
        if self.inputs not in ("group", "block", "model"):
            raise PlanError(f"inputs: expected group, block or model, got {self.inputs!r}")
        for method in self.methods():
            if not isinstance(method, Method):
                raise PlanError(f"a plan is made of methods, got {method!r}: say Gptq(bits=4), not its name")
            if method.inputs not in (None, self.inputs):
                raise PlanError(f"{method} works on inputs of the {method.inputs} alone: Plan(..., inputs={method.inputs!r})")
        for pattern, _ in rules:
            try:
                re.compile(".*(?:" + pattern + ").*")  # as it stands in the settings of a file
            except (re.error, TypeError) as error:
                raise PlanError(f"rules: {pattern!r} is no regular expression: {error}") from error

    @classmethod
    def of(cls, plan: "Plan | Method") -> "Plan":
        """A plan, or a method for all linears."""
        return plan if isinstance(plan, Plan) else cls(plan, inputs=getattr(plan, "inputs", None) or "group")

    def methods(self) -> list[Method]:
        return [self.default, *(method for _, method in self.rules)]

    def at(self, name: str) -> Method:
        """The method of a linear."""
        return next((method for pattern, method in self.rules if re.search(pattern, name)), self.default)

    def check_names(self, names: Iterable[str]) -> None:
        """Raises PlanError for a rule that matches none of a model's linears: it would do nothing, in silence."""
        names = list(names)
        for pattern, _ in self.rules:
            if not any(re.search(pattern, n) for n in names):
                raise PlanError(f"rules: {pattern!r} matches no linear; there are {names[0]} to {names[-1]}")

    def formats(self) -> list[Format]:
        """The formats that hold all of its methods, in the order of the first; those that leave 16 bits fit everywhere."""
        methods = [m for m in self.methods() if not m.stays]
        each = [m.formats() for m in methods]
        alike = len({(getattr(m, "bits", 0), getattr(m, "group_size", 0)) for m in methods}) < 2
        return [f for f in (each[0] if each else ()) if all(f in other for other in each) and (alike or f.mixes)]

    def key(self) -> dict:
        """All that decides what it does."""
        return {"default": self.default.key(), "rules": [[p, m.key()] for p, m in self.rules], "inputs": self.inputs}

    @classmethod
    def parse(cls, key: Mapping) -> "Plan":
        """The inverse of `key`; raises PlanError."""
        try:
            rules = tuple((pattern, Method.of(method)) for pattern, method in key["rules"])
            return cls(Method.of(key["default"]), rules, key["inputs"])
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"plan: expected default, rules and inputs: {error!r}") from error

    def __str__(self) -> str:
        rules = "".join(f", {p}: {m}" for p, m in self.rules)
        return f"{self.default}{rules}" + ("" if self.inputs == "group" else f", on inputs of the {self.inputs}")


@dataclass
class Outcome:
    """What became of a model: codes by linear as files have them, weights left in 16 bits, and what there is to note."""

    codes: dict[str, Codes] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    notes: dict[str, Notes] = field(default_factory=dict)
    tokens: int = 0

    def noted(self, what: str) -> dict[str, Any]:
        """One of the notes, by linear: error_db (of the output, on the calibration inputs), damp_percent, ratio."""
        return {name: notes[what] for name, notes in self.notes.items() if what in notes}
