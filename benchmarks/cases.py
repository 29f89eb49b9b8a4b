"""The three cases of chapter 10 through `python -m helpers.compare`, on both models: `make cases`.

Half an hour on two cores for the bundled model, an hour and a half for SmolLM2; goes on where it was stopped. Writes
data/results/cases.json: of each model and case the gates, the verdict with its reasons, the exit status, what the
servers took, the unquantized model's in bfloat16 too, and on which machine, with which versions and when it was made.
"""

import argparse
import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer

from helpers import compare
from helpers.book import BUILD, ROOT
from helpers.files import file_hash, folder_hash, key_hash, write_atomically
from helpers.harness import report
from helpers.harness.allocate import save_plan
from helpers.harness.cases import CASES, Case
from helpers.harness.compare import circumstances
from helpers.harness.gates import read_gates
from helpers.harness.load import load
from helpers.harness.named import DEFAULT
from helpers.harness.serve import serving
from helpers.harness.variants import Original
from helpers.measure.tasks import read_prompts, render
from helpers.models.method import Plan
from helpers.models.source import BUNDLED
from helpers.results import BadRecord, Record, read, save

METHODS = {  # "gptq" of the bundled model is what GPTQModel makes of it, asked for plain settings; of the small one our default
    "bundled": DEFAULT,
    "small": ("int8", "nf4", "gptq", "gptq:search=false,act_group_aware=false", "awq", "awq+gptq")}


def methods(case: Case, model: str) -> list[str]:
    """What is compared; where nothing may be lost, the mixed plan of chapter 7 at 5 bits a weight as well."""
    found = list(METHODS[model])
    if case.name == "doses" and model == "bundled":
        path = BUILD / "cases" / "plan-5-bits.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_plan(path, Plan.parse(read("plans").data["plans"]["plan, 5 bits"]["plan"]), Original(model))
        found.append(str(path))
    return found


def folder(case: Case, model: str) -> Path:
    """Where a comparison is left: another one for other questions, limits, weights or code."""
    compared = methods(case, model)
    files = [case.prompts(model), case.gates, *(Path(m) for m in compared if m.endswith(".json"))]
    same = [circumstances(), Original(model).weights, compared, *map(file_hash, files)]
    return BUILD / "cases" / f"{model}-{case.name}-{key_hash(same)}"


def run(case: Case, model: str) -> dict:
    """One comparison, run now if it has not been: exit status, and results.json."""
    out = folder(case, model)
    argv = ["--model", model, "--prompts", str(case.prompts(model)), "--gates", str(case.gates), "--out", str(out),
            "--methods", *methods(case, model)]
    if not (out / "report.html").is_file():  # which is written last
        with contextlib.redirect_stdout(io.StringIO()):
            compare.main(argv)
    found = json.loads(json.dumps(report.read(out / "results.json")).replace(f"{ROOT}/", ""))  # nothing of this machine
    keep = ("bits_a_weight", "predicted_bytes", "measured_bytes", "quality", "failed", "findings", "outcome", "reason")
    status = compare.STATUS[found["verdict"]["outcome"]]
    made = {k: found[k] for k in ("machine", "versions", "date")}
    return {"made": made, "exit_status": status, "article": case.article, "questions": len(found["asked"]["id"]),
            "gates": found["gates"], "verdict": found["verdict"], "served_bf16": in_bf16(case, model, out / "bf16.json"),
            "variants": {v["name"]: {k: v[k] for k in keep} | {"served": served(v)} for v in found["variants"]}}


def in_bf16(case: Case, model: str, path: Path) -> dict[str, dict[str, list[float]]]:
    """The unquantized model served in bfloat16, at the rate of the gates; what is served above is float16. {} without one."""
    rates, full = {g.rate for g in read_gates(case.gates) if g.rate}, Original(model)
    if rates and not path.is_file():
        tokenizer = AutoTokenizer.from_pretrained(full.folder)
        texts = [render(tokenizer, e)[0] for e in read_prompts(case.prompts(model))]
        with serving(full.folder, full.folder, dtype="bfloat16") as server:
            runs = {f"{rate:g}": load(server, full.folder, texts, rate, 64, 16, 192 / rate + 60) for rate in rates}
        write_atomically(path, json.dumps(served({"served": {rate: vars(run) for rate, run in runs.items()}})))
    return json.loads(path.read_text()) if rates else {}


def served(variant: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """{rate: {what: its median and 95th percentile}} of what results.json has of a variant on the server."""
    return {rate: {what: [round(float(p), 1) for p in np.percentile(found[what], (50, 95))] for what in ("ttft_ms", "itl_ms")}
            for rate, found in variant["served"].items() if len(found["ttft_ms"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    told, weights = {}, folder_hash(BUNDLED)
    with contextlib.suppress(BadRecord):
        told = record.data if (record := read("cases")).model_sha256 == weights else {}
    for model, name in tqdm([(m, c) for m in args.models for c in args.cases]):
        told.setdefault(model, {})[name] = run(CASES[name], model)
        print(save(Record("cases", told, model_sha256=weights, command="make cases")))


if __name__ == "__main__":
    main()
