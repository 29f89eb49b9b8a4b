"""Effort of ours and the toolkits, in turn: seconds to a 4-bit file and to a first answer: `python -m benchmarks.effort`, on
two quiet cores; a run that was stopped goes on.

Each run is a process of its own, not warmed up, whose start is not counted. All see the same calibration windows, as few as
autoawq can do in minutes. Ours is counted from the 16-bit folder to the file, hashes included (`seconds`). Of a toolkit
`seconds` is its quantize call alone, so without loading and saving; `with_imports` adds those, and its own imports, which
cannot be told apart from outside. bitsandbytes quantizes while it loads: its `seconds` is that load, and it leaves no file.
Writes the seconds of every run to data/results/effort.json.
"""

import argparse
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from pkgutil import resolve_name
from unittest.mock import patch

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from benchmarks.speed import LARGER, random_model
from helpers.files import folder_hash, key_hash
from helpers.harness.compare import circumstances
from helpers.measure.memory import alone
from helpers.methods.awq import Awq
from helpers.methods.gptq import Gptq
from helpers.methods.nf4 import Nf4
from helpers.models.checkpoint import quantize_to
from helpers.models.source import BUNDLED, Source, load, shell
from helpers.models.texts import calibration, windows
from helpers.models.walk import Stream
from helpers.results import RESULTS, Record, save, versions_in
from helpers.store import Store
from helpers.toolkits.artefacts import reload
from helpers.toolkits.bitsandbytes import config, usable
from helpers.toolkits.process import ORIGINALS, ROOT, Job, run

PARTIAL = ROOT / ".cache" / "effort"  # runs and files so far; removed when the record is written
METHODS = {"NF4": Nf4(), "GPTQ": Gptq(), "AWQ": Awq()}
TOOLKITS = {"auto-gptq GPTQ": ("autogptq", "gptq", True), "GPTQModel GPTQ": ("gptqmodel", "gptq", False),
            "autoawq AWQ": ("autoawq", "awq", True), "GPTQModel AWQ": ("gptqmodel", "awq", False)}
ANSWERS = ("16 bits", "bitsandbytes NF4", "NF4 file", "GPTQ file", "AWQ file")  # the files are ours, the loaders transformers'
PAIRS = {"ours": ("ours GPTQ", "ours AWQ"), "GPTQModel": ("GPTQModel GPTQ", "GPTQModel AWQ"),
         "archived": ("auto-gptq GPTQ", "autoawq AWQ")}
SIDES = (*(f"ours {m}" for m in METHODS), *TOOLKITS, *ANSWERS)
PARTS = {"gram": "helpers.models.method.Gram.add", "factor": "helpers.quantizers.gptq.feedback_factor",
         "solve": "helpers.methods.gptq.gptq", "scale_search": "helpers.methods.awq.scale_folds",
         "clip_search": "helpers.quantizers.awq.clip_by_gram", "round_awq": "helpers.quantizers.awq.quantize_awq",
         "round_nf4": "helpers.methods.nf4.quantize_nf4", "layout": "helpers.models.walk.look",
         "pack": "helpers.models.checkpoint.Writer.add", "write": "helpers.models.checkpoint.Writer.finish"}


def timed(function: Callable, part: str, spent: Counter) -> Callable:
    """The function, its seconds added to spent[part]."""
    @wraps(function)
    def inner(*args, **kwargs):
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[part] += time.perf_counter() - started
    return inner


def ours(folder: Path, method: str, tokens, out: Path) -> dict[str, float]:
    """Seconds from folder to file `out`, and by part: `solve` without `factor`, `rest` is forward passes and reading; the parts
    add up to `seconds`. `one_pass`: all tokens once through the blocks of a model in memory, beside it."""
    shell(folder)  # imports the model's class
    spent: Counter = Counter()
    with ExitStack() as stack:
        for part, target in PARTS.items():
            stack.enter_context(patch(target, timed(resolve_name(target), part, spent)))
        started = time.perf_counter()
        quantize_to(out, folder, METHODS[method], tokens)
        seconds = time.perf_counter() - started
    spent["solve"] -= spent["factor"]
    parts = {part: s for part, s in spent.items() if s} | {"rest": seconds - spent.total()}
    source = Source.of(load(str(folder)).model)
    stream, started = Stream.start(source, tokens), time.perf_counter()
    stream.through(*source.blocks)
    return {"seconds": seconds, "one_pass": time.perf_counter() - started} | {f"part {k}": s for k, s in parts.items()}


