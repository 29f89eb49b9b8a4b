"""A method from outside: one class, and it quantizes, has a size, is written and read, scored and drawn, with no other edit."""

from dataclasses import dataclass
from typing import Any, ClassVar

import matplotlib.pyplot as plt
import pytest
import torch
from transformers import AutoConfig

from helpers import plots
from helpers.harness.compare import Quality
from helpers.harness.variants import OurArtefact, Simulation
from helpers.measure.bytes import measured_bytes, predicted_bytes
from helpers.measure.tasks import encode, examples
from helpers.methods.keep import Keep
from helpers.methods.rtn import Rtn
from helpers.models.checkpoint import quantize_to
from helpers.models.formats import GPTQ_V2
from helpers.models.method import Format, Method, Notes, Plan, PlanError
from helpers.models.source import BUNDLED
from helpers.quantizers.affine import QParams as Grid
from helpers.quantizers.affine import Quantized, fit_qparams, on_grid
from helpers.store import Store


@dataclass(frozen=True)
class HalfQuadratic(Method):
    """HQQ's idea in ten lines (Badri and Shaji 2023): no data; the zero point that is best against a sparse error."""

    name: ClassVar[str] = "half-quadratic"
    bits: int = 4
    group_size: int = 64
    steps: int = 20

    def formats(self) -> tuple[Format, ...]:
        return (GPTQ_V2,)

    def solve(self, W: torch.Tensor, kept: Any) -> tuple[Quantized, Notes]:
        grid = fit_qparams(W, self.bits, self.group_size, sym=False)
        w = W.float().unflatten(1, (grid.groups, -1))
        for _ in range(self.steps):
            codes = on_grid(W, grid).codes.unflatten(1, (grid.groups, -1))
            rest = w - (codes - grid.zero_point[..., None]) * grid.scale[..., None]
            sparse = rest.sign() * (rest.abs() - 0.1 * rest.abs().mean()).clamp(min=0)
            zero = (codes - (w - sparse) / grid.scale[..., None]).mean(2).round().clamp(0, grid.qmax)
            grid = Grid(grid.scale, zero, grid.qmax)
        return on_grid(W, grid), {"steps": self.steps}


@pytest.fixture(scope="module")
def items(bundled):
    return [encode(bundled.tokenizer, e) for e in examples("tune", limit=3)]


def test_it_goes_all_the_way(bundled, items, tmp_path):
    method = HalfQuadratic(bits=3)
    outcome = quantize_to(tmp_path / "out", BUNDLED, method)
    assert len(outcome.codes) == 0 and len(outcome.notes) == 28 and outcome.noted("steps").popitem()[1] == 20
    size = predicted_bytes(AutoConfig.from_pretrained(BUNDLED), method)
    assert measured_bytes(tmp_path / "out") == size < predicted_bytes(AutoConfig.from_pretrained(BUNDLED), HalfQuadratic())
    quality = Quality(items, store=Store(tmp_path / "cells"))
    simulated, artefact = Simulation("in memory", method), OurArtefact("file", tmp_path / "out", method, exact=True)
    scores = {v.name: quality.scores(v) for v in (simulated, artefact, Simulation("rounding", Rtn(3, 64, sym=False)))}
    assert (scores["in memory"].answer.kl == scores["file"].answer.kl).all()  # what is judged is what ships
    assert simulated.predicted() == artefact.predicted() == artefact.measured()
    table = {name: s.answer.kl_interval() for name, s in scores.items()}
    _, axes = plt.subplots()
    plots.intervals(axes, table, "KL", {"in memory": method.name, "file": method.name, "rounding": "rtn"})
    plt.close()


def test_a_method_that_no_table_knows_is_drawn_as_itself():
    looks = plots.looks(["a", "b", "c"], {"a": "half-quadratic", "b": "fp16", "c": "another"})
    assert looks["b"] == plots.METHODS["fp16"] and len(set(looks.values())) == 3
    assert looks["a"] not in plots.METHODS.values() and looks["c"] not in plots.METHODS.values()


def test_it_mixes_with_others_where_a_format_holds_both(bundled):
    mixed = Plan(HalfQuadratic(), {"q_proj|k_proj": Rtn(8, sym=False), "down_proj": Keep()})
    assert mixed.formats() == [GPTQ_V2]
    sizes = [predicted_bytes(bundled.model.config, p) for p in (HalfQuadratic(), mixed)]
    assert sizes[0] < sizes[1] < predicted_bytes(bundled.model.config)
    from helpers.methods.nf4 import Nf4

    assert Plan(HalfQuadratic(), {"q_proj": Nf4()}).formats() == []
    with pytest.raises(PlanError, match="has no file format"):
        predicted_bytes(bundled.model.config, Plan(HalfQuadratic(), {"q_proj": Nf4()}))


def test_the_code_of_a_method_from_outside_is_in_the_key():
    """Ours is in every cell's key as a whole; one from outside brings its own."""
    assert "code" in Simulation("x", HalfQuadratic()).key() and "code" not in Simulation("x", Rtn()).key()
