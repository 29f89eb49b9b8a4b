"""`python -m helpers.compare`: its exit statuses, what it says of bad input, and one whole run that is killed and goes on."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

import nbformat
import pytest
import yaml

from helpers import book, compare
from helpers.compare import main
from helpers.files import PROVENANCE, folder_hash
from helpers.harness import jobs, named, report
from helpers.harness.allocate import save_plan
from helpers.harness.compare import Quality
from helpers.harness.study import prepared
from helpers.harness.variants import Original
from helpers.methods.rtn import Rtn
from helpers.models.method import Plan
from helpers.store import CACHE as CELLS
from helpers.store import BadCell, Cell, Store

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with a small random model's prompts, and a store and a cache of artefacts of its own; no notebook is run."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"What is {n}?"}) + "\n" for n in range(24)))
    model = book.random_llama("compare-cli-for-tests", 128, 192, tied=False)

    def execute(notebook, out, /, **parameters):
        """Leaves what it was called with."""
        (folder / "called.json").write_text(json.dumps(parameters))
        shutil.copy(notebook, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "prepared", lambda **given: prepared(**given, store=Store(folder / "cells")))
        patch.setattr(named, "CACHE", folder / "artefacts")
        patch.setattr(book, "execute", execute)
        yield folder, ["--model", str(model), "--prompts", str(folder / "prompts.jsonl"), "--methods", "nf4", "--out",
                       str(folder / "out")]


@pytest.mark.parametrize("gates, status, outcome", [
    ({"memory_bytes": "< 1e9"}, 0, "pass"), ({"memory_bytes": "< 10"}, 99, "fail"), ({"recovery": 0.97}, 98, "undecided"),
    ({"recovery": 0.97, "memory_bytes": "< 10"}, 99, "fail")])
def test_the_exit_status_is_the_verdict(own, gates, status, outcome, capsys, monkeypatch):
    folder, arguments = own
    (folder / "gates.yml").write_text(yaml.safe_dump(gates))
    monkeypatch.chdir(folder)
    model = os.path.relpath(arguments[1])  # the notebook, which runs in another folder, has to find it
    assert main([*arguments, "--model", model, "--gates", "gates.yml"]) == status
    said = capsys.readouterr().out
    assert f"verdict: {outcome}; pick: {'nf4' if status == 0 else 'none'}" in said
    called = json.loads((folder / "called.json").read_text())
    assert called["model"] == arguments[1] and called["gates"] == str(folder / "gates.yml")
    assert report.read(folder / "out" / "results.json")["verdict"]["outcome"] == outcome
    assert yaml.safe_load((folder / "out" / "manifest.yml").read_text())["deploy"] is None or status == 0
    assert {p.name for p in (folder / "out").iterdir()} == {"manifest.yml", "report.html", "report.ipynb", "results.json"}


def test_a_plan_is_a_method(own, capsys, monkeypatch):
    """By its file's name, which the notebook is told in full; a second run makes and scores nothing."""
    folder, arguments = own
    save_plan(folder / "plan.json", Plan(Rtn(4, 64), (("o_proj", Rtn(8, 32)),)), Original(arguments[1]))
    (folder / "gates.yml").write_text("memory_bytes: '< 1e9'")
    monkeypatch.chdir(folder)
    for _ in range(2):
        assert main([*arguments, "--methods", "plan.json", "--gates", "gates.yml"]) == 0
        assert "verdict: pass; pick: plan" in capsys.readouterr().out
        assert json.loads((folder / "called.json").read_text())["methods"] == [str(folder / "plan.json")]
        monkeypatch.setattr(named, "quantize_to", None)
        monkeypatch.setattr(Quality, "of", None)
    (folder / "plan.json").write_text("{")
    assert main([*arguments, "--methods", "plan.json"]) == 2 and "plan.json is no plan: " in capsys.readouterr().err


@pytest.mark.parametrize("arguments, said", [
    (["--model", "/no/such/model"], "model '/no/such/model' is neither 'bundled' nor 'small', nor a folder"),
    (["--model", "FOLDER/config.json"], "FOLDER/config.json is no model's config.json"),
    (["--gates", "FOLDER/bad.yml"], "bad.yml: kl: 'small': expected a limit such as"),
    (["--gates", "FOLDER/none.yml"], "none.yml cannot be read"),
    (["--gates", "FOLDER/sums.yml"], "recovery.sums: nothing of that name is asked: expected overall or one of prompts"),
    (["--prompts", "FOLDER/bad.jsonl"], 'bad.jsonl:2: expected {"prompt": text that is not empty'),
    (["--prompts", "FOLDER/few.jsonl"], "few.jsonl: of 1 questions"),
    (["--methods", "qptq"], "methods: 'qptq' is no method"),
    (["--methods", "gptq:bits=9"], "methods: gptq: bits: expected 2 to 8, got 9"),
    (["--device", "abacus"], "device 'abacus' cannot be used: "),
    (["--limit", "0"], "limit: expected at least 1 question a task, got 0"),
    (["--out", "FOLDER/prompts.jsonl"], "prompts.jsonl"),
    (["--executor", "spark://here"], "executor: 'spark://here': expected nothing, or dask://host:port"),
    (["--executor", "dask://127.0.0.1:1"], "executor: no Dask scheduler answers at 127.0.0.1:1"),
    (["--results", "FOLDER/none.json", "FOLDER/none.json"], "none.json cannot be read")])
