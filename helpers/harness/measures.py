"""What is measured of a variant beside the scores of texts: the form of its answers, its memory, its latency."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from functools import cached_property

import numpy as np
from transformers import AutoTokenizer

from helpers.files import key_hash
from helpers.harness.compare import circumstances
from helpers.harness.variants import Original, Variant
from helpers.measure.answers import form, prompt_ids, said
from helpers.measure.latency import interleaved, kernels
from helpers.measure.memory import peaks
from helpers.measure.tasks import Example
from helpers.store import Cell, Store


def as_served(variant: Variant) -> Variant:
    """The variant with its library's own kernels, where it is a file that was to be dequantized exactly."""
    return replace(variant, exact=False) if is_dataclass(variant) and getattr(variant, "exact", False) else variant


@dataclass(frozen=True)
class Form:
    """The form of generated answers: whether they parse, hold their schema, end, and do not loop."""

    asked: Sequence[Example] = field(repr=False)
    reference: Original
    device: str = "cpu"
    new_tokens: int = 64
    name: str = "form"

    @cached_property
    def key(self) -> dict:
        return {"measure": self.name, "device": self.device, "new_tokens": self.new_tokens,
                "asked": key_hash([vars(e) for e in self.asked]), "wording": self.reference.wording, **circumstances()}

    def of(self, variant: Variant) -> dict[str, np.ndarray]:
        tokenizer = AutoTokenizer.from_pretrained(self.reference.folder)
        prompts = [prompt_ids(tokenizer, e) for e in self.asked]
        return form(said(variant.load(self.device), tokenizer, prompts, max_new_tokens=self.new_tokens), self.asked)


@dataclass(frozen=True)
class Memory:
    """The most that loading, prefill and decode hold, in a process of its own, with the library's own kernels."""

    prompt_tokens: int = 128
    new_tokens: int = 8
    device: str = "cpu"
    name: str = "memory"

    @cached_property
    def key(self) -> dict:
        return {"measure": self.name, "tokens": [self.prompt_tokens, self.new_tokens], "device": self.device, **circumstances()}

    def of(self, variant: Variant) -> dict[str, np.ndarray]:
        found = peaks(Loading(as_served(variant), self.device), self.prompt_tokens, self.new_tokens, self.device)
        return {k: np.array(v) for k, v in found.items()}


@dataclass(frozen=True)
class Loading:
    """Loads a variant; picklable, so that another process can do it."""

    variant: Variant
    device: str

    def __call__(self):
        return self.variant.load(self.device)


@dataclass(frozen=True)
class Latency:
    """TTFT, ITL and E2E of one request at a time, all variants in turn; as many prompts as `seconds` allow."""

    prompts: Sequence[Sequence[int]] = field(repr=False)
    new_tokens: int = 6
    seconds: float = 30
    device: str = "cpu"
    name: str = "latency"

    def cell(self, variants: Sequence[Variant], store: Store, progress: bool = False) -> Cell:
        """The times of these variants, which are a pair each time, measured now if they are not stored."""
        key = {"measure": self.name, "prompts": key_hash([list(p) for p in self.prompts]), "new_tokens": self.new_tokens,
               "seconds": self.seconds, "device": self.device, "variants": [as_served(v).key() for v in variants],
               **circumstances()}
        return store.get("latency", key, lambda: self.of(variants, progress))

    def of(self, variants: Sequence[Variant], progress: bool = False) -> dict[str, np.ndarray]:
        models = {v.name: as_served(v).load(self.device) for v in variants}
        started = time.perf_counter()
        interleaved(models, self.prompts[:2], self.new_tokens, warm_up=1)
        a_round = (time.perf_counter() - started) / 3
        prompts = self.prompts[:max(3, int(self.seconds / a_round))]
        times = interleaved(models, prompts, self.new_tokens, progress=progress)
        arrays = {f"{n} {what}": values for n, v in enumerate(variants) for what, values in times[v.name].items()}
        names = {f"{n} kernels": np.array([f"{count} x {k}" for k, count in kernels(models[v.name]).items()])
                 for n, v in enumerate(variants)}
        return arrays | names

    @staticmethod
    def times(cell: Cell, n: int) -> Mapping[str, np.ndarray]:
        """What the cell holds of the n-th variant: ttft_ms, e2el_ms [rounds], itl_ms [rounds, tokens], and kernels."""
        return {k.split(" ", 1)[1]: v for k, v in cell.arrays.items() if k.startswith(f"{n} ")}
