"""The sensitivity map of a model, cell by cell: each layer quantized alone, or raised in a model that is quantized.

A run that was stopped goes on at the cell it was at. Cells of other weights, texts, code or versions have other keys.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from helpers.files import key_hash
from helpers.harness.compare import circumstances
from helpers.harness.variants import Original, Simulation
from helpers.measure.sensitivity import EMBEDDING, HEAD, Arrays, Panel, downwards, upwards
from helpers.measure.stats import Interval, mcnemar, ratio_interval
from helpers.measure.tasks import Item
from helpers.models.layers import blocks_of, linears
from helpers.models.method import Method, Plan, PlanError
from helpers.models.source import shell
from helpers.quantizers.affine import GroupSizeError
from helpers.results import RESULTS
from helpers.store import Cell, Store, unbundle

SHARED = ("id", "task", "answer_tokens")
FULL = "16 bits"
OWN = ("weight_error", "output_error", "quantize_s", "forward_s")  # one value a cell


@dataclass(frozen=True)
class Sensitivity:
    """What layers of a model do to its answers to `items`; calibrated on `tokens`."""

    items: Sequence[Item] = field(repr=False)
    tokens: Sequence[Sequence[int]] = field(repr=False)
    base: Original = field(default_factory=Original)
    store: Store = field(default_factory=Store)
    device: str = "cpu"
    batch_tokens: int = 2048

    @cached_property
    def key(self) -> dict:
        return {"measure": "sensitivity", "device": self.device, "batch_tokens": self.batch_tokens, "base": self.base.key(),
                "items": key_hash([[i.id, list(i.ids), i.start] for i in self.items]),
                "tokens": key_hash([list(t) for t in self.tokens]), **circumstances()}

    @cached_property
    def panel(self) -> Panel:
        return Panel(self.base.load(self.device), self.items, batch_tokens=self.batch_tokens)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """{layer: (outputs, inputs)} of all that `downwards` visits, in its order of blocks."""
        model = shell(self.base.folder)
        ends = {name: m.weight.shape for name, m in ((EMBEDDING, model.get_input_embeddings()),
                                                    (HEAD, model.get_output_embeddings()))}
        inside = {n: tuple(m.weight.shape) for n, m in linears(model)}
        return {EMBEDDING: tuple(ends[EMBEDDING]), **inside, HEAD: tuple(ends[HEAD])}

    def down(self, methods: Sequence[Method], layers: Sequence[str] | None = None, progress: bool = True
             ) -> dict[tuple[str, Method], Cell]:
        """{(layer, method): cell} of each layer quantized alone (none named: of all), as far as the method can.

        Raises LayerUnknown, BadCell, and what `quantize_model` raises.
        """
        layers = list(self.shapes) if layers is None else layers
        self._check(layers, self.shapes)
        wanted = {(n, m): self.key | {"layer": n, "method": m.key()} for n in layers for m in methods if self.fits(n, m)}
        missing = {pair for pair, key in wanted.items() if not self.store.has(_name(*pair), key)}
        with tqdm(total=sum(self._blocks(n) for n, _ in missing), disable=not (progress and missing), desc="downwards",
                  unit="block") as bar:
            for n, method, arrays in downwards(self.panel, methods, self.tokens, lambda *pair: pair in missing
                                               ) if missing else ():
                bar.set_postfix_str(f"{n}, {method}")
                self.store.get(_name(n, method), wanted[n, method], lambda arrays=arrays: arrays)
                bar.update(self._blocks(n))
                missing.discard((n, method))
                if not missing:
                    break
        # what a method without a file format left in 16 bits after all has none
        return {pair: self.store.get(_name(*pair), key, _gone) for pair, key in wanted.items() if pair not in missing}

    def up(self, low: Plan, raised: Mapping[str, Sequence[str]], progress: bool = True) -> dict[str, Cell]:
        """{name: cell} of each set of linears put back to 16 bits in the model quantized by `low`; "" is that of `low` as it
        is. Raises LayerUnknown, PlanError for a `low` that changes a block beyond its linears, and what `quantize_model` does.
        """
        inside = [n for n in self.shapes if n not in (EMBEDDING, HEAD)]
        for layers in raised.values():
            self._check(layers, inside)
        if any(m.prepares for m in low.methods()):
            raise PlanError(f"{low}: it folds scales into what comes before its linears, so 16 bits cannot be put back alone")
        wanted = {name: self.key | {"low": low.key(), "raised": sorted(layers)} for name, layers in {"": (), **raised}.items()}
        missing = [name for name, key in wanted.items() if not self.store.has(f"up {name}", key)]
        if missing:
            model = self.base.load(self.device)
            panel = Panel(Simulation("low", low, self.tokens, self.base).load(self.device), self.items, self.panel,
                          self.batch_tokens)
            if "" in missing:
                self.store.get("up ", wanted[""], panel.score)
            changes = {name: {f"{n}.weight": model.get_submodule(n).weight.detach() for n in raised[name]}
                       for name in missing if name}
            for name, arrays in tqdm(upwards(panel, changes), total=len(changes), disable=not progress, desc="upwards"):
                self.store.get(f"up {name}", wanted[name], lambda arrays=arrays: arrays)
        return {name: self.store.get(f"up {name}", key, _gone) for name, key in wanted.items()}

    def _check(self, layers: Sequence[str], among: Sequence[str]) -> None:
        if unknown := sorted(set(layers) - set(among)):
            raise LayerUnknown(f"layers: {unknown[0]!r} is no layer of {self.base.model}; there are {', '.join(among)}")

    def fits(self, layer: str, method: Method) -> bool:
        if method.stays or (layer == EMBEDDING and method.keeps):
            return False
        try:
            form = next(iter(method.formats()), None)
            return bool(form is None or form.specs(*self.shapes[layer], method))
        except GroupSizeError:
            return False

    def _blocks(self, layer: str) -> int:
        """How many blocks its branch runs through, and the head."""
        return 1 + self.count - {EMBEDDING: 0, HEAD: self.count}.get(layer, where(layer)[0] or 0)

    @cached_property
    def count(self) -> int:
        return len(blocks_of(shell(self.base.folder))[1])


class LayerUnknown(ValueError):
    """A layer that the model does not have."""


def _name(layer: str, method: Method) -> str:
    return f"{layer} {method}"


def _gone() -> Arrays:
    raise RuntimeError("a cell went away while it was being read")


def where(layer: str) -> tuple[int | None, str]:
    """(block, kind) of a layer: model.layers.3.mlp.down_proj is (3, "down_proj"), the output head (None, "output head")."""
    block = next((int(part) for part in layer.split(".") if part.isdigit()), None)
    return block, layer.rpartition(".")[2]


def effect(arrays: Mapping[str, np.ndarray], full: Mapping[str, np.ndarray], interval: bool = True) -> dict:
    """KL and change of loss (nats/token) with intervals over the questions, and what became of right answers."""
    tokens, flips = arrays["answer_tokens"], mcnemar(full["exact"], arrays["exact"])
    kl, nll = arrays["answer_kl"], arrays["answer_nll"] - full["answer_nll"]
    of = ratio_interval if interval else lambda sums, counts: Interval(sums.sum() / counts.sum(), np.nan, np.nan)
    return {"kl": of(kl, tokens), "delta_nll": of(nll, tokens), "exact": float(arrays["exact"].mean()),
            "lost": flips.lost, "won": flips.won}


def table(cells: Mapping[tuple[str, Method], Mapping[str, np.ndarray]], full: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """A row a cell: layer, block, kind, method, its `effect`, its own errors and the seconds it took."""
    rows = []
    for (layer, method), arrays in cells.items():
        block, kind = where(layer)
        rows.append({"layer": layer, "block": block, "kind": kind, "method": method.name, "bits": getattr(method, "bits", 4),
                     "setting": method} | effect(arrays, full) | {k: float(arrays[k]) for k in OWN})
    return pd.DataFrame(rows)


def stored(folder: Path = RESULTS) -> tuple[dict[str, np.ndarray], dict[tuple[str, Method], dict[str, np.ndarray]]]:
    """(arrays of the unquantized model, {(layer, method): arrays}) of the bundled model's map, data/results/sensitivity.npz."""
    cell = Cell.read(folder / "sensitivity.npz")
    found = {name: {k: v if k in SHARED else v[0] for k, v in arrays.items()} for name, arrays in unbundle(cell).items()}
    keys = {name: cell.key["keys"][rows[0]] for name, rows in cell.key["rows"].items()}
    return found.pop(FULL), {(keys[n]["layer"], Method.of(keys[n]["method"])): arrays for n, arrays in found.items()}