def answer(way: str, folder: Path) -> dict[str, float]:
    """Seconds until a model of `folder` is loaded and has given the first token of a prompt of 32: the second time in this
    process, and the first time (`cold_`), which imports what the loader needs. 16 bits and files of GPTQ and AWQ are computed
    in fp32, NF4 in what bitsandbytes makes of it."""
    def from_sixteen_bits():
        return usable(AutoModelForCausalLM.from_pretrained(folder, quantization_config=config("nf4"), device_map="cpu").eval())

    loader = {"16 bits": lambda: load(str(folder)).model, "bitsandbytes NF4": from_sixteen_bits}.get(way, lambda: reload(folder))
    ids, found = torch.arange(5, 37)[None], {}
    for prefix in ("cold_", ""):
        started = time.perf_counter()
        model = loader()
        loaded = time.perf_counter()
        with torch.inference_mode():
            model(ids).logits[0, -1].argmax()
        found |= {f"{prefix}seconds": loaded - started, f"{prefix}first_token": time.perf_counter() - started}
    return found


def measured(side: str, source: Path, tokens, files: Path) -> dict[str, float]:
    """One run of one side on the model in folder `source`; its own file is left in `files`. Raises ToolkitMissing,
    ToolkitFailed and Died."""
    if side in TOOLKITS:
        module, method, originals = TOOLKITS[side]
        report = run(module, Job(method, str(source), tokens), files / side, originals, 7200)
        return {"seconds": report["quantize_seconds"], "with_imports": report["seconds"]}
    method = side.removeprefix("ours ").removesuffix(" file")
    if side.startswith("ours "):
        return alone(ours, source, method, tokens, files / method)
    if side.endswith(" file") and not (files / method).is_dir():
        quantize_to(files / method, source, METHODS[method], tokens)
    return alone(answer, side, files / method if side.endswith(" file") else source)


def summary(runs: Mapping[str, list[dict[str, float]]]) -> dict:
    """{quantize, answer: {side: {what: seconds of each run}}}, and of the medians GPTQ / AWQ by whose they are, and the share
    of our GPTQ that its Hessian takes: summing it up (`gram`), and with its factorisation."""
    lists = {side: {what: [r[what] for r in rows] for what in rows[0]} for side, rows in runs.items()}
    middle = {side: {what: statistics.median(v) for what, v in whats.items()} for side, whats in lists.items()}
    gptq = middle["ours GPTQ"]
    return {"quantize": {s: lists[s] for s in SIDES if s not in ANSWERS} | {"bitsandbytes NF4": {
                k: v for k, v in lists["bitsandbytes NF4"].items() if k.endswith("seconds")}},
            "answer": {s: lists[s] for s in ANSWERS},
            "gptq_over_awq": {who: middle[g]["seconds"] / middle[a]["seconds"] for who, (g, a) in PAIRS.items()},
            "hessian_share_of_gptq": {"gram": gptq["part gram"] / gptq["seconds"],
                                      "with_factor": (gptq["part gram"] + gptq["part factor"]) / gptq["seconds"]}}


def main(repeats: Mapping[str, int], count: int, length: int, out: Path, work: Callable = measured, at: Path = PARTIAL) -> Path:
    """Measure these models, {bundled or larger: repeats}; the record's path."""
    tokens = windows(calibration(load().tokenizer), length, count)
    data = {"calibration": {"name": "instructions", "length": length, "windows": len(tokens), "tokens": count * length},
            "originals": versions_in(ORIGINALS), "threads": torch.get_num_threads(), "models": {}}
    for name, times in repeats.items():
        source = BUNDLED if name == "bundled" else random_model(LARGER, at / "larger")
        key = {"weights": folder_hash(source), "tokens": key_hash(tokens), "originals": data["originals"], **circumstances()}
        runs: dict[str, list] = {side: [] for side in SIDES}
        for n in tqdm(range(times), desc=name):
            for side, rows in runs.items():
                cell = Store(at / "cells").get(side, key | {"side": side, "repeat": n}, lambda side=side, source=source: {
                    k: np.array(v) for k, v in work(side, source, tokens, at / f"{name} files").items()})
                rows.append({k: float(v) for k, v in cell.arrays.items()})
        with torch.device("meta"):
            parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(shell(source).config).parameters())
        data["models"][name] = {"parameters": parameters, "repeats": times} | summary(runs)
    path = save(Record("effort", data, seed=0, model_sha256=folder_hash(BUNDLED)), out)
    shutil.rmtree(at)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=("bundled", "larger"), default=("bundled", "larger"))
    parser.add_argument("--repeats", type=int, default=3, help="of the bundled model; the larger takes one, as autoawq needs minutes")
    parser.add_argument("--windows", type=int, nargs=2, metavar=("COUNT", "LENGTH"), default=(8, 128), help="of calibration tokens")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    args = parser.parse_args()
    print(main({m: args.repeats if m == "bundled" else 1 for m in args.models}, *args.windows, args.out))
