"""Cells: computed once, stored whole, found again by all that decides them; and what is compared through them."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.book import random_llama
from helpers.harness.compare import Quality, shown, summary
from helpers.harness.variants import Original, Simulation, ToolkitArtefact
from helpers.measure.stats import paired
from helpers.measure.tasks import encode, examples
from helpers.methods.gptq import Gptq
from helpers.methods.keep import Keep
from helpers.methods.nf4 import Nf4
from helpers.methods.rtn import Rtn
from helpers.results import RESULTS, read
from helpers.store import BadCell, Cell, Store, bundle, cells_of, unbundle, values

ROOT = Path(__file__).resolve().parents[1]


def cell(n: int, name: str = "a") -> Cell:
    return Cell(name, {"n": n}, {"id": np.array(["x", "y"]), "v": np.array([n, n + 0.5]), "right": np.array([True, False])})


def test_computed_once_and_readable_with_numpy_alone(tmp_path):
    store, calls = Store(tmp_path), []

    def compute():
        calls.append(1)
        return {"v": np.arange(3.0)}

    found = [store.get("some name: 3 bits", {"a": 1}, compute) for _ in range(2)]
    assert len(calls) == 1 and (found[0].arrays["v"] == found[1].arrays["v"]).all()
    [path] = tmp_path.iterdir()
    with np.load(path, allow_pickle=False) as data:
        about = json.loads(str(data["about"]))
        assert data["v"].tolist() == [0, 1, 2] and about["key"] == {"a": 1} and about["made"]["machine"]["cpu"]
    store.get("some name: 3 bits", {"a": 2}, compute)
    assert len(calls) == 2 and len(list(tmp_path.iterdir())) == 2


def test_a_failed_or_spoilt_cell_is_no_cell(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(ZeroDivisionError):
        store.get("x", {}, lambda: {"v": np.array(1 / 0)})
    with pytest.raises(ValueError, match="cannot be stored"):
        store.get("x", {}, lambda: {"v": np.array([{}])})
    assert list(tmp_path.iterdir()) == []
    path = store.path("x", {"k": 1})
    store.get("x", {"k": 1}, lambda: {"v": np.ones(100)})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(BadCell, match=rf"{path.name} is not a whole cell.*delete it"):
        store.get("x", {"k": 1}, dict)
    cell(1).save(path)
    with pytest.raises(BadCell, match="another key"):
        store.get("x", {"k": 1}, dict)


SWEEP = """
import sys, time
from pathlib import Path
import numpy as np
from helpers.store import Store
store, log = Store(Path(sys.argv[1])), Path(sys.argv[2])
for n in range(40):
    def compute():
        with log.open("a") as f:
            f.write(f"{n}\\n")
        time.sleep(0.02)
        return {"v": np.full(2000, n)}
    store.get("sweep", {"n": n}, compute)
