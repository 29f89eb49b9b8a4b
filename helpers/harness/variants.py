"""What is compared: the original, an artefact of a toolkit, an artefact of ours, a simulation; one interface for all."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from inspect import getsource
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from helpers.files import PROVENANCE, file_hash, folder_hash, key_hash, wording_hash
from helpers.measure.bytes import bits_a_weight, measured_bytes, predicted_bytes, weights_inside
from helpers.methods.keep import Keep
from helpers.models.formats import FORMATS
from helpers.models.method import Method, Plan
from helpers.models.quantize import quantized
from helpers.models.reading import load_simulated
from helpers.models.source import Loaded, load, resolve
from helpers.toolkits import artefacts


class Variant(Protocol):
    """One model that can be loaded, measured, and told from every other by its key."""

    name: str

    @property
    def plan(self) -> Plan | None:
        """How it is quantized; None for a file that does not say."""

    @property
    def config(self) -> PretrainedConfig:
        """Of the model: its shapes."""

    def key(self) -> dict[str, Any]:
        """All that decides its weights."""

    def load(self, device: str = "cpu") -> PreTrainedModel:
        """The model, ready to be asked."""

    def predicted(self) -> int | None:
        """Bytes of its weights, from the config and the plan alone; None for what no format holds."""

    def measured(self) -> int | None:
        """Bytes of its weights on disk; None for what is only simulated."""


def kind(variant: Variant) -> str:
    """The method's name, by which figures choose colours."""
    if isinstance(variant, ToolkitArtefact):
        return artefacts.ARTEFACTS[variant.artefact].method
    return variant.plan.default.name if variant.plan else variant.name


def bits(variant: Variant) -> float:
    """Bits for each weight inside the blocks; of a file that does not say, from its bytes."""
    if variant.plan is not None and (variant.plan.formats() or all(m.stays for m in variant.plan.methods())):
        return bits_a_weight(variant.config, variant.plan)
    saved = predicted_bytes(variant.config) - (variant.measured() or predicted_bytes(variant.config))
    return 16 - 8 * saved / weights_inside(variant.config)


@lru_cache(maxsize=2)
def loaded(model: str, revision: str | None, dtype: str, device: str) -> Loaded:
    """A model and its tokenizer, kept for the next to ask; whoever changes the model takes a copy."""
    return load(model, revision, dtype, device)


@dataclass(frozen=True)
class Original:
    """The unquantized model; `change`, a function, makes another of it that counts as unquantized too (outliers)."""
    model: str = "bundled"
    revision: str | None = None
    dtype: str = "float32"
    change: Callable[[nn.Module], nn.Module] | None = None
    name: str = "16 bits"

    plan: ClassVar[Plan] = Plan(Keep())
    weights = cached_property(lambda self: folder_hash(self.folder))  # once: the key of every cell has it
    wording = cached_property(lambda self: wording_hash(self.folder))

    @property
    def folder(self) -> Path:
        return resolve(self.model, self.revision)

    @property
    def config(self) -> PretrainedConfig:
        return AutoConfig.from_pretrained(self.folder)

    def key(self) -> dict[str, Any]:
        change, config = self.change and key_hash(getsource(self.change)), file_hash(self.folder / "config.json")
        return {"weights": self.weights, "config": config, "dtype": self.dtype, "change": change}

    def load(self, device: str = "cpu") -> PreTrainedModel:
        model = loaded(self.model, self.revision, self.dtype, device).model
        return self.change(copy.deepcopy(model)) if self.change else model

    def predicted(self) -> int:
        return predicted_bytes(self.config)

    def measured(self) -> int:
        return measured_bytes(self.folder)


class InFolder:
    """What variants that are files have in common. `exact` dequantizes the file instead of calling the toolkit's kernel."""

    folder: Path
    exact: bool

    @property
    def config(self) -> PretrainedConfig:
        return AutoConfig.from_pretrained(self.folder)

    def key(self) -> dict[str, Any]:
        return {"artefact": folder_hash(self.folder), "config": file_hash(self.folder / "config.json"), "exact": self.exact}

    def load(self, device: str = "cpu") -> PreTrainedModel:
        return load_simulated(self.folder, device) if self.exact else artefacts.reload(self.folder, device)

    def measured(self) -> int:
        return measured_bytes(self.folder)


