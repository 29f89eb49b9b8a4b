"""Is ours the toolkits' on a real model too? `python -m benchmarks.exact`, half an hour on one core, goes on where it stopped.

On all linears of the small model: the file of NF4 against that of bitsandbytes, tensor by tensor; the weights that auto-gptq's
and GPTQModel's solvers find against ours, each on the W and H that the toolkit's solver was given (end to end the two
implementations of the forward pass round differently, and GPTQ makes that visible). And our files in transformers, GPTQModel
and vLLM: are the answers those of exact dequantization? Writes data/results/small_exact.json.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.sweeps import SUBJECTS
from helpers.files import key_hash, write_atomically
from helpers.harness.compare import circumstances
from helpers.harness.portability import ENGINES, matrix
from helpers.measure.tasks import encode, examples
from helpers.methods.awq import Awq
from helpers.methods.gptq import Gptq
from helpers.methods.nf4 import Nf4
from helpers.models.checkpoint import quantize_to
from helpers.models.fetch import origin
from helpers.quantizers.gptq import gptq_columns
from helpers.results import Record, save, versions_in
from helpers.toolkits.artefacts import artefact
from helpers.toolkits.compare import all_tensors
from helpers.toolkits.process import ORIGINALS, ROOT, Job, run

SMALL = SUBJECTS["small"]
FOLDER, GROUP = SMALL.base.folder, SMALL.group
FEW = SMALL.tokens(length=128, count=8)
SOLVERS = {"autogptq": (0.01, torch.float32), "gptqmodel": (0.05, torch.bfloat16)}  # their damping, and what they return
FILES = {"NF4": Nf4(), "GPTQ": Gptq(4, GROUP, act_group_aware=False), "AWQ": Awq(4, GROUP)}
READERS = ("transformers", "GPTQModel", "vLLM")


def nf4_files() -> dict[str, int]:
    """Tensors of the two files, and values in them that differ."""
    with tempfile.TemporaryDirectory() as scratch:
        quantize_to(Path(scratch) / "nf4", FOLDER, Nf4())
        ours, theirs = all_tensors(Path(scratch) / "nf4"), all_tensors(artefact("bitsandbytes-nf4", "small"))
    assert set(ours) == set(theirs)
    packed = [n for n in ours if n.endswith(".weight") and ours[n].dtype == torch.uint8]
    return {"linears": len(packed), "weights": 2 * sum(ours[n].numel() for n in packed), "tensors": len(ours),
            "differ": sum(int((ours[n] != theirs[n]).sum()) for n in ours)}


def solver(toolkit: str) -> dict[str, int]:
    """Linears, their weights, and how many get another value from our solver than from the toolkit's."""
    found, (damp, dtype) = {"linears": 0, "weights": 0, "differ": 0}, SOLVERS[toolkit]
    with tempfile.TemporaryDirectory() as scratch:
        run(toolkit, Job("gptq", str(FOLDER), FEW, {"group_size": GROUP, "keep_problems": True}), Path(scratch) / "theirs",
            originals=toolkit == "autogptq", timeout=5400)
        kept = load_file(Path(scratch) / "theirs" / "problems.safetensors")
    for name in tqdm([k.removesuffix(".W") for k in kept if k.endswith(".W")], desc=toolkit):
        W, H, theirs = (kept[f"{name}.{what}"] for what in ("W", "H", "W_hat"))
        ours = gptq_columns(W, H, 4, GROUP, damp_percent=damp).quantized.dequantize()
        found["linears"] += 1
        found["weights"] += W.numel()
        found["differ"] += int((ours.to(dtype) != theirs.to(dtype)).sum())
    return found


def readers() -> dict[str, dict]:
    """{file: {engine: what portability.Loads says}} of ours, on 6 questions; GPTQModel takes a second a token on a CPU."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    asked = [list(i.ids[:i.start]) for i in (encode(tokenizer, e) for e in examples("english_judge", limit=1))]
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in FILES}
        for name, method in FILES.items():
            quantize_to(folders[name], FOLDER, method, SMALL.tokens(count=32) if method.keeps else ())
        found = matrix(folders, {n: ENGINES[n] for n in READERS}, asked, FOLDER, timeout=1800)
    return {name: {engine: asdict(x) for engine, x in row.items()} for name, row in found.items()}


PARTS: dict[str, Callable[[], dict]] = {
    "NF4, file against bitsandbytes": nf4_files, "GPTQ, solver of auto-gptq": lambda: solver("autogptq"),
    "GPTQ, solver of GPTQModel": lambda: solver("gptqmodel"), "our files in engines": readers}


def main() -> None:
    done = ROOT / ".cache" / "exact.json"
    known, found = json.loads(done.read_text()) if done.is_file() else {}, {}
    for name, part in PARTS.items():
        if (key := key_hash([name, circumstances(), SMALL.base.weights, versions_in(ORIGINALS)])) not in known:
            known[key] = part()
            write_atomically(done, json.dumps(known))
        found[name] = known[key]
        print(name, found[name])
    others = {place.parts[-4]: versions_in(place) for place in ROOT.glob(".venv-*/lib/python*/site-packages")}
    found |= {"model": origin(FOLDER), "versions": {ORIGINALS.name: versions_in(ORIGINALS), **others}}
    print(save(Record("small_exact", found, command="python -m benchmarks.exact", model_sha256=SMALL.base.weights)))


if __name__ == "__main__":
    main()
