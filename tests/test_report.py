"""What a comparison leaves: results.json, a manifest, a page, and what got worse since."""

import copy
import json
import resource
import shutil
from dataclasses import replace

import jsonschema
import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml

from helpers.book import random_llama
from helpers.files import folder_hash
from helpers.harness import named, report
from helpers.harness.gates import parse_gates
from helpers.harness.measured import NotMeasured
from helpers.harness.measures import Form
from helpers.harness.served import Served
from helpers.harness.study import prepared, some
from helpers.harness.variants import Folder, Missing, Original, ToolkitArtefact
from helpers.measure.tasks import Example
from helpers.models.source import BUNDLED
from helpers.page import to_html
from helpers.store import Store
from helpers.toolkits import process
from helpers.toolkits.artefacts import COMMITTED


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A study of a small random model, and what was measured: its own answers to a few questions, by NF4."""
    folder = tmp_path_factory.mktemp("report")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {n} and {n + 1}?"}) + "\n" for n in range(60)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(named, "CACHE", folder / "artefacts")
        study = prepared(str(random_llama("report-for-tests", 128, 192, tied=False)), prompts=prompts, methods=["nf4"],
                         store=Store(folder / "cells"))
        return study, study.measure(progress=False)


@pytest.fixture(scope="module")
def found(compared):
    study, measured = compared
    return report.results(study, measured, study.verdict(measured))


def test_what_is_generated_is_asked_anew_if_what_decides_it_changes(tmp_path):
    """The questions, and the files by which they become tokens and answers end."""
    shutil.copytree(BUNDLED, tmp_path / "m")
    asked, of = [Example("own", "Why?", "Because")], lambda: Original(str(tmp_path / "m"))
    keys = {json.dumps(Form([change], of()).key) for change in (
        asked[0], replace(asked[0], plain=True), replace(asked[0], schema={}), replace(asked[0], prompt="When?"))}
    for name in ("generation_config.json", "tokenizer_config.json"):
        settings = json.loads((tmp_path / "m" / name).read_text())
        (tmp_path / "m" / name).write_text(json.dumps(settings | {"eos_token_id": 7, "chat_template": "{{ messages }}"}))
        keys |= {json.dumps(m.key) for m in (Form(asked, of()), Served(asked, of(), (1.0,)))}
    assert len(keys) == 8


@pytest.mark.parametrize("count", [0, 1, 59, 60, 61, 119, 650])
def test_some_of_the_questions_are_of_all_the_list(count):
    taken = some(range(count))
    assert len(set(taken)) == len(taken) == min(60, count) and sorted(taken) == taken
    assert not count or (taken[0] == 0 and taken[-1] >= count - 1 - count / 60)


def test_results_are_as_their_schema_says(compared, found, tmp_path):
    study, measured = compared
    report.save(found, tmp_path / "results.json")
    assert report.read(tmp_path / "results.json") == found
    jsonschema.Draft202012Validator.check_schema(report.SCHEMA)
    full, nf4 = found["variants"]
    assert (full["name"], nf4["name"], nf4["failed"], full["failed"]) == ("16 bits", "nf4", {}, {})
    assert found["asked"]["id"] == [e.id for e in study.judge] and np.abs(full["items"]["kl"]).max() < 1e-5
    assert nf4["items"]["nll"] == pytest.approx(measured["nf4"].questions.answer.nll, rel=1e-5)
    assert nf4["quality"]["kl"][1] > 0 and 4 < nf4["bits_a_weight"] < 5 and nf4["measured_bytes"] == nf4["predicted_bytes"]
    assert found["model"]["weights_sha256"] == folder_hash(study.full.folder) and nf4["memory"]["peak_prefill"] > 0
    assert len(nf4["latency"]["ttft_ms"]) >= 3 and nf4["kernels"]
    with pytest.raises(jsonschema.ValidationError, match="'more'"):
        report.save(found | {"more": 1}, tmp_path / "other.json")
    assert not (tmp_path / "other.json").exists()


@pytest.mark.parametrize("change, said", [
    (None, "cannot be read"), (lambda text: text[:-40], "cannot be read"), (lambda _: "[]", "the file: not as version 1"),
    (lambda text: text.replace('"schema": 1', '"schema": 2'), "schema: not as version 1 of results.json"),
    (lambda text: text.replace('"tokens": [', '"tokens": [1, ', 1), "tokens: expected")])
def test_what_is_no_results_file(change, said, found, tmp_path):
    path = tmp_path / "results.json"
    if change:
        report.save(found, path)
        path.write_text(change(path.read_text()))
    with pytest.raises(report.BadResults, match=f"{path}.*{said}|{path}: {said}"):
        report.read(path)


def changed(found: dict, **items) -> dict:
    """The same results, these values of NF4 being others."""
    other = copy.deepcopy(found)
    other["variants"][1]["items"] |= {k: np.asarray(v).tolist() for k, v in items.items()}
    return other


def test_a_planted_regression_is_found_and_no_other(found):
    items = found["variants"][1]["items"]
    nll, n = np.array(items["nll"]), len(items["nll"])
    assert n > 25 and report.worse(found, found) == []
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, n)
    assert report.worse(changed(found, nll=nll + noise), changed(found, nll=nll + rng.permutation(noise))) == []
    [said] = report.worse(found, changed(found, nll=nll + 0.2 + noise))
    assert said.startswith("nf4: nll on answers changed by +")
    assert report.worse(changed(found, nll=nll + 0.2 + noise), found) == []  # better is not worse
    right = [1] * n
    [said] = report.worse(changed(found, exact=right), changed(found, exact=[0] * 12 + right[12:]))
    assert said.startswith("nf4: right answers changed by -")
    assert report.worse(changed(found, exact=right), changed(found, exact=[0] * 3 + right[3:])) == []
    shuffled = changed(found, nll=nll + 0.2 + noise)  # the same questions in another order
    order = rng.permutation(n)
    for lists in (shuffled["asked"], *(v["items"] for v in shuffled["variants"])):
        lists |= {k: [values[i] for i in order] for k, values in lists.items()}
    assert len(report.worse(found, shuffled)) == 1


def test_results_that_cannot_be_compared(found):
    renamed, other, asked, gone = (copy.deepcopy(found) for _ in range(4))
    renamed["variants"] = [v | {"name": f"new {v['name']}"} for v in renamed["variants"]]
    other["asked"]["tokens"][0] += 1
    asked["asked"]["id"] = [f"{i}?" for i in asked["asked"]["id"]]
    for new, said in ((renamed, "no variant has scores in both"), (other, "1 of .* have another answer"),
                      (asked, "0 questions")):
        with pytest.raises(report.BadResults, match=said):
            report.worse(found, new)
    gone["variants"][1] |= {"items": {}, "failed": {"questions": "ValueError: not finite"}}
    assert report.worse(found, gone) == ["nf4: had scores before, now: ValueError: not finite"]


def test_the_manifest_says_what_to_deploy(compared):
    study, measured = compared
    passing = replace(study, gates=parse_gates({"memory_bytes": "< 1e9", "kl": "< 5"}))
    said = yaml.safe_load(report.manifest(passing, passing.verdict(measured), measured))
    nf4 = measured["nf4"].variant
    assert said["deploy"] == {
        "variant": "nf4", "folder": str(nf4.folder), "weights_sha256": folder_hash(nf4.folder),
        "bytes": nf4.measured()}
    assert said["fallback"]["variant"] == "16 bits" and said["fallback"]["weights_sha256"] == said["model_sha256"]
    assert [step["share_of_traffic"] for step in said["canary"]] == [0.01, 0.05, 0.25, 1.0]
    assert said["roll_back_when"] == ["not (kl < 5)"]  # bytes do not change while it is served
    failing = replace(study, gates=parse_gates({"memory_bytes": "< 10"}))
    said = yaml.safe_load(report.manifest(failing, failing.verdict(measured), measured))
    assert said == {"deploy": None, "because": "verdict: fail"}


def test_a_record_of_engines_is_of_the_committed_files_alone(tmp_path):
    """A folder of one's own that happens to be called like one is not what the record was made of."""
    study = prepared("bundled", methods=["nf4"], limit=1)
    shutil.copytree(COMMITTED / "bitsandbytes-nf4", tmp_path / "bitsandbytes-nf4")
    other = Folder("other", tmp_path / "bitsandbytes-nf4", True)
    assert set(replace(study, variants=[*study.variants, other]).loads()) == {"nf4"}


