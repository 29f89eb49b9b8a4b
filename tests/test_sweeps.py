"""Sweeps in parts: what is measured by whom, what is known already, and what one loading serves."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.sweeps import KEPT, SHARED, SUBJECTS, Panel, Sweep, measured_before, what_was_asked, work
from helpers.harness.variants import ToolkitArtefact
from helpers.results import RESULTS
from helpers.store import Cell, bundle, cells_of, unbundle


@dataclass(frozen=True)
class Fake:
    """A variant that counts how often it is loaded."""

    name: str
    loads: list = field(default_factory=list, compare=False)

    def key(self):
        return {"plan": self.name}

    def load(self, device="cpu"):
        self.loads.append(device)
        return object()


class FakeSweep:
    def __init__(self, record, panels, items="a"):
        self.record, self.of, self.made = record, panels, []
        self.quality, self.key = self, {"measure": "quality", "items": items, "code": "now"}

    def panels(self):
        return self.of

    def cell(self, variant):
        variant.load()
        self.made.append(variant.name)


def cell(name, items="a", code="then"):
    key = {"measure": "quality", "items": items, "code": code, "variant": {"plan": name},
           "machine": ["another", "AVX2", 1, None]}
    arrays = {"id": np.array(["x", "y"]), "task": np.array(["t", "t"]), "answer_tokens": np.array([1.0, 2.0])}
    return Cell(name, key, arrays | {k: np.array([0.1, 0.2]) for k in KEPT})


def test_each_variant_is_loaded_once_for_all_its_sweeps_and_by_one_part():
    variants = [Fake(str(n)) for n in range(5)]
    panels = [Panel("knob", v.name, [v]) for v in variants]
    one, two = FakeSweep("one", panels), FakeSweep("two", panels[:2] + panels[:1], items="b")
    for part in range(2):
        work([one, two], part, 2, 4, 1e9)
    assert sorted(one.made) == list("01234") and sorted(two.made) == list("01")
    assert all(len(v.loads) == 1 for v in variants)


def test_what_is_known_counts_as_a_draw(tmp_path):
    """Cells of another machine and older code, in a folder and in a bundle, are the same if the same was asked."""
    draws = [Fake(f"draw {n}") for n in range(4)]
    cell("draw 2").save(tmp_path / "cells" / "one.npz")
    bundle({"knob: value": [cell("draw 0")]}, KEPT, SHARED).save(tmp_path / "bundle.npz")
    known = measured_before([tmp_path / "cells", tmp_path / "bundle.npz"])
    assert len(known) == 2 and what_was_asked(cell("draw 2", code="other").key) in known
    for most, expected in ((2, []), (3, ["draw 1"]), (9, ["draw 1", "draw 3"])):
        sweep = FakeSweep("one", [Panel("knob", "value", draws)])
        work([sweep], 0, 1, most, 1e9, known)
        assert sweep.made == expected


def test_one_that_fails_is_named_and_the_rest_goes_on(capsys):
    class Broken(Fake):
        def load(self, device="cpu"):
            raise ValueError("no weights")

    class Unmade(Fake):  # of a toolkit's file the key is asked for first
        def key(self):
            raise ValueError("the toolkit does not take it")

    panels = [Panel("knob", v.name, [v]) for v in (Broken("bad"), Unmade("unmade"), Fake("good"))]
    sweep = FakeSweep("one", panels)
    work([sweep], 0, 1, 9, 1e9)
    told = capsys.readouterr().err
    assert sweep.made == ["good"] and "bad failed" in told and "knob: unmade failed" in told


def test_a_record_without_16_bits_is_refused_before_it_is_written(tmp_path):
    with pytest.raises(ValueError, match="sweep_raised: no cell of 16 bits"):
        Sweep("raised", SUBJECTS["bundled"]).found([tmp_path])


def test_a_toolkits_row_stays_where_its_file_is_not(monkeypatch):
    """Of a committed record, on a machine that never ran the toolkit: its weights have no name there, but the row has one."""
    sweep, toolkit = Sweep("makers", SUBJECTS["small"]), ToolkitArtefact("autoround-gptq", "small")
    panels = [Panel("16 bits", "16 bits", [SUBJECTS["small"].base]), Panel("as AutoRound", "AutoRound", [toolkit]),
              Panel("as AutoRound", "no such row", [toolkit])]
    monkeypatch.setattr(Sweep, "panels", lambda _: panels)
    monkeypatch.setattr("benchmarks.sweeps.made", lambda v: v is not toolkit)
    before = Cell.read(RESULTS / "sweep_small_makers.npz")
    full = cells_of(before)[before.key["rows"]["16 bits: 16 bits"][0]].key
    monkeypatch.setattr(Sweep, "quality", SimpleNamespace(key=full))
    monkeypatch.setattr("helpers.harness.variants.Original.key", lambda _: full["variant"])
    kept = sweep.found([RESULTS / "sweep_small_makers.npz"])
    assert list(kept.key["rows"]) == ["16 bits: 16 bits", "as AutoRound: AutoRound"]
    theirs = [unbundle(c)["as AutoRound: AutoRound"]["answer_kl"] for c in (before, kept)]
    assert np.array_equal(*theirs)


@pytest.mark.parametrize("name", ["tuned", "remedies", "gptq"])
def test_settings_are_chosen_on_other_texts_than_they_are_judged_on(name):
    of = {sweep: {i.ids for i in SUBJECTS["bundled"].items(sweep)} for sweep in ("tuned", name, "recipes")}
    assert not of["tuned"] & of["recipes"] and (name == "tuned" or of[name] <= of["recipes"])
