"""`python -m helpers.quantize`: one's own model by one command, and one line for what is wrong."""

import json

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from helpers.files import PROVENANCE
from helpers.models.reading import load_simulated, read_artefact
from helpers.models.source import BUNDLED, DATA
from helpers.quantize import main

TALES = str(DATA / "text" / "tales.txt")


@pytest.mark.parametrize("options, form", [
    (["--method", "awq", "--bits", "4", "--group", "64", "--no_clip"], "awq"), (["--method", "nf4"], "nf4"),
    (["--bits", "3", "--group", "64", "--no_sym", "--no_search", "--inputs", "block"], "gptq_v2"),
    (["--method", "rtn", "--format", "gptq_v2", "--keep", "o_proj", "--keep", "down"], "gptq_v2")])
def test_a_model_becomes_an_artefact(tmp_path, options, form, capsys):
    assert main(["bundled", str(tmp_path / "out"), "--text", TALES, "--windows", "4", "--length", "64", *options]) == 0
    read = read_artefact(tmp_path / "out")
    record = json.loads((tmp_path / "out" / PROVENANCE).read_text())
    assert read.form.name == form and record["text"] == "tales.txt"
    assert len(read.linears) == (20 if "--keep" in options else 28)
    said = capsys.readouterr().out
    assert "MB become" in said and said.count("left in 16 bits") == 28 - len(read.linears)
    if "--no_search" in options:
        assert record["plan"]["default"] == {"method": "gptq", "bits": 3, "group_size": 64, "sym": False, "desc_act": False,
                                             "act_group_aware": True, "damp_percent": 0.01, "search": False}
        assert record["plan"]["inputs"] == "block" and record["tokens"] == 256


@pytest.mark.parametrize("arguments, said", [
    (["bundled", "OUT", "--bits", "9"], "bits: expected 2 to 8, got 9"),
    (["bundled", "OUT"], "--text: gptq looks at what the model reads"),
    (["bundled", "OUT", "--text", "/no/such/file"], "/no/such/file cannot be read"),
    (["/no/such/model", "OUT", "--method", "nf4"], "neither 'bundled' nor 'small', nor a folder"),
    (["bundled", str(BUNDLED), "--method", "nf4"], "choose another folder"),
    (["bundled", "OUT", "--method", "nf4", "--keep", "q_porj"], "'q_porj' matches no linear"),
    (["bundled", "OUT", "--method", "nf4", "--format", "awq"], "nf4, fp16.* does not fit the awq format|nf4 does not fit"),
    (["bundled", "OUT", "--text", TALES, "--length", "100000", "--windows", "0"], "at least one window of at least one token")])
def test_bad_input_ends_in_one_line(arguments, said, tmp_path, capsys):
    assert main([a.replace("OUT", str(tmp_path / "out")) for a in arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and pytest.importorskip("re").search(said, error)
    assert list(tmp_path.iterdir()) == []


def test_help_names_the_chapters_and_the_methods_own_options(capsys):
    for method, option in (("awq", "--no_clip"), ("gptq", "--damp_percent"), ("nf4", "--block_size")):
        with pytest.raises(SystemExit) as stopped:
            main(["--method", method, "--help"])
        said = capsys.readouterr().out
        assert stopped.value.code == 0 and option in said and "chapter" in said and "--text" in said


def test_what_no_method_takes_is_said(tmp_path, capsys):
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(
        vocab_size=1280, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, max_position_embeddings=256)).half().save_pretrained(tmp_path / "moe")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "moe" / name).write_bytes((BUNDLED / name).read_bytes())
    assert main([str(tmp_path / "moe"), str(tmp_path / "out"), "--method", "rtn"]) == 0
    assert capsys.readouterr().out.count("which is in no linear") == 3
    load_simulated(tmp_path / "out")
