"""Seconds to a 4-bit file and to a first answer, ours and the toolkits' in turn: `python -m benchmarks.effort`, some 12 minutes
on two quiet cores; a run that was stopped goes on. Writes data/results/effort.json.

Each run is a process of its own, not warmed up, whose start is not counted; all see the same calibration windows. Of ours
`seconds` is from the 16-bit folder to the file, hashes included; of a toolkit its quantize call (`with_imports` adds loading,
saving and its imports); of bitsandbytes, which quantizes while it loads, that load. Ratios and shares are of medians."""

import argparse
import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from pkgutil import resolve_name
from statistics import median
from time import perf_counter
from unittest.mock import patch

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from benchmarks.speed import LARGER, random_model
from helpers.files import code_hash, folder_hash, key_hash, write_atomically
from helpers.measure.memory import alone
from helpers.methods.awq import Awq
from helpers.methods.gptq import PLAIN, Gptq
from helpers.methods.nf4 import Nf4
from helpers.models.checkpoint import quantize_to
from helpers.models.source import BUNDLED, load, shell
from helpers.models.texts import calibration, windows
from helpers.results import RESULTS, Record, machine, save, versions, versions_in
from helpers.toolkits.artefacts import ARTEFACTS, reload
from helpers.toolkits.bitsandbytes import config, usable
from helpers.toolkits.process import ORIGINALS, ROOT, Job, run

PARTIAL, LENGTH = ROOT / ".cache" / "effort", 128  # runs and files so far, removed when the record is written; tokens a window
TOOLKITS = ("autogptq-gptq", "gptqmodel-gptq", "autoawq-awq", "gptqmodel-awq")
ANSWER = ("16 bits", "bitsandbytes-nf4", "file-nf4", "file-gptq", "file-awq")  # the files are ours, the loaders transformers'
METHODS = {"nf4": Nf4(), "gptq": Gptq(**PLAIN), "awq": Awq()}  # with the settings that the toolkits are given
SIDES = ("ours-nf4", "ours-gptq", "ours-awq", *TOOLKITS, *ANSWER)
PAIRS = {"ours": ("ours", "ours"), "GPTQModel": ("gptqmodel", "gptqmodel"), "archived": ("autogptq", "autoawq")}
PARTS = {"gram": "models.method.Gram.add", "factor": "quantizers.gptq.feedback_factor", "solve": "methods.gptq.gptq",
         "scale search": "methods.awq.scale_folds", "clip search": "quantizers.awq.clip_by_gram", "layout": "models.walk.look",
         "error": "models.quantize.output_error", "pack": "models.checkpoint.Writer.add",
         "write": "models.checkpoint.Writer.finish"}


def ours(folder: Path, method: str, tokens, out: Path) -> dict[str, float]:
    """Seconds from folder to file `out`, and by parts that add up to them: `solve` is without `factor`, `error` is what notes
    say of GPTQ's error, `rest` is reading, forward passes, and rounding as far as it is in no other part."""
    def timed(function: Callable, part: str) -> Callable:
        def inner(*args, **kwargs):
            spent[part] -= perf_counter()
            result = function(*args, **kwargs)
            spent[part] += perf_counter()
            return result
        return inner
    shell(folder)  # imports the model's class
    spent = dict.fromkeys(("seconds", *PARTS), 0.0)
    with ExitStack() as stack:
        for part, target in PARTS.items():
            stack.enter_context(patch(f"helpers.{target}", timed(resolve_name(f"helpers.{target}"), part)))
        timed(quantize_to, "seconds")(out, folder, METHODS[method], tokens)
    spent["solve"] -= spent["factor"]  # which it calls
    return spent | {"rest": 2 * spent["seconds"] - sum(spent.values())}


def answer(way: str, folder: Path) -> dict[str, float]:
    """Seconds until the model in `folder` is loaded, and has given the first token after a prompt of 32: the first time in this
    process (`cold_`), which imports what the loader needs, and the second. 16 bits and files of GPTQ and AWQ in fp32."""
    options, found = {"16 bits": {"dtype": torch.float32}, "bitsandbytes-nf4": {"quantization_config": config("nf4")}}, {}
    for prefix in ("cold_", ""):
        started = perf_counter()
        model = (usable(AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options[way]).eval())
                 if way in options else reload(folder))
        found[f"{prefix}seconds"] = perf_counter() - started
        with torch.inference_mode():
            model(torch.arange(5, 37)[None]).logits[0, -1].argmax()
        found[f"{prefix}first_token"] = perf_counter() - started
    return found


def measured(side: str, source: Path, tokens, files: Path) -> dict[str, float]:
    """One run of a side on the model in folder `source`; files go to `files`. Raises ToolkitMissing, ToolkitFailed and Died."""
    if side in TOOLKITS:
        spec = ARTEFACTS[side]
        report = run(spec.toolkit, Job(spec.method, str(source), tokens), files / side, spec.originals, 7200)
        return {"seconds": report["quantize_seconds"], "with_imports": report["seconds"]}
    out = files / side.partition("-")[2]
    if "ours" in side:
        return alone(ours, source, out.name, tokens, out)
    return alone(answer, side, out if "file" in side else source)


def main(repeats: tuple[int, int], count: int, folder: Path = RESULTS, work: Callable = measured, at: Path = PARTIAL) -> None:
    """Measure the bundled and the larger model on `count` windows, from where an earlier run in `at` stopped."""
    tokens, models = windows(calibration(load().tokenizer), LENGTH, count), {}
    done = json.loads(partial.read_text()) if (partial := at / "runs.json").is_file() else {}
    same = [tokens, machine(), versions(), versions_in(ORIGINALS), code_hash(*(ROOT / "helpers").glob("*/"))]
    for name, times in ((name, n) for name, n in zip(("bundled", "larger"), repeats, strict=True) if n):
        source, runs = BUNDLED if name == "bundled" else random_model(LARGER, at / name), {}
        for n, side in tqdm([(n, side) for n in range(times) for side in SIDES], desc=name):
            if (key := key_hash([same, folder_hash(source), side, n])) not in done:
                done[key] = work(side, source, tokens, at / f"{name} files")
                write_atomically(partial, json.dumps(done))
            for what, seconds in done[key].items():
                runs.setdefault(side, {}).setdefault(what, []).append(seconds)
        middle = {side: median(of["seconds"]) for side, of in runs.items()}
        models[name] = {"parameters": shell(source).num_parameters(), "repeats": times, "runs": runs} | {
            "gptq_over_awq": {maker: middle[f"{g}-gptq"] / middle[f"{a}-awq"] for maker, (g, a) in PAIRS.items()},
            "share_of_gptq": {part: median(runs["ours-gptq"][part]) / middle["ours-gptq"] for part in ("gram", "factor")}}
    about = {"name": "instructions", "windows": len(tokens), "length": LENGTH, "tokens": len(tokens) * LENGTH}
    data = {"calibration": about, "originals": versions_in(ORIGINALS), "models": models}
    print(save(Record("effort", data, seed=0, model_sha256=folder_hash(BUNDLED)), folder))
    shutil.rmtree(at)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, nargs=2, default=(3, 1), help="of the bundled and the larger model; 0: without")
    parser.add_argument("--windows", type=int, default=8, dest="count", help=f"of {LENGTH} calibration tokens")
    main(**vars(parser.parse_args()))
