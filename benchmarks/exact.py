"""The same bits as the libraries on a real model, and who reads the files: `python -m benchmarks.exact`, some 20 minutes on one
core. SmolLM2's 210 linears: NF4 against bitsandbytes, GPTQ's packed words against auto-gptq's on the same windows, and our
GPTQ and AWQ files in every engine that is installed. Writes data/results/exact.json.
"""

import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.sweeps import SUBJECTS
from helpers.files import folder_hash
from helpers.harness.portability import matrix
from helpers.methods.awq import Awq
from helpers.methods.gptq import Gptq
from helpers.methods.reference import AutoGptq
from helpers.models.checkpoint import quantize_to
from helpers.models.fetch import origin
from helpers.models.formats import GPTQ
from helpers.models.layers import linears
from helpers.models.quantize import quantize_model
from helpers.models.source import load
from helpers.quantizers.nf4 import quantize_absmax, quantize_nf4
from helpers.results import Record, save, versions_in
from helpers.toolkits.bitsandbytes import config
from helpers.toolkits.compare import differing_words
from helpers.toolkits.process import ORIGINALS, ROOT, Job, run

WINDOWS, LENGTH = 8, 128


def nf4(folder: Path) -> dict[str, int]:
    """Linears, weights, and values (packed codes, absmax in 8 bits, its scales) that differ from bitsandbytes'."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", quantization_config=config("nf4"))
    stored, told = load(str(folder), dtype="auto").model, {"linears": 0, "weights": 0, "differ": 0}
    for name, module in linears(theirs):
        q, state = quantize_nf4(stored.get_submodule(name).weight.float()), module.weight.quant_state
        twice = quantize_absmax(q.absmax)
        pairs = ((q.packed, module.weight.data.flatten()), (twice.codes, state.absmax.flatten()),
                 (twice.absmax, state.state2.absmax))
        told["differ"] += sum(int((a != b).sum()) for a, b in pairs)
        told["linears"], told["weights"] = told["linears"] + 1, told["weights"] + torch.Size(q.shape).numel()
    return told


def gptq(folder: Path, tokens, group: int, scratch: Path) -> dict[str, int]:
    """Linears, packed words (codes, zeros, scales), and those that differ from auto-gptq's."""
    run("autogptq", Job("gptq", str(folder), tokens, {"group_size": group}), scratch / "theirs", originals=True)
    outcome = quantize_model(load(str(folder)).model, AutoGptq(group_size=group), tokens)
    different, total = differing_words(outcome, scratch / "theirs", GPTQ)
    return {"linears": len(outcome.codes), "words": total, "differ": different}


def main() -> None:
    subject = SUBJECTS["small"]
    folder, tokens = subject.base.folder, subject.tokens(length=LENGTH)[:WINDOWS]
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        told = {"calibration": [WINDOWS, LENGTH], "nf4": nf4(folder), "gptq": gptq(folder, tokens, subject.group, scratch)}
        print(told)
        methods = {"gptq": Gptq(group_size=subject.group), "gptq-asymmetric": Gptq(group_size=subject.group, sym=False),
                   "awq": Awq(group_size=subject.group)}
        for name, method in methods.items():
            quantize_to(scratch / name, folder, method, tokens)
        found = matrix({name: scratch / name for name in methods}, tokenizer=folder)
    told["engines"] = {name: {engine: asdict(x) for engine, x in row.items()} for name, row in found.items()}
    told["versions"] = {ORIGINALS.name: versions_in(ORIGINALS), **{
        place.parts[-4]: versions_in(place) for place in ROOT.glob(".venv-*/lib/python*/site-packages")}}
    print(save(Record("exact", told | {"model": origin(folder)}, command="python -m benchmarks.exact",
                      model_sha256=folder_hash(folder))))


if __name__ == "__main__":
    main()