def test_bad_input_ends_in_one_line(own, arguments, said, capsys, monkeypatch):
    folder, good = own
    monkeypatch.setattr(jobs, "PATIENCE", 0.3)
    (folder / "bad.yml").write_text("kl: small")
    (folder / "sums.yml").write_text("recovery: {sums: 0.9}")
    (folder / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    (folder / "few.jsonl").write_text('{"prompt": "a"}\n')
    before = {p: p.stat().st_mtime_ns for p in (folder / "cells").glob("*")}
    assert main([*good, *(a.replace("FOLDER", str(folder)) for a in arguments)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said.replace("FOLDER", str(folder)) in error
    assert before == {p: p.stat().st_mtime_ns for p in (folder / "cells").glob("*")}  # found before anything is measured


def test_two_results_are_compared(own, tmp_path, capsys):
    folder, arguments = own
    (folder / "gates.yml").write_text("memory_bytes: '< 1e9'")
    assert main([*arguments, "--gates", str(folder / "gates.yml")]) == 0
    old, new = folder / "out" / "results.json", tmp_path / "new.json"
    worse = copy.deepcopy(report.read(old))
    worse["variants"][1]["items"]["nll"] = [x + 1 + n / 100 for n, x in enumerate(worse["variants"][1]["items"]["nll"])]
    report.save(worse, new)
    capsys.readouterr()
    assert main(["--results", str(old), str(old)]) == 0 and capsys.readouterr().out == "nothing got measurably worse\n"
    assert main(["--results", str(old), str(new)]) == 99
    assert capsys.readouterr().out.startswith("nf4: nll on answers changed by +0.")
    assert main(["--results", str(new), str(old)]) == 0
    new.write_text(new.read_text()[:-20])
    assert main(["--results", str(old), str(new)]) == 2 and f"error: {new} cannot be read" in capsys.readouterr().err


def artefacts_of(model: str) -> list[Path]:
    """The files of ours that were made of a model."""
    return [p.parent for p in named.CACHE.glob(f"ours-*/{PROVENANCE}") if model in p.read_text()]


def cells_of(model: str, but: Collection[Path] = ()) -> dict[Path, int]:
    """{cell in the book's own store: when it was written} of a model and what was made of it; others write there, too."""
    found, marks = {}, [model, *map(folder_hash, artefacts_of(model))]
    for path in set(CELLS.glob("*.npz")).difference(but):
        try:
            if any(mark in json.dumps(Cell.read(path).key) for mark in marks):
                found[path] = path.stat().st_mtime_ns
        except BadCell:  # someone else's
            continue
    return found


def forget(model: str) -> None:
    """Removes what the book's caches have of a model."""
    for path in cells_of(model):
        path.unlink()
    for path in artefacts_of(model):
        shutil.rmtree(path)


def test_a_run_that_is_killed_goes_on_and_leaves_a_report(tmp_path):
    folder = book.random_llama("compare-for-tests", 128, 192, tied=False)
    model, (out, prompts) = folder_hash(folder), (tmp_path / "out", tmp_path / "prompts.jsonl")
    prompts.write_text("".join(json.dumps({"prompt": f"<script>alert({n})</script>"}) + "\n" for n in range(24)))
    command = [sys.executable, "-m", "helpers.compare", "--model", str(folder), "--prompts", prompts, "--methods",
               "rtn:bits=3", "--limit", "2", "--out", out]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    forget(model)
    try:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until, known = time.time() + 300, set(CELLS.glob("*.npz"))
        while time.time() < until and len(cells_of(model, known)) < 4:
            time.sleep(0.2)  # every look reads all cells
        process.send_signal(signal.SIGKILL)
        process.wait()
        finished = cells_of(model)
        assert 4 <= len(finished) < 13 and not (out / "results.json").exists()
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode in (98, 99), done.stderr[-2000:]
        everything = cells_of(model)
    finally:
        forget(model)
    assert finished.items() <= everything.items()  # read, not written again
    names = {p.name for p in out.iterdir()}
    assert names >= {"report.ipynb", "report.html", "results.json", "manifest.yml", "gates.png", "pareto.png", "tasks.png"}
    assert not [n for n in names if "partial" in n or "fresh" in n]
    assert [v["name"] for v in report.read(out / "results.json")["variants"]] == ["16 bits", "rtn:bits=3"]
    code = [c for c in nbformat.read(out / "report.ipynb", 4).cells if c.cell_type == "code"]
    assert all(c.execution_count for c in code) and not [o for c in code for o in c.outputs if o.output_type == "error"]
    page = (out / "report.html").read_text()
    assert page.count('src="data:image/png') >= 3 and "default-src 'none'" in page
    assert not re.search(r"<script|<link|<iframe|<img[^>]*src=.?https?:|url\(|@import", page)
