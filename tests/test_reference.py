"""Our quantizers against the toolkits, on this machine and in this run: the same numbers, and files that both sides read.
(autoawq word by word: chapter 6, which asserts it.)
"""

import json
import re
import subprocess
import sys
from textwrap import indent

import pytest
import torch
from safetensors.torch import load_file
from transformers import AwqConfig

from helpers.methods.awq import Awq
from helpers.methods.awq_gptq import AwqGptq
from helpers.methods.gptq import Gptq
from helpers.methods.int8 import RowInt8
from helpers.methods.keep import Keep
from helpers.methods.nf4 import Nf4
from helpers.methods.reference import AutoGptq
from helpers.models.checkpoint import quantize_to
from helpers.models.formats import GPTQ, GPTQ_V2, INT8
from helpers.models.method import Plan
from helpers.models.quantize import quantize_model
from helpers.models.reading import load_simulated, read_artefact
from helpers.models.source import BUNDLED, load
from helpers.models.texts import calibration, windows
from helpers.quantizers.gptq import gptq_columns
from helpers.toolkits import artefacts
from helpers.toolkits.artefacts import ARTEFACTS, COMMITTED, artefact, reload
from helpers.toolkits.compare import differing_words
from helpers.toolkits.process import ORIGINALS, Job, run

originals = pytest.mark.skipif(not (ORIGINALS / "transformers").is_dir(), reason="`make originals` has not been run")
SOURCE = str(BUNDLED)
SOME = {r"layers\.1\..*v_proj": Keep()}  # this one stays in 16 bits
IDS = [load().tokenizer.encode("<|start|><|user|> What is 12 + 30?<|assistant|> 42<|end|>")]


@pytest.fixture(scope="module")
def tokens(bundled):
    return windows(calibration(bundled.tokenizer), 128, 8)


@pytest.fixture(scope="module")
def written(tokens, tmp_path_factory):
    """Artefacts of ours in all formats."""
    folder = tmp_path_factory.mktemp("ours")
    plans = {"nf4": Nf4(), "int8": RowInt8(), "gptq": Gptq(), "gptq_desc_act": Gptq(desc_act=True), "awq": Awq(),
             "gptq_v2": Gptq(sym=False, group_size=64), "awq_by_gptq": AwqGptq(group_size=64),
             "gptq_3_bits": Gptq(bits=3), "awq_gptq": AwqGptq(sym=True),
             "gptq_row": Gptq(group_size=-1), "gptq_mixed": Plan(Gptq(), {"q_proj$": Gptq(bits=8)} | SOME)}
    plans |= {f"{m.name}_some": Plan(m, SOME) for m in (Nf4(), RowInt8(), Gptq(), Awq())}
    for name, plan in plans.items():
        quantize_to(folder / name, BUNDLED, plan, tokens, GPTQ_V2 if name == "gptq_v2" else None)
    return folder


