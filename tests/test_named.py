"""What is compared, by name: toolkits' artefacts, files of ours, folders; and what is wrong with a name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from helpers.book import random_llama
from helpers.files import folder_hash
from helpers.harness import named as module
from helpers.harness.named import TOOLKIT, UnknownMethod, located, named, random_weights
from helpers.harness.variants import Folder, Original, OurArtefact, ToolkitArtefact
from helpers.methods.gptq import Gptq
from helpers.methods.rtn import Rtn
from helpers.models.quantize import quantized
from helpers.models.reading import load_simulated, read_artefact
from helpers.models.source import DATA, ModelUnavailable, load, stored_names

WINDOWS = [tuple(range(5, 69)), tuple(range(70, 134))]


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A model of another shape (128 does not divide its MLP), and an empty cache."""
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    return Original(str(random_llama("named-for-tests", 128, 192, tied=False)))


def test_of_the_bundled_model_a_method_is_a_toolkits_artefact():
    found = named([*TOOLKIT, "autogptq-gptq"], Original(), WINDOWS)
    assert all(isinstance(v, ToolkitArtefact) and v.exact for v in found)
    assert [v.artefact for v in found] == [*TOOLKIT.values(), "autogptq-gptq"]
    assert [v.name for v in found] == [*TOOLKIT, "autogptq-gptq"]


def test_of_another_model_it_is_a_file_of_ours_made_once(foreign, monkeypatch, capfd):
    names = ["int8", "nf4", "gptq", "awq", "gptq:bits=3,sym=false"]
    found = named(names, foreign, WINDOWS, progress=False)
    assert "blocks" not in capfd.readouterr().err  # no bar
    assert [v.name for v in found] == names and all(isinstance(v, OurArtefact) and v.exact for v in found)
    assert [read_artefact(v.folder).form.name for v in found] == ["int8", "nf4", "gptq", "awq", "gptq_v2"]
    assert found[2].plan.default == Gptq(4, 64) and found[4].plan.default == Gptq(3, 64, sym=False)
    expected = quantized(load(foreign.model).model, found[4].plan, WINDOWS)
    for name, weight in load_simulated(found[4].folder).state_dict().items():
        assert torch.equal(weight, expected.state_dict()[name]), name
    monkeypatch.setattr(module, "quantize_to", None)  # nothing is made again
    assert [v.folder for v in named(names, foreign, WINDOWS)] == [v.folder for v in found]
    assert named(["nf4"], foreign, WINDOWS[:1])[0].folder == found[1].folder  # which no text calibrates
    with pytest.raises(TypeError):
        named(["gptq"], foreign, WINDOWS[:1])


def test_our_files_are_made_on_the_device_that_is_asked_for(foreign, monkeypatch):
    """And are others: a GPU adds up in another order."""
    made = []
    monkeypatch.setattr(module, "quantize_to", lambda *args, **_: made.append(args[6]))
    found = [named(["gptq"], foreign, WINDOWS, device=device)[0].folder for device in ("cpu", "cuda")]
    assert made == ["cpu", "cuda"] and found[0] != found[1]


def test_the_bits_are_those_of_the_toolkits_format(bundled, tmp_path, monkeypatch):
    """bitsandbytes' NF4 of the bundled model, and ours: the same file, byte for byte in every tensor."""
    monkeypatch.setattr(module, "CACHE", tmp_path)
    mine, theirs = named(["nf4:block_size=64", "nf4"], Original(), ())
    ours, bitsandbytes = (load_file(v.folder / "model.safetensors") for v in (mine, theirs))
    assert isinstance(mine, OurArtefact) and set(ours) == set(bitsandbytes)
    packed = [k for k in ours if ours[k].dtype == torch.uint8 and "quant_state" not in k]
    assert len(packed) > 28 and all(torch.equal(ours[k], bitsandbytes[k]) for k in packed)


def test_folders(foreign, tmp_path, monkeypatch):
    made = named(["nf4"], foreign, ())[0].folder
    monkeypatch.chdir(made.parent)
    [found] = named([made.name], foreign, ())
    assert isinstance(found, Folder) and found.folder == made.resolve() and found.name == made.name and found.plan is None
    assert located([made.name, "nf4", "gptq:bits=3", "nothing"]) == [str(made.resolve()), "nf4", "gptq:bits=3", "nothing"]
    for copy in (tmp_path / "twin" / made.name, tmp_path / "16 bits"):
        shutil.copytree(made, copy)
    for names, said in ((["../16 bits"], "two variants are called '16 bits'"), (["nf4", "nf4"], "'nf4' is there twice"),
                        ([made.name, f"../twin/{made.name}"], f"two variants are called '{made.name}'")):
        with pytest.raises(UnknownMethod, match=said):
            named(names, foreign, ())


@pytest.mark.parametrize("name, said", [
    ("qptq", "'qptq' is no method (awq, "),
    ("autogptq", "'autogptq' is no method"), ("/no/such", "no folder with a config.json"),
    ("gptq:bits", "gptq: 'bits': expected setting=value, of act_group_aware, bits, "),
    ("gptq:bite=3", "'bite=3': expected setting=value"),
    ("gptq:bits=three", "gptq: bits: 'three': expected a whole number"),
    ("gptq:bits=3.5", "bits: '3.5': expected a whole number"),
    ("gptq:bits=9", "gptq: bits: expected 2 to 8, got 9"), ("gptq:sym=1", "sym: '1': expected true or false"),
    ("gptq:damp_percent=true", "damp_percent: 'true': expected a number"),
    ("gptq:bits=3,bits=4", "bits: '4': expected a whole number, once"),
    ("int8:bits=8", "int8: 'bits=8': expected setting=value")])
def test_what_is_wrong_with_a_name(name, said):
    with pytest.raises(UnknownMethod) as stopped:
        named([name], Original(), WINDOWS)
    assert str(stopped.value).startswith("methods: ") and said in str(stopped.value)


def test_random_weights_have_the_shapes_of_a_config(foreign, tmp_path):
    config = tmp_path / "config.json"
    config.write_bytes((foreign.folder / "config.json").read_bytes())
    folder = random_weights(config)
    assert random_weights(config) == folder and sorted(stored_names(folder)) == sorted(stored_names(foreign.folder))
    assert folder_hash(folder) != folder_hash(foreign.folder)
    full = Original(str(folder))
    found = named(["gptq", "awq", "awq+gptq"], full, (), shapes=True)  # nothing is calibrated: only the shapes count
    assert [v.plan.default for v in found] == [Rtn(4, 64), *[Rtn(4, 64, sym=False)] * 2]
    assert [read_artefact(v.folder).form.name for v in found] == ["gptq", "awq", "awq"]
    assert all(len(read_artefact(v.folder).linears) == 14 for v in found) and found[0].predicted() == found[0].measured()
    other = json.loads(config.read_text()) | {"num_hidden_layers": 1}
    config.write_text(json.dumps(other))
    assert random_weights(config) != folder
    for content in ("{", '{"model_type": "abacus"}'):
        config.write_text(content)
        with pytest.raises(ModelUnavailable, match="config.json is no model's config.json"):
            random_weights(config)
    with pytest.raises(ModelUnavailable, match="is no model's config.json"):
        random_weights(DATA / "no" / "config.json")
