"""Who reads whose file: real cells, and engines that are missing, refuse, answer otherwise, die or do not finish."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from helpers import harness
from helpers.harness.portability import ENGINES, Loads, matrix, table
from helpers.measure.answers import greedy
from helpers.measure.tasks import TASKS, questions
from helpers.models.reading import load_simulated
from helpers.models.source import end_tokens
from helpers.results import RESULTS, read
from helpers.toolkits import process
from helpers.toolkits.answers import greedy_answer
from helpers.toolkits.artefacts import ARTEFACTS, COMMITTED
from helpers.toolkits.process import ORIGINALS

NF4 = {"nf4": COMMITTED / "bitsandbytes-nf4"}
originals = pytest.mark.skipif(not (ORIGINALS / "transformers").is_dir(), reason="`make originals` has not been run")


@pytest.fixture(scope="module")
def asked(bundled):
    return questions(bundled.tokenizer, 4)


@pytest.fixture(scope="module")
def expected(asked):
    model = load_simulated(NF4["nf4"])
    return [greedy_answer(model, prompt, 24, end_tokens(NF4["nf4"])) for prompt in asked]


def only(name):
    return {name: ENGINES[name]}


def test_questions_are_of_all_tasks(bundled):
    assert len(questions(bundled.tokenizer)) == 20 == len(set(map(tuple, questions(bundled.tokenizer))))
    of_each = questions(bundled.tokenizer, len(TASKS))
    assert of_each == questions(bundled.tokenizer, len(TASKS) + 3)[:len(TASKS)]


def test_a_greedy_answer_is_what_generate_says(bundled, asked):
    for prompt in asked:
        said = bundled.model.generate(input_ids=torch.tensor([prompt]), generation_config=greedy(24, eos_token_id=2))
        said = said[0, len(prompt):].tolist()
        assert greedy_answer(bundled.model, prompt, 24, [2]) == [t for t in said if t != 2] and len(said) <= 24


def test_nf4_in_transformers_for_real(asked):
    [cell] = matrix(NF4, only("transformers"), asked)["nf4"].values()
    assert (cell.loads, cell.right, cell.asked, cell.kernel, cell.reason) == (True, 4, 4, "Linear4bit", "") and cell.seconds > 0


@originals
def test_auto_gptq_reads_autoround_and_leaves_awq_folders_alone(asked):
    folders = {n: COMMITTED / n for n in ("autoround-gptq", "autoawq-awq")}
    before = {n: sorted(p.name for p in f.iterdir()) for n, f in folders.items()}
    found = matrix(folders, only("auto-gptq"), asked)
    assert all(row["auto-gptq"].right == 4 and row["auto-gptq"].kernel == "QuantLinear" for row in found.values())
    assert before == {n: sorted(p.name for p in f.iterdir()) for n, f in folders.items()}


@originals
def test_a_file_that_a_library_cannot_read_has_its_reason(asked):
    cell = matrix(NF4, only("auto-gptq"), asked)["nf4"]["auto-gptq"]
    assert not cell.loads and cell.reason.startswith("FileNotFoundError") and "FOLDER" in cell.reason


def test_a_broken_folder_has_its_reason(tmp_path, asked):
    found = matrix({"none": tmp_path}, asked=asked)["none"]
    assert list(found) == list(ENGINES) and len(set(found.values())) == 1
    assert not found["vLLM"].loads and "is not a whole quantized model" in found["vLLM"].reason


def test_processes_that_end_otherwise(tmp_path, asked, monkeypatch):
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    engines = only("transformers")
    late = matrix(NF4, engines, asked, timeout=0.01)["nf4"]["transformers"]
    assert not late.loads and late.reason == "answers (transformers) did not finish in 0 s"
    monkeypatch.setattr(sys, "executable", str(killed))
    dead = matrix(NF4, engines, asked)["nf4"]["transformers"]
    assert (dead.loads, dead.right, dead.reason) == (False, 0, "answers (transformers) ended with exit status -9")
    monkeypatch.setattr(process, "ORIGINALS", tmp_path / "none")
    missing = matrix(NF4, only("autoawq"), asked)["nf4"]["autoawq"]
    assert missing.reason.startswith("not installed: ") and "make originals" in missing.reason


class Missing(RuntimeError):
    pass


class Refused(RuntimeError):
    pass


def fake(said, refuses=None):
    """helpers/harness/serve.py, with a server that gives these answers."""
    @contextmanager
    def serving(folder, **options):
        assert (folder / "tokenizer.json").is_file() and (folder / "model.safetensors").is_file()
        if refuses:
            raise refuses
        yield SimpleNamespace(kernels=lambda: ["CPUWNA16LinearKernel"])

    return SimpleNamespace(EngineMissing=Missing, EngineRefused=Refused, EngineFailed=OSError, serving=serving,
                           answers=lambda server, prompts, new_tokens: said)


def answer(tokens, error=None):
    return SimpleNamespace(tokens=tokens, ended=not error, error=error)


def in_vllm(monkeypatch, asked, serve):
    monkeypatch.setitem(sys.modules, "helpers.harness.serve", serve)
    monkeypatch.setattr(harness, "serve", serve, raising=False)
    [cell] = matrix(NF4, only("vLLM"), asked)["nf4"].values()
    return cell


def test_vllm_s_answers_are_held_against_exact_dequantization(monkeypatch, asked, expected):
    told = [answer([*expected[0], 2]), answer(expected[1]), answer(expected[2][:-1]), answer([], "HTTP 500")]
    cell = in_vllm(monkeypatch, asked, fake(told))
    assert cell == Loads(True, 2, 4, "CPUWNA16LinearKernel", cell.seconds, "HTTP 500")


@pytest.mark.parametrize("refuses, said", [(Missing("run `make serving`"), "not installed: run `make serving`"),
                                           (Refused("3 bits\nand more"), "3 bits"), (OSError("it ended"), "it ended")])
def test_vllm_that_does_not_serve(refuses, said, monkeypatch, asked):
    cell = in_vllm(monkeypatch, asked, fake([], refuses))
    assert (cell.loads, cell.right, cell.reason) == (False, 0, said)


def test_the_table_reads():
    found = {"a": {"x": Loads(True, 19, 20, "Linear4bit", 3.0, ""), "y": Loads(False, 0, 20, "", 1.0, "ValueError: no")},
             "b": {"x": Loads(True, 3, 20, "Linear", 3.0, "broke off"), "y": Loads(True, 20, 20, "Linear", 3.0, "")}}
    shown = table(found)
    assert list(shown.columns) == ["x", "y"] and list(shown.index) == ["a", "b"]
    assert shown.loc["a"].tolist() == ["19 of 20, Linear4bit", "ValueError: no"]
    assert shown.loc["b"].tolist() == ["3 of 20, Linear; broke off", "20 of 20, Linear"]


@pytest.mark.skipif(not (RESULTS / "portability.json").is_file(), reason="not measured yet")
def test_the_record_is_of_the_committed_artefacts():
    record = read("portability")
    assert set(record.data["matrix"]) == set(ARTEFACTS) - {"bitsandbytes-int8"}
    for row in record.data["matrix"].values():
        assert list(row) == list(ENGINES)
        assert row["transformers"]["loads"] and row["transformers"]["right"] == row["transformers"]["asked"] == 20
        assert all(x["loads"] or x["reason"] for x in row.values())
    assert record.data["versions"][ORIGINALS.name]["auto_gptq"] == "0.7.1"
