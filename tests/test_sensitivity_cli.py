"""`python -m helpers.sensitivity`: map and plan from one command, taken by the other two; and one line for what is wrong."""

import json
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from helpers import sensitivity as module
from helpers.book import random_llama
from helpers.files import PROVENANCE, folder_hash
from helpers.harness import named, study
from helpers.harness import sensitivity as harness
from helpers.harness.allocate import read_plan
from helpers.harness.compare import Quality
from helpers.harness.named import located
from helpers.harness.study import material, prepared
from helpers.harness.variants import OurArtefact
from helpers.measure.bytes import bits_a_weight
from helpers.methods.gptq import Gptq
from helpers.models.method import Plan
from helpers.models.reading import load_simulated, read_artefact
from helpers.models.source import DATA
from helpers.quantize import main as quantize
from helpers.sensitivity import main
from helpers.store import Cell, Store

TALES = str(DATA / "text" / "tales.txt")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with a store of its own, and one for files of ours."""
    folder = tmp_path_factory.mktemp("sensitivity")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Sensitivity", partial(harness.Sensitivity, store=Store(folder / "cells")))
        patch.setattr(named, "CACHE", folder / "artefacts")
        patch.setattr(study, "CALIBRATION", study.CALIBRATION | {"count": 8})
        yield folder


@pytest.fixture(scope="module")
def small(own):
    """A random model whose inputs 64 divides but for one kind, with questions of its own: the command's arguments."""
    (own / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"What is {n}?", "answer": f"{n}"}) + "\n"
                                               for n in range(30)))
    model = random_llama("sensitivity-cli-for-tests", 128, 160, tied=False)
    return ["--model", str(model), "--prompts", str(own / "prompts.jsonl"), "--bits", "3", "4", "--groups", "32", "64", "--out",
            str(own / "out")]


@pytest.mark.parametrize("arguments, said", [
    (["--budget", "2"], "budget: expected 3.621 to 16"), (["--budget", "17"], "to 16 bits a weight, the smallest plan"),
    (["--budget", "nan"], "got nan"), (["--bits", "9"], "bits: expected 2 to 8, got 9"),
    (["--groups", "0"], "group_size: expected a positive number"), (["--limit", "0"], "limit: expected at least 1 question"),
    (["--groups", "77"], "budget: expected 16 to 16 bits a weight"),
    (["--model", "/no/such/model"], "neither 'bundled' nor 'small', nor a folder"),
    (["--model", "FOLDER/config.json"], "config.json: the answers of random weights say nothing; give a model"),
    (["--prompts", "FOLDER/none.jsonl"], "none.jsonl"),
    (["--prompts", "FOLDER/few.jsonl"], "few.jsonl: of 4 questions 0 are left to choose"),
    (["--out", "FOLDER/prompts.jsonl"], "prompts.jsonl")])