def test_a_variant_that_does_not_load_has_its_reason_as_that_of_its_latency(compared):
    _, measured = compared
    without = replace(measured["nf4"], timed=None, loads={}, failed={"memory": "ToolkitMissing: no bitsandbytes"})
    for asked in (lambda: without.latency_of("ttft_ms"), without.engines):
        with pytest.raises(NotMeasured, match="no bitsandbytes"):
            asked()


def test_a_toolkit_that_is_missing_ends_no_study(compared, monkeypatch, tmp_path):
    study, _ = compared
    monkeypatch.setattr(process, "ORIGINALS", tmp_path / "nowhere")
    absent = ToolkitArtefact("autoawq-awq", study.full.model)
    more = replace(study, variants=[*study.variants, absent], gates=parse_gates({"memory_bytes": "< 1e9"}))
    assert isinstance(more.everyone()[2], Missing)
    measured = more.measure(progress=False)
    verdict = more.verdict(measured)
    found = report.results(more, measured, verdict)
    report.save(found, tmp_path / "results.json")
    last = found["variants"][2]
    assert set(last["failed"]) == {"questions", "form", "texts", "memory"} and last["artefact_sha256"] is None
    assert all(why.startswith("ToolkitMissing: autoawq is not installed") for why in last["failed"].values())
    assert last["outcome"] == "undecided" and "could not be made" in last["reason"] and verdict.pick == "nf4"


