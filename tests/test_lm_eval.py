"""lm-evaluation-harness on a task of one's own: two variants, paired document by document."""

import json
import sys

import numpy as np
import pytest
import torch

from helpers.book import random_llama
from helpers.harness.lm_eval import LmEvalMissing, lm_eval_scores
from helpers.harness.variants import Original, Simulation
from helpers.measure.stats import mcnemar, swap_test
from helpers.measure.tasks import examples, render
from helpers.methods.keep import Keep
from helpers.methods.nf4 import Nf4
from helpers.methods.rtn import Rtn

TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/sums.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{right}}}}"
target_delimiter: " "
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def task(tmp_path, bundled):
    """A YAML file: sums with four answers to choose from, of which the second is the right one."""
    asked = examples("tune", ["arithmetic"], 24)
    rows = [{"prompt": render(bundled.tokenizer, e)[0], "right": 1,
             "choices": [f"{int(e.answer) + n}" for n in (-1, 0, 1, 10)]} for e in asked]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "sums.yaml").write_text(TASK.format(folder=tmp_path))
    return tmp_path / "sums.yaml"


def test_two_variants_are_paired_by_document(task, bundled):
    full = lm_eval_scores(bundled.model, bundled.tokenizer, [task], limit=20)["sums"]
    assert len(set(full["id"])) == 20 and set(full) == {"id", "acc"} and full["acc"].mean() > 0.8
    broken = lm_eval_scores(Simulation("rounded", Rtn(2, sym=False)).load(), bundled.tokenizer, [task], limit=20)["sums"]
    assert (broken["id"] == full["id"]).all()
    flips = mcnemar(full["acc"], broken["acc"])
    assert flips.lost > flips.won and flips.p_value < 0.05 and swap_test(broken["acc"] - full["acc"]) < 0.05
    again = lm_eval_scores(bundled.model, bundled.tokenizer, [task], limit=8)["sums"]
    assert (again["id"] == full["id"][:8]).all() and np.array_equal(again["acc"], full["acc"][:8])


def test_a_head_of_its_own_stays(task, bundled):
    folder = random_llama("tied-for-lm-eval", 128, 192, tied=True)
    model = Simulation("head", Keep(), base=Original(str(folder)), head=Nf4()).load()
    head = model.lm_head.weight.clone()
    lm_eval_scores(model, bundled.tokenizer, [task], limit=1)
    assert torch.equal(model.lm_head.weight, head) and not torch.equal(head, model.model.embed_tokens.weight)


def test_what_is_missing_is_said(task, bundled, monkeypatch):
    with pytest.raises(ValueError, match="'sums_of_nobody' is no task"):
        lm_eval_scores(bundled.model, bundled.tokenizer, ["sums_of_nobody"])
    (task.parent / "sums.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="sums.jsonl"):
        lm_eval_scores(bundled.model, bundled.tokenizer, [task])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(LmEvalMissing, match=r"pip install 'lm-eval==0\.4\.13'"):
        lm_eval_scores(bundled.model, bundled.tokenizer, [task])
