"""The methods on a real model, SmolLM2-135M-Instruct: `python -m benchmarks.small`, hours on two cores; goes on where it was
stopped.

In groups of 64 (its width, 576, is no multiple of 128), calibrated on passages of a novel and judged on other passages of it,
on speeches, and on questions. In data/results: the values of every text (small.npz), and a record derived from them
(small.json).
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from helpers.files import folder_hash
from helpers.harness.compare import Quality
from helpers.harness.variants import Original, Simulation, Variant, loaded
from helpers.measure.quality import right_answers
from helpers.measure.stats import ratio_interval, share_interval
from helpers.measure.tasks import ENGLISH, Item, encode_choices, encode_text, examples, text
from helpers.methods.awq import Awq
from helpers.methods.awq_gptq import AwqGptq
from helpers.methods.gptq import Gptq
from helpers.methods.nf4 import Nf4
from helpers.methods.rtn import Rtn
from helpers.models.fetch import origin
from helpers.models.method import Method
from helpers.models.texts import calibration, windows
from helpers.results import RESULTS, Record, save
from helpers.store import Store, bundle, values

PASSAGES, QUESTIONS = 16, 30  # of each voice, of each task
CALIBRATION = {"length": 512, "count": 16}
SHARED, KEPT = ("id", "task", "answer_tokens"), ("answer_nll", "answer_kl", "exact")
BASE = Original("small")
METHODS: dict[str, Method] = {
    "rounding, 4 bits": Rtn(4, 64, sym=False), "rounding, 4 bits, symmetric": Rtn(4, 64), "NF4": Nf4(),
    "GPTQ, 4 bits": Gptq(4, 64, sym=False), "AWQ, 4 bits": Awq(4, 64),
    "GPTQ, 4 bits, desc_act": Gptq(4, 64, sym=False, desc_act=True), "GPTQ, 4 bits, symmetric": Gptq(4, 64),
    "rounding, 3 bits": Rtn(3, 64, sym=False), "GPTQ, 3 bits": Gptq(3, 64, sym=False), "AWQ, 3 bits": Awq(3, 64),
    "AWQ, then GPTQ, searched scales, 3 bits": AwqGptq(3, 64, sym=False, search=True),
    "GPTQ, 3 bits, desc_act": Gptq(3, 64, sym=False, desc_act=True),
    "GPTQ, 4 bits, searched scales": Gptq(4, 64, sym=False, search=True),
    "GPTQ, 4 bits, damping 0.0001": Gptq(4, 64, sym=False, damp_percent=1e-4),
    "AWQ, then GPTQ, searched scales, 4 bits": AwqGptq(4, 64, sym=False, search=True),
}


def items() -> list[Item]:
    """Passages of both voices, and questions, each choice an item of its own."""
    tokenizer = loaded("small", None, "float32", "cpu").tokenizer
    asked = examples("english_judge", limit=QUESTIONS)
    return [i for voice in ("novel", "speeches") for i in encode_text(tokenizer, text(voice)[:PASSAGES], 512, voice)] + [
        i for e in asked for i in encode_choices(tokenizer, e)]


def variants() -> list[Variant]:
    tokens = windows(calibration(loaded("small", None, "float32", "cpu").tokenizer, "novel"), **CALIBRATION)
    return [BASE, *(Simulation(name, method, tokens, BASE) for name, method in METHODS.items())]


def derive(name: str = "small") -> dict[str, Any]:
    """{variant: {domain: KL and loss increase with intervals; share of right answers}} of the committed values."""
    found, full = values(name), None
    rows: dict[str, dict] = {}
    for variant, arrays in found.items():
        full = full or arrays  # the original comes first
        rows[variant] = {domain: of(arrays, full, domain) for domain in dict.fromkeys(arrays["task"].tolist())}
    return rows


def of(arrays: dict, full: dict, domain: str) -> dict[str, Any]:
    at = (arrays["task"] == domain) & np.array([" or " not in i for i in arrays["id"]])
    tokens, lost = arrays["answer_tokens"][at], (arrays["answer_nll"] - full["answer_nll"])[:, at]
    told = {"kl": ratio_interval(arrays["answer_kl"][:, at], tokens), "delta_nll": ratio_interval(lost, tokens),
            "tokens": int(tokens.sum())}
    if domain in ENGLISH:
        answers = answered(arrays, domain)
        told["right"] = share_interval(sum(answers), len(answers))
    return told


def answered(arrays: dict, domain: str) -> Sequence[bool]:
    """Whether each question of a task was answered right, by the first draw."""
    at, loss = arrays["task"] == domain, arrays["answer_nll"][0] / arrays["answer_tokens"]
    return list(right_answers(arrays["id"][at], arrays["exact"][0][at], loss[at]).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, help="only so many of the methods")
    args = parser.parse_args()
    quality = Quality(items(), BASE, Store())
    cells = {v.name: [quality.cell(v)] for v in tqdm(variants()[:args.first], desc="small")}
    cell = bundle(cells, KEPT, SHARED)
    cell.save(RESULTS / "small.npz")
    told = {"model": origin(BASE.folder), "passages": PASSAGES, "questions": QUESTIONS, "calibration": CALIBRATION,
            "variants": derive()}
    save(Record("small", told, command="python -m benchmarks.small", seed=None, model_sha256=folder_hash(BASE.folder),
                machine=cell.made["machine"], versions=cell.made["versions"], date=cell.made["date"]))


if __name__ == "__main__":
    main()