def test_the_page_shows_what_was_said_and_runs_none_of_it(tmp_path):
    evil = "<script>alert(1)</script>"
    outputs = [nbformat.v4.new_output("stream", text=f"\x1b[31m{evil}\x1b[0m"),
               nbformat.v4.new_output("display_data", data={"text/html": pd.DataFrame({"prompt": [evil]}).to_html()}),
               nbformat.v4.new_output("display_data", data={"text/html": f"<div>{evil}</div>", "text/plain": "plain"}),
               nbformat.v4.new_output("display_data", data={"text/html": "<img src='https://x/'>", "text/plain": evil}),
               nbformat.v4.new_output("execute_result", data={"text/plain": evil}),
               nbformat.v4.new_output("error", ename="E", evalue=evil, traceback=[evil])]
    cells = [nbformat.v4.new_markdown_cell("# Title\n\n| a |\n|---|\n| $x_1 < y_2$ |\n\n$$a_{i} * b * c \\tag{9.1}$$\n\n"
                                           "![picture](https://there/x.png)"),
             nbformat.v4.new_code_cell(f"print({evil!r})", outputs=outputs)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "n.ipynb")
    to_html(tmp_path / "n.ipynb", tmp_path / "n.html")
    page = (tmp_path / "n.html").read_text()
    assert "<script" not in page and "<img" not in page and page.count("&lt;script&gt;alert(1)") >= 5 and "plain" in page
    assert "$x_1 &lt; y_2$" in page and "a_{i} * b * c \\tag{9.1}" in page and "<title>Title</title>" in page


def test_a_full_disk_leaves_no_half_file(found, tmp_path):
    """A limit on the size of files stands for the full disk."""
    report.save(found, tmp_path / "results.json")
    before, other = resource.getrlimit(resource.RLIMIT_FSIZE), found | {"command": "another"}
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        for name in ("results.json", "new.json"):
            with pytest.raises(OSError, match="File too large"):
                report.save(other, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"] and report.read(tmp_path / "results.json") == found
