import resource

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from helpers.methods.awq import Awq
from helpers.methods.nf4 import Nf4
from helpers.models.checkpoint import quantize_to
from helpers.models.source import BUNDLED, ModelUnavailable
from helpers.toolkits import artefacts, process
from helpers.toolkits.artefacts import ARTEFACTS, COMMITTED, reload, report
from helpers.toolkits.compare import same_codes
from helpers.toolkits.process import Job, ToolkitFailed, ToolkitMissing, run

SOURCE = str(BUNDLED)
NF4 = Job("nf4", SOURCE, calibrated=False)


def test_a_dying_process_leaves_nothing_and_says_why(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ToolkitFailed, match="No module named helpers.toolkits.nothing"):
        run("nothing", NF4, out)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_rebuild_keeps_the_finished_one(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text("{}")
    with pytest.raises(ToolkitFailed, match="did not finish in 0 s"):
        run("bitsandbytes", NF4, out, timeout=0.01)
    assert (out / "report.json").read_text() == "{}"


@pytest.mark.parametrize("tokens, said", [((), "at least one"), (((1,) * 2000,), "2000 tokens, the model's context is 1024")])
def test_bad_calibration(tokens, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        run("gptqmodel", Job("gptq", SOURCE, tokens), tmp_path / "out")


def test_rows_of_unequal_length_are_not_for_autoround(tmp_path):
    with pytest.raises(ToolkitFailed, match="calibration sequences of equal length"):
        run("autoround", Job("autoround", SOURCE, ((5, 6, 7), (5, 6))), tmp_path / "out")


@pytest.mark.parametrize("name, package", [("autoround-gptq", "auto-round"), ("gptqmodel-gptq", "gptqmodel")])
def test_reports_have_the_version_of_the_toolkit(name, package):
    assert report(COMMITTED / name)["versions"][package]


def test_missing_originals(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "ORIGINALS", tmp_path / "none")
    with pytest.raises(ToolkitMissing, match="make originals"):
        run("autogptq", Job("gptq", SOURCE, ((1, 2),)), tmp_path / "out", originals=True)


def test_nf4_for_real_and_again_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(artefacts, "CACHE", tmp_path)
    folder = artefacts.artefact("bitsandbytes-nf4", rebuild=True)
    assert folder.parent == tmp_path and report(folder)["method"] == "nf4"
    monkeypatch.setattr(artefacts, "run", None)  # a second build would fail
    assert artefacts.artefact("bitsandbytes-nf4", rebuild=True) == folder
    new, old = (load_file(f / "model.safetensors") for f in (folder, COMMITTED / "bitsandbytes-nf4"))
    assert all(torch.equal(new[k], old[k]) for k in old if k.endswith("_proj.weight"))


def test_fewer_windows_make_another_artefact(tmp_path, monkeypatch):
    monkeypatch.setattr(artefacts, "CACHE", tmp_path)
    asked = []
    monkeypatch.setattr(artefacts, "run", lambda toolkit, job, out, originals: asked.append((len(job.tokens), out)))
    for count in (16, 32):
        artefacts.artefact("gptqmodel-awq", rebuild=True, count=count)
    assert [n for n, _ in asked] == [16, 32] and asked[0][1] != asked[1][1]


@pytest.mark.parametrize("name", [n for n in ARTEFACTS if n != "bitsandbytes-int8"])
def test_committed_artefacts_load_and_are_near_the_model(name, bundled):
    ids = torch.tensor([bundled.tokenizer.encode("<|start|><|user|> What is 12 + 30?<|assistant|> 42<|end|>")])
    quantized = reload(COMMITTED / name)
    with torch.inference_mode():
        difference = (quantized(ids).logits.float() - bundled.model(ids).logits).norm() / bundled.model(ids).logits.norm()
    assert 0.001 < difference < 0.3  # quantized, and still this model


def test_committed_artefacts_are_of_this_model_and_small():
    assert sum(f.stat().st_size for f in COMMITTED.rglob("*") if f.is_file()) <= 18_000_000
    for name, spec in ARTEFACTS.items():
        if name != "bitsandbytes-int8":
            assert report(COMMITTED / name)["method"] == spec.method


def test_reload_says_what_is_wrong(tmp_path):
    with pytest.raises(ModelUnavailable, match="is not a quantized model"):
        reload(tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    with pytest.raises(ModelUnavailable, match="could not be loaded by transformers"):
        reload(tmp_path)
    quantize_to(tmp_path / "changed", BUNDLED, Nf4())
    (tmp_path / "changed" / "config.json").write_text("{}")
    with pytest.raises(ModelUnavailable, match="config.json is not as it was written"):
        reload(tmp_path / "changed")


def test_every_artefact_has_the_groups_that_fit():
    """A model with an MLP of 192 columns is quantized in groups of 64, by us and by the toolkit."""
    config = LlamaConfig.from_pretrained(BUNDLED)
    assert {artefacts.plan_of(n, config) for n in ARTEFACTS} == {spec.plan for spec in ARTEFACTS.values()}
    config.intermediate_size = 192
    assert artefacts.plan_of("gptqmodel-awq", config) == Awq(group_size=64)
    assert artefacts.plan_of("bitsandbytes-nf4", config) == Nf4()


def test_same_codes(tmp_path):
    words = torch.tensor([[0x76543210, 0x11111111]], dtype=torch.int32)
    for name, tensor in (("a", words), ("b", words ^ torch.tensor([[0x00000005, 0]], dtype=torch.int32)), ("c", words)):
        (tmp_path / name).mkdir()
        save_file({("x.qweight" if name != "c" else "y.qweight"): tensor.contiguous()}, tmp_path / name / "model.safetensors")
    assert same_codes(tmp_path / "a", tmp_path / "a") == 1
    assert same_codes(tmp_path / "a", tmp_path / "b") == 15 / 16
    with pytest.raises(ValueError, match="same packed linears"):
        same_codes(tmp_path / "a", tmp_path / "c")


def test_a_full_disk_leaves_nothing(tmp_path):
    """A limit on the size of files stands for the full disk: the toolkit's process cannot write its 3 MB of weights."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(ToolkitFailed, match="bitsandbytes"):
            run("bitsandbytes", NF4, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_example_3_is_on_record():
    """The article's third example fails as printed, and runs with tokens."""
    steps = artefacts.example_3()
    assert steps["AutoGPTQ, three strings, as printed"].startswith("TypeError")
    assert steps["AutoGPTQ, the strings as tokens"] == "done"