def test_bad_input_ends_in_one_line_before_anything_is_measured(own, small, arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(harness, "downwards", None)
    (own / "few.jsonl").write_text("".join((own / "prompts.jsonl").read_text().splitlines(True)[:4]))
    before = sorted((own / "cells").glob("*"))
    assert main([*small, *(a.replace("FOLDER", str(own)) for a in arguments)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error
    assert sorted((own / "cells").glob("*")) == before and not (own / "out" / "plan.json").exists()


@pytest.fixture
def nothing_twice(monkeypatch):
    """From its call on, quantizing or scoring anything is an error."""
    def forbid():
        for where, what in ((harness, "downwards"), (Quality, "of"), (named, "quantize_to")):
            monkeypatch.setattr(where, what, None)
    return forbid


def test_a_model_of_ones_own(own, small, capsys, nothing_twice):
    assert main([*small, "--budget", "5"]) == 0
    said, out = capsys.readouterr().out, own / "out"
    assert {p.name for p in out.iterdir()} == {"map.csv", "map.png", "plan.json"} and not plt.get_fignums()
    record = json.loads((out / "plan.json").read_text())
    plan = Plan.parse(record["plan"])
    assert record["weights"] == folder_hash(Path(small[1])) and f"{record['bits']:.2f} bits a weight" in said
    assert record["bits"] <= 5 and record["why"] in said and str(out / "plan.json") in said
    rows = (out / "map.csv").read_text().splitlines()
    assert len(rows) == 1 + 14 * 4 - 2 * 2  # 64 does not divide down_proj's 160 inputs
    tune, judge = (len(part) for part in material(small[1], prompts=own / "prompts.jsonl")[1:3])
    cells = [Cell.read(p) for p in (own / "cells").iterdir()]
    judged = [c for c in cells if len(c.arrays["id"]) == judge]
    assert 0 < tune < judge and len(cells) == len(judged) + sum(len(c.arrays["id"]) == tune for c in cells)
    assert {str(c.key["variant"]["plan"]) for c in judged} >= {str(plan.key())} and len(judged) <= 2
    (out / "plan.json").unlink()
    nothing_twice()
    assert main([*small, "--budget", "5"]) == 0 and json.loads((out / "plan.json").read_text()) == record
    assert capsys.readouterr().out == said


def test_what_judges_does_not_choose(own, small, monkeypatch):
    """With other questions to judge by the same plan comes out, judged otherwise."""
    assert main([*small, "--budget", "5"]) == 0
    before = json.loads((own / "out" / "plan.json").read_text())

    def other(*args):
        given = material(*args)
        return given._replace(judge=given.judge[1:4])

    monkeypatch.setattr(module, "material", other)
    assert main([*small, "--budget", "5"]) == 0
    after = json.loads((own / "out" / "plan.json").read_text())
    assert {k for k in before if before[k] != after[k]} <= {"kl", "kl_less_uniform"} and before["kl"] != after["kl"]


def test_where_the_largest_group_fits_no_linear(own, small, monkeypatch):
    """The map's figure is of a setting that fits."""
    shown = []
    monkeypatch.setattr(module.maps, "heat_map", lambda ax, frame: shown.append(frame))
    arguments = [*small, "--budget", "6", "--groups", "32", "64", "128", "--bits", "4"]
    assert main(arguments) == 0 and len(shown[0]) == 14 and set(shown[0].setting) == {Gptq(4, 32)}


def test_the_bundled_model_from_its_map_to_a_file(own, capsys, nothing_twice, tmp_path):
    """Map, plan, artefact and comparison; each a second time computes nothing."""
    command = ["--limit", "1", "--bits", "3", "4", "--groups", "128", "--budget", "3.7", "--out", str(tmp_path)]
    assert main(command) == 0
    path, record = tmp_path / "plan.json", json.loads((tmp_path / "plan.json").read_text())
    plan = Plan.parse(record["plan"])
    assert quantize(["bundled", str(tmp_path / "file"), "--plan", str(path), "--text", TALES, "--windows", "4"]) == 0
    assert f"{path} to gptq: " in capsys.readouterr().out
    read, made = read_artefact(tmp_path / "file"), json.loads((tmp_path / "file" / PROVENANCE).read_text())
    assert read.form.name == "gptq" and made["plan"] == record["plan"]
    assert {n: q.bits for n, q in read.linears.items()} == {n: plan.at(n).bits for n in read.linears}
    names = located([str(path)])
    [v] = (given := prepared(methods=names, limit=1, store=Store(own / "cells"))).variants
    assert isinstance(v, OurArtefact) and v.name == "plan" and v.plan == plan and v.predicted() == v.measured()
    assert record["bits"] == bits_a_weight(given.full.config, plan)
    read_artefact(v.folder)
    nothing_twice()
    assert main(command) == 0 and json.loads(path.read_text()) == record
    assert prepared(methods=names, limit=1).variants[0].folder == v.folder
    load_simulated(v.folder)


def test_grids_with_zero_points(own, small):
    assert main([*small, "--budget", "5", "--asym", "--out", str(own / "asym")]) == 0
    plan = read_plan(own / "asym" / "plan.json", Path(small[1]))
    assert all(not m.sym for m in plan.methods() if not m.stays) and {f.name for f in plan.formats()} <= {"awq", "gptq_v2"}


@pytest.mark.parametrize("content, said", [("{", "plan.json is no plan"), (None, "plan.json is no plan"),
                                           ("other", "plan.json is a plan for another, whose weights are others")])
def test_a_plan_that_is_none_ends_in_one_line(content, said, tmp_path, capsys):
    path = tmp_path / "plan.json"
    if content:
        path.write_text(json.dumps({"plan": Plan(Gptq()).key(), "weights": "none", "model": "another"})
                        if content == "other" else content)
    assert quantize(["bundled", str(tmp_path / "out"), "--plan", str(path), "--text", TALES]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error and "python -m helpers.sensitivity" in error
    assert not (tmp_path / "out").exists()


def test_a_plan_asks_for_text_where_its_rules_do(tmp_path, capsys):
    plan = {"plan": Plan(named.Method.known["fp16"](), (("o_proj", Gptq()),)).key(), "weights": folder_hash(DATA / "model")}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert quantize(["bundled", str(tmp_path / "out"), "--plan", str(tmp_path / "plan.json")]) == 2
    assert "--text: gptq looks at what the model reads" in capsys.readouterr().err
