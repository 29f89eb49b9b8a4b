"""Prints hashes of the codes of every method on the bundled model, as JSON.

tests/test_codes.py runs it in a process of its own, with one thread and no vector extensions, so that processors differ as
little as they can. (autoawq's arithmetic is held against autoawq itself in tests/test_reference.py.)
"""

import hashlib
import json
from dataclasses import replace

import torch

from helpers.methods.awq import Awq
from helpers.methods.awq_gptq import AwqGptq
from helpers.methods.gptq import PLAIN, Gptq
from helpers.methods.keep import Keep
from helpers.methods.nf4 import Nf4
from helpers.methods.reference import AutoGptq
from helpers.methods.rtn import Rtn
from helpers.models.method import Gram, Plan
from helpers.models.quantize import quantize_model
from helpers.models.source import load
from helpers.models.texts import calibration, windows
from helpers.models.walk import walk

TOOLKITS = Gptq(**PLAIN)
PLANS = {
    "rtn": Rtn(), "rtn_asym_3": Rtn(3, 64, sym=False), "nf4": Nf4(), "gptq": TOOLKITS,
    "gptq_3_asym_search": replace(TOOLKITS, bits=3, sym=False, search=True),
    "gptq_desc_act": replace(TOOLKITS, desc_act=True, damp_percent=0.1),
    "gptq_row": replace(TOOLKITS, group_size=-1), "gptq_block": Plan(TOOLKITS, inputs="block"),
    "gptq_mixed": Plan(TOOLKITS, {"q_proj$": replace(TOOLKITS, bits=8), r"layers\.1\..*v_proj": Keep()}),
    "awq": Awq(), "awq_3": Awq(3, 64), "awq+gptq": AwqGptq(3, sym=False, **PLAIN), "autogptq": AutoGptq()}


def digest(*tensors: torch.Tensor) -> str:
    h = hashlib.sha256()
    for t in tensors:
        h.update(t.detach().contiguous().numpy().tobytes())
    return h.hexdigest()[:16]


def of_codes(codes: dict) -> str:
    parts = []
    for name in sorted(codes):
        q = codes[name]
        parts += [torch.tensor(list(name.encode()), dtype=torch.uint8)]
        parts += ([q.packed, q.double.codes, q.double.absmax, q.double.offset] if hasattr(q, "packed") else
                  [q.codes.int(), q.grid.scale.half(), q.grid.zero_point.float(), q.g_idx.long()])
    return digest(*parts)


def main() -> dict:
    tokens, found = windows(calibration(load().tokenizer), 128, 8), {}
    for name, plan in PLANS.items():
        model = load().model
        codes = quantize_model(model, plan, tokens).codes
        found[name] = [of_codes(codes), digest(*(p.half() for n, p in model.named_parameters() if "norm" in n))]
    grams = [g.H for step in walk(load().model, tokens) for g in step.grams(Gram).values()]
    return {"arithmetic": digest(*grams), "plans": found}


if __name__ == "__main__":
    print("HASHES", json.dumps(main()))