@dataclass(frozen=True)
class ToolkitArtefact(InFolder):
    """What a toolkit makes of a model, by a name of `ARTEFACTS`; it is run now, in its own process, if it has not been."""

    artefact: str
    model: str = "bundled"
    revision: str | None = None
    rebuild: bool = False
    exact: bool = False
    label: str | None = None
    windows: int = artefacts.MOST

    @property
    def name(self) -> str:
        return self.label or self.artefact

    @cached_property
    def folder(self) -> Path:
        return artefacts.artefact(self.artefact, self.model, self.rebuild, self.revision, self.windows)

    @property
    def plan(self) -> Plan:
        return Plan.of(artefacts.plan_of(self.artefact, AutoConfig.from_pretrained(resolve(self.model, self.revision))))

    def predicted(self) -> int:
        return predicted_bytes(AutoConfig.from_pretrained(resolve(self.model, self.revision)), self.plan)


@dataclass(frozen=True)
class OurArtefact(InFolder):
    """A folder that `quantize_to` wrote."""

    name: str
    folder: Path
    plan: Plan | Method
    exact: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "plan", Plan.of(self.plan))

    def predicted(self) -> int:
        form = json.loads((self.folder / PROVENANCE).read_text())["format"]
        return predicted_bytes(self.config, self.plan, next(f for f in FORMATS if f.name == form))


@dataclass(frozen=True)
class Folder(InFolder):
    """A quantized model that somebody else made, in a folder of which nothing else is known."""

    name: str
    folder: Path
    exact: bool = False
    plan: ClassVar[None] = None

    def predicted(self) -> None:
        return None


@dataclass(frozen=True)
class Missing:
    """Stands in for a variant that could not be made; whoever asks for more than its name is told why."""

    name: str
    plan: Plan | None
    base: Original
    why: Exception

    @property
    def config(self) -> PretrainedConfig:
        return self.base.config

    def key(self, *_) -> dict[str, Any]:
        raise self.why
    load = key

    def predicted(self) -> None:
        return None

    measured = predicted


@dataclass(frozen=True)
class Simulation:
    """A model quantized in memory: the weights that a file would give back, in a model that needs no toolkit.

    `head`: a method for the output head, which files keep in 16 bits; `dtype`: what it is computed in.
    """

    name: str
    plan: Plan | Method
    tokens: Sequence[Sequence[int]] = field(default=(), repr=False)
    base: Original = field(default_factory=Original)
    head: Method | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "plan", Plan.of(self.plan))

    @property
    def config(self) -> PretrainedConfig:
        return self.base.config

    def key(self) -> dict[str, Any]:
        # the code of our own methods is in the key of every cell; that of one from outside is not
        outside = [getsource(type(m)) for m in self.plan.methods() if not type(m).__module__.startswith("helpers.")]
        return {"base": self.base.key(), "plan": self.plan.key(), "tokens": key_hash([list(t) for t in self.tokens]),
                "head": self.head and self.head.key(), "dtype": self.dtype} | ({"code": key_hash(outside)} if outside else {})

    def load(self, device: str = "cpu") -> PreTrainedModel:
        model = quantized(self.base.load(device), self.plan, self.tokens)
        if self.head is not None:
            head = model.get_output_embeddings()  # a weight of its own, where the embedding is the same one
            W_hat = self.head.solve(head.weight.detach(), None)[0].stored().dequantize()
            head.weight = nn.Parameter(W_hat.to(head.weight.dtype), requires_grad=False)
        return model if self.dtype is None else model.to(getattr(torch, self.dtype))

    def predicted(self) -> int | None:
        return predicted_bytes(self.config, self.plan) if self.plan.formats() else None

    def measured(self) -> None:
        return None