@pytest.fixture(scope="module")
def their_int8(tmp_path_factory):
    """bitsandbytes' int8 file, which is not committed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artefacts, "CACHE", tmp_path_factory.mktemp("theirs"))
        return artefact("bitsandbytes-int8", rebuild=True)


def assert_same_tensors(outcome, theirs, form):
    """Every packed tensor of 28 linears, and by the count that the book shows."""
    tensors = load_file(theirs / "model.safetensors")
    assert len(outcome.codes) == 28
    for name, q in outcome.codes.items():
        for end, tensor in form.pack(q).items():
            assert torch.equal(tensor, tensors[f"{name}.{end}"]), f"{name}.{end}"
    differing, words = differing_words(outcome, theirs, form)
    assert differing == 0 < words


@originals
def test_gptq_of_the_whole_model_is_auto_gptqs_word_for_word(tokens, tmp_path):
    run("autogptq", Job("gptq", SOURCE, tokens), tmp_path / "theirs", originals=True)
    outcome = quantize_model(load().model, AutoGptq(), tokens)
    assert outcome.tokens == 1024
    assert_same_tensors(outcome, tmp_path / "theirs", GPTQ)


def test_gptq_is_gptqmodels_on_the_same_inputs(tokens, tmp_path):
    """Module by module, on the weights and Gram matrices that its solver was given; it returns W_hat in bf16."""
    run("gptqmodel", Job("gptq", SOURCE, tokens, {"keep_problems": True}), tmp_path / "theirs")
    kept = load_file(tmp_path / "theirs" / "problems.safetensors")
    names = [k.removesuffix(".W") for k in kept if k.endswith(".W")]
    assert len(names) == 28
    for name in names:
        ours = gptq_columns(kept[f"{name}.W"], kept[f"{name}.H"], damp_percent=0.05)
        assert ours.damp_percent == 0.05
        assert torch.equal(ours.quantized.dequantize().bfloat16(), kept[f"{name}.W_hat"].bfloat16()), name


def test_nf4_file_is_bitsandbytes_file(written):
    ours, theirs = (load_file(f / "model.safetensors") for f in (written / "nf4", COMMITTED / "bitsandbytes-nf4"))
    assert set(ours) == set(theirs) and all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_int8_file_is_bitsandbytes_file(written, their_int8):
    ours, theirs = (load_file(f / "model.safetensors") for f in (written / "int8", their_int8))
    assert sum(t.dtype == torch.int8 for t in theirs.values()) == 28
    assert set(ours) == set(theirs) and all(torch.equal(ours[k], theirs[k]) for k in theirs)
    settings = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (written / "int8", their_int8)]
    assert all(settings[1][k] == v for k, v in settings[0].items() if k != "llm_int8_skip_modules")


def logits(model):
    with torch.inference_mode():
        return model(torch.tensor(IDS)).logits.float()


def off(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", ["nf4", "int8", "gptq", "gptq_desc_act", "gptq_v2", "gptq_3_bits", "gptq_row", "awq_gptq",
                                  "awq", "awq_by_gptq", "nf4_some", "int8_some", "gptq_some", "awq_some"])
def test_ours_load_in_transformers(written, name):
    # AWQ's automatic kernel computes in bf16
    exact = {"quantization_config": AwqConfig(bits=4, backend="torch_awq")} if re.match("awq(?!_gptq)", name) else {}
    # bitsandbytes computes NF4 in bf16, and rounds the inputs of int8 linears to 8 bits
    tolerance = {"nf4": 0.01, "int8": 0.03}.get(name.split("_")[0], 0.001)
    assert off(logits(reload(written / name, **exact)), logits(load_simulated(written / name))) < tolerance


@pytest.mark.parametrize("name", [n for n in ARTEFACTS if n != "bitsandbytes-int8"])
def test_theirs_load_in_ours(name):
    assert off(logits(load_simulated(COMMITTED / name)), logits(reload(COMMITTED / name))) < 0.01


def test_their_int8_loads_in_ours(their_int8):
    assert read_artefact(their_int8).form is INT8
    assert off(logits(load_simulated(their_int8)), logits(reload(their_int8))) < 0.03


LOADERS = {
    "gptqmodel": """
torch.compiler.set_stance("force_eager")
from gptqmodel import BACKEND, GPTQModel
model = GPTQModel.load(folder, device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH).model.float()
""",
    "gptq": """
from auto_gptq import AutoGPTQForCausalLM
model = AutoGPTQForCausalLM.from_quantized(folder, device="cpu", disable_exllama=True, use_safetensors=True,
                                           torch_dtype=torch.float32).model.float()
""",
    "awq": """
from awq.models import base  # on a CPU it would insist on Intel's kernels
base.get_best_device = lambda: "cuda:0"
from awq import AutoAWQForCausalLM
model = AutoAWQForCausalLM.from_quantized(folder, fuse_layers=False, device_map={"": "cpu"}, safetensors=True).model
""",
}


def loaded_elsewhere(folders, loader, path=""):
    """Logits of the last token of each folder, from one process in which a toolkit's own loader reads them."""
    script = (f"import sys, torch\nfor folder in {list(map(str, folders))}:\n{indent(LOADERS[loader], '    ')}\n"
              f"    with torch.inference_mode():\n"
              f"        print('LOGITS', model(torch.tensor({IDS})).logits[0, -1].float().tolist())\n")
    done = subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": path, "PATH": "", "HF_HUB_OFFLINE": "1"},
                          capture_output=True, text=True)
    found = re.findall(r"LOGITS (\[.*\])", done.stdout)
    assert len(found) == len(folders), done.stderr[-2000:]
    return [torch.tensor(json.loads(values)) for values in found]


@originals
@pytest.mark.parametrize("names, tolerance", [(("gptq", "gptq_desc_act"), 0.001), (("awq", "awq_by_gptq"), 0.01)])
def test_ours_load_in_the_originals(written, names, tolerance):
    for name, theirs in zip(names, loaded_elsewhere([written / n for n in names], names[0], str(ORIGINALS)), strict=True):
        assert off(theirs, logits(load_simulated(written / name))[0, -1]) < tolerance, name


def test_ours_load_in_gptqmodel(written):
    """By its own loader, which also reads what transformers does not: other bits for some linears."""
    names = ("gptq", "gptq_v2", "gptq_mixed")
    for name, theirs in zip(names, loaded_elsewhere([written / n for n in names], "gptqmodel"), strict=True):
        assert off(theirs, logits(load_simulated(written / name))[0, -1]) < 0.001, name