print("done")
"""


def test_a_sweep_killed_at_ten_points_goes_on(tmp_path):
    """kill -9 at ten moments: in the end every cell is there, and only one that was being made is made again."""
    cells, log = tmp_path / "cells", tmp_path / "log"
    command = [sys.executable, "-c", SWEEP, str(cells), str(log)]
    for kill in range(10):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.time() + 60
        while time.time() < until and (len(log.read_text().split()) if log.exists() else 0) < 3 * kill + 2:
            time.sleep(0.003)
        time.sleep(0.004 * kill)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    made = [int(n) for n in log.read_text().split()]
    assert done.stdout == "done\n" and set(made) == set(range(40)) and len(made) <= 40 + 10
    stored = [p for p in cells.iterdir() if p.suffix == ".npz"]
    assert sorted(int(Cell.read(p).arrays["v"][0]) for p in stored) == list(range(40))


def test_bundles_hold_every_value():
    parts = {"a": [cell(1), cell(2)], "b": [cell(1)], "c": [cell(7)]}
    whole = bundle(parts, ["v", "right"], ["id"])
    assert whole.arrays["v"].shape == (3, 2)  # the cell that two variants share is there once
    again = unbundle(whole)
    assert again["a"]["v"].tolist() == [[1, 1.5], [2, 2.5]] and again["b"]["v"].tolist() == [[1, 1.5]]
    assert again["c"]["id"].tolist() == ["x", "y"]
    assert [c.arrays["v"].tolist() for c in cells_of(whole)] == [[1, 1.5], [2, 2.5], [7, 7.5]]
    assert [c.key for c in cells_of(whole)] == [cell(n).key for n in (1, 2, 7)]
    assert cells_of(whole)[0].arrays["id"].tolist() == ["x", "y"]
    other = replace(cell(3), arrays=cell(3).arrays | {"id": np.array(["x", "z"])})
    with pytest.raises(ValueError, match="has other"):
        bundle({"a": [cell(1)], "b": [other]}, ["v"], ["id"])


@pytest.fixture(scope="module")
def quality(bundled, tmp_path_factory):
    items = [encode(bundled.tokenizer, e) for e in examples("tune", limit=5)]
    return Quality(items, store=Store(tmp_path_factory.mktemp("cells")))


def test_four_kinds_of_variants_and_what_sets_them_apart(quality):
    variants = [Original(), ToolkitArtefact("autogptq-gptq", exact=True), ToolkitArtefact("bitsandbytes-nf4"),
                Simulation("rounding", Rtn(3, sym=False)), Simulation("NF4, head too", Nf4(), head=Nf4(), dtype="float16")]
    scores = {v.name: quality.scores(v) for v in variants}
    full = scores.pop("16 bits")
    assert np.abs(full.answer.kl).max() < 1e-6 and (full.ids == [i.id for i in quality.items]).all()
    found = summary(scores, full)
    assert found["rounding"]["kl"].low > 0 and found["rounding"]["delta_nll"].verdict() == "measurably worse"
    assert list(shown(found).index) == list(scores)
    assert len({json.dumps(v.key()) for v in variants}) == 5
    sizes = {v.name: (v.predicted(), v.measured()) for v in variants[:4]}
    assert sizes["16 bits"][0] == sizes["16 bits"][1] and sizes["bitsandbytes-nf4"][0] == sizes["bitsandbytes-nf4"][1]
    assert sizes["rounding"] == (sizes["rounding"][0], None)


def test_a_cell_is_missed_when_anything_changes(quality):
    base = Simulation("x", Gptq(3), [tuple(range(5, 105))] * 2)
    keys = [base.key(), replace(base, plan=Gptq(3, damp_percent=0.02)).key(), replace(base, dtype="float16").key(),
            replace(base, tokens=[tuple(range(6, 106))] * 2).key(), Simulation("x", Gptq(3), base.tokens, Original(
                dtype="float16")).key()]
    assert len({json.dumps(k) for k in keys}) == 5 and base.key() == replace(base, name="y").key()
    other = Quality(quality.items[1:], store=quality.store)
    assert other.key != quality.key and set(quality.key) >= {"code", "versions", "machine", "device", "items", "reference"}


def test_any_two_results_are_paired_by_id(quality):
    a, b = (quality.scores(Simulation(str(bits), Rtn(bits, sym=False))) for bits in (3, 2))
    half = {k: v[::-1][:40] for k, v in b.arrays().items()}  # fewer, and in another order
    difference = paired(a.arrays(), half, "answer_nll", tokens="answer_tokens")
    where = [list(a.ids).index(i) for i in half["id"]]
    expected = (a.answer.nll[where].sum() - half["answer_nll"].sum()) / a.answer.tokens[where].sum()
    assert difference.estimate == pytest.approx(expected) and difference.verdict() == "measurably better"
    with pytest.raises(ValueError, match="0 texts in common"):
        paired(a.arrays(), half | {"id": np.array(["?"] * 40)}, "answer_nll", tokens="answer_tokens")


@pytest.mark.parametrize("name", ["sweep_nf4", "sweep_gptq", "sweep_awq", "sweep_best", "sweep_recipes"])
def test_records_are_derived_from_the_committed_values(name):
    record, found = read(name).data, values(name)
    assert record["questions"] == len(found["16 bits: 16 bits"]["id"])
    for knob, panel in record["sweeps"].items():
        for value, row in panel.items():
            arrays = found[f"{knob}: {value}"]
            assert row["kl"][0] == pytest.approx(float((arrays["answer_kl"].mean(0) / arrays["tokens"].sum()).sum()), rel=1e-5)
            assert row["exact"] == pytest.approx(arrays["exact"].mean())


@pytest.mark.parametrize("name", ["sweep_small_recipes", "sweep_small_gptq"])
def test_records_of_a_real_model_are_derived_from_the_committed_values(name):
    told, found = read(name).data, values(name)
    for domain, of in told["domains"].items():
        for knob, panel in of["sweeps"].items():
            for value, row in panel.items():
                arrays = found[f"{knob}: {value}"]
                at = np.array([" or " not in i for i in arrays["id"]]) & (
                    arrays["task"] == domain if domain != "questions" else np.char.startswith(arrays["task"], "en_"))
                kl = arrays["answer_kl"][:, at].sum(1) / arrays["tokens"][at].sum()
                assert row["kl_of_draws"] == pytest.approx(kl.tolist(), rel=1e-5) and at.sum() == of["texts"]


def test_the_committed_values_are_small():
    assert sum(p.stat().st_size for p in RESULTS.glob("*.npz")) <= 9_500_000
    assert os.path.getsize(RESULTS / "sweep_best.npz") > 100_000


def test_a_tied_head_is_quantized_alone(tmp_path):
    """The embedding, which is the same weight in the files, stays as it was."""
    folder = random_llama("tied-for-tests", 128, 192, tied=True)
    variant = Simulation("head", Keep(), base=Original(str(folder)), head=Nf4())
    model, original = variant.load(), Original(str(folder)).load()
    assert torch.equal(model.model.embed_tokens.weight, original.model.embed_tokens.weight)
    assert not torch.equal(model.lm_head.weight, original.lm_head.weight)
