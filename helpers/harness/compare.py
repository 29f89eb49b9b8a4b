"""Variants through a measure, cell by cell: what was measured once is read, and only that is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers.files import code_hash, key_hash
from helpers.harness.variants import Original, Variant
from helpers.measure.quality import Judge, Scores
from helpers.measure.stats import mcnemar
from helpers.measure.tasks import Item
from helpers.results import machine, versions
from helpers.store import Cell, Store

HELPERS = Path(__file__).resolve().parents[1]
DECIDES = ("quantizers", "methods", "models", "measure", "toolkits", "harness")  # the rooms whose code a score depends on


@cache
def code() -> str:
    """A name for what the code of these rooms does."""
    return code_hash(*(HELPERS / room for room in DECIDES))


def circumstances() -> dict:
    """What decides a number beside the variant and the texts: code, versions, and the processor, whose sums round its way."""
    about = machine()
    return {"code": code(), "versions": versions(),
            "machine": [about[k] for k in ("cpu", "cpu_capability", "threads", "gpu")]}


@dataclass(frozen=True)
class Quality:
    """The scores of texts, against the unquantized model."""

    items: Sequence[Item] = field(repr=False)
    reference: Original = field(default_factory=Original)
    store: Store = field(default_factory=Store)
    device: str = "cpu"

    name: str = "quality"
    batch_tokens: int = 2048

    def __getstate__(self) -> dict:
        """Without the judge, and the model that it holds, for another process."""
        return {k: v for k, v in self.__dict__.items() if k != "judge"}

    @cached_property
    def judge(self) -> Judge:
        return Judge(self.items, self.reference.load(self.device), self.batch_tokens)

    @cached_property
    def key(self) -> dict:
        items = key_hash([[i.id, list(i.ids), i.start] for i in self.items])
        return {"measure": "quality", "device": self.device, "items": items, "batch_tokens": self.batch_tokens,
                "reference": self.reference.key(), **circumstances()}

    def cell(self, variant: Variant) -> Cell:
        """The scores of a variant, measured now if they are not stored."""
        return self.store.get(variant.name, self.key | {"variant": variant.key()}, lambda: self.of(variant))

    def of(self, variant: Variant) -> dict[str, np.ndarray]:
        """As named arrays, measured now."""
        return self.judge.score(variant.load(self.device)).arrays()

    def scores(self, variant: Variant) -> Scores:
        return Scores.of(self.cell(variant).arrays)


def summary(scores: Mapping[str, Scores], full: Scores) -> dict[str, dict[str, Any]]:
    """What sets each variant apart from the unquantized model, on the answers: KL and change of loss (nats/token) with
    intervals, share of right answers, and how many were lost and won."""
    found = {}
    for name, s in scores.items():
        if not np.array_equal(s.ids, full.ids):
            raise ValueError(f"{name} was not scored on the same texts as the unquantized model")
        flips = mcnemar(full.exact, s.exact)
        found[name] = {"kl": s.answer.kl_interval(), "delta_nll": s.answer.delta_nll(full.answer),
                       "exact": float(s.exact.mean()), "lost": flips.lost, "won": flips.won}
    return found


def shown(found: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """A `summary` to read, with a verdict on the loss at this number of texts."""
    return pd.DataFrame({name: {
        "KL (nats/token)": str(row["kl"]), "ΔNLL (nats/token)": str(row["delta_nll"]), "exact": f"{row['exact']:.1%}",
        "lost / won": f"{row['lost']} / {row['won']}", "loss": row["delta_nll"].verdict()} for name, row in found.items()}).T
