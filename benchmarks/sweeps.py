"""What each knob of the methods does to the bundled model's answers: `make sweeps`, 45 minutes on two cores.

Records in data/results: sweep_nf4, sweep_gptq, sweep_awq, sweep_best. Every variant is scored on the same questions
of the judging set. Those that are calibrated are quantized several times, each time on windows drawn anew from the set: a
last bit that differs tips roundings, and what follows from them moves the result. Intervals are over questions and draws.
"""

import argparse
import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from helpers.measure.quality import compare
from helpers.measure.stats import ratio_interval
from helpers.models.checkpoints import load_simulated
from helpers.models.layers import add_outliers, linears
from helpers.models.loading import BUNDLED, load
from helpers.models.quantize import quantize_model, with_weights
from helpers.models.scheme import Scheme
from helpers.models.texts import Item, calibration, encode, examples, windows
from helpers.quantizers.affine import fit_qparams, on_grid
from helpers.quantizers.nf4 import NF4, dequantize_absmax, dequantize_nf4, quantize_absmax, quantize_nf4
from helpers.results import Record, folder_hash, save
from helpers.toolkits.artefacts import CALIBRATION, artefact

LIMIT = 60  # questions a task; all of them for "best"
DRAWS = 4
WINDOWS = 32  # of 256 tokens, unless their number is what is swept
Variant = Sequence[Callable[[], nn.Module]]  # one for each draw


def domain_tokens(tokenizer, name: str, length: int = 256, count: int = 128) -> list[tuple[int, ...]]:
    """Calibration windows of a set, or of uniformly random tokens as a control."""
    if name == "random":
        draw = random.Random(0)
        return [tuple(draw.randrange(5, len(tokenizer)) for _ in range(length)) for _ in range(count)]
    return windows(calibration(tokenizer, name), length, count)


def through(model: nn.Module, scheme: Scheme, pool=(), count: int = WINDOWS) -> Variant:
    """The model quantized by a scheme, when it is asked for, on `count` windows drawn from the pool."""
    def make(draw: int) -> nn.Module:
        changed = copy.deepcopy(model)
        quantize_model(changed, scheme, random.Random(draw).sample(pool, min(count, len(pool))))
        return changed

    return [partial(make, draw) for draw in range(DRAWS if pool else 1)]


def by_whom(model: nn.Module, tokenizer, method: str, *theirs: str) -> Iterator[tuple[str, str, Variant]]:
    """Ours beside the toolkits' committed files (one draw each) at 4 bits, all calibrated on the same windows."""
    pool = domain_tokens(tokenizer, **CALIBRATION)
    yield "4 bits, by whom", "ours", through(model, Scheme(method), pool, len(pool))
    for name in theirs:
        yield "4 bits, by whom", name.split("-")[0], [partial(load_simulated, artefact(name))]


def nf4_variants(model: nn.Module, tokenizer) -> Iterator[tuple[str, str, Variant]]:
    """(sweep, value, variant): blocks, double quantization, the grid against uniform ones, what else is quantized."""
    def nf4(block: int, double: bool, head: bool = False) -> Variant:
        def reconstruct(W: torch.Tensor) -> torch.Tensor:
            q = quantize_nf4(W, block)
            absmax = dequantize_absmax(quantize_absmax(q.absmax)) if double else q.absmax
            return dequantize_nf4(NF4(q.packed, absmax, q.shape, block))

        def make() -> nn.Module:
            changed = with_weights(model, reconstruct)[0]
            if head:
                with torch.no_grad():
                    changed.lm_head.weight.copy_(reconstruct(changed.lm_head.weight))
            return changed

        return [make]

    def uniform(group: int, sym: bool) -> Variant:
        return [lambda: with_weights(model, lambda W: on_grid(W, fit_qparams(W, 4, group, sym)).dequantize())[0]]

    for block in (64, 32, 128, 256, 1024):
        yield "block size", str(block), nf4(block, False)
    yield "grid at blocks of 64", "NF4", nf4(64, False)
    yield "grid at blocks of 64", "INT4, symmetric", uniform(64, True)
    yield "grid at blocks of 64", "INT4, asymmetric", uniform(64, False)
    yield "double quantization", "off", nf4(64, False)
    yield "double quantization", "on", nf4(64, True)
    yield "output head", "16 bits", nf4(64, True)
    yield "output head", "NF4", nf4(64, True, head=True)
    yield "compute dtype", "float32", nf4(64, True)
    for dtype in (torch.float16, torch.bfloat16):
        yield "compute dtype", str(dtype).removeprefix("torch."), [lambda dtype=dtype: nf4(64, True)[0]().to(dtype)]


def calibration_texts(tokenizer) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    """(name, pool) for each calibration set and for random tokens, in windows of 128, which even the short texts fill."""
    for name in ("instructions", "recipes", "long", "short", "random"):
        yield name, domain_tokens(tokenizer, name, 128)


def gptq_variants(model: nn.Module, tokenizer) -> Iterator[tuple[str, str, Variant]]:
    """At 3 bits, where there is something to lose, except where bits are swept."""
    base = Scheme(bits=3, sym=False)
    instructions = domain_tokens(tokenizer, "instructions")

    def but(pool=instructions, count: int = WINDOWS, **changes) -> Variant:
        return through(model, replace(base, **changes), pool, count)

    rounding = {bits: but((), method="rtn", bits=bits) for bits in (2, 3, 4, 8)}
    gptq = {bits: but(bits=bits) for bits in rounding}
    plain = gptq[3]
    for bits in rounding:
        yield "bits", f"rounding, {bits}", rounding[bits]
        yield "bits", f"GPTQ, {bits}", gptq[bits]
    for count in (len(instructions), 64, 32, 16, 8, 4, 2, 1):
        yield "calibration windows of 256", str(count), plain if count == WINDOWS else but(count=count)
    for length in (512, 128, 32):
        pool = domain_tokens(tokenizer, "instructions", length, 1024)
        yield "calibration length", str(length), but(pool, WINDOWS * 256 // length)
    for name, pool in calibration_texts(tokenizer):
        yield "calibration text", name, but(pool)
    for group in (128, 64, 32, -1):
        yield "group size", str(group), plain if group == 128 else but(group_size=group)
    for damp in (0.01, 1e-4, 0.1, 0.5):
        yield "damping", f"{damp:g}", plain if damp == 0.01 else but(damp_percent=damp)
    searched = but(search=True)
    yield from [("order of columns", "as they are", plain), ("order of columns", "desc_act", but(desc_act=True))]
    yield from [("scales", "fitted to the range", plain), ("scales", "searched", searched)]
    yield "scales of groups of 32", "fresh", but(group_size=32)
    yield "scales of groups of 32", "stale, as the toolkits", but(reference=True, group_size=32)
    yield "calibrated on", "quantized predecessors", plain
    yield "calibrated on", "same block unquantized", but(true_sequential=False)
    yield from by_whom(model, tokenizer, "gptq", "autogptq-gptq", "gptqmodel-gptq")


def best_variants(model: nn.Module, tokenizer) -> Iterator[tuple[str, str, Variant]]:
    """What GPTQ and its extras win back of what rounding loses: small differences, so all questions and all windows."""
    pool = domain_tokens(tokenizer, **CALIBRATION)
    for bits in (3, 4):
        for value, changes in {
                "GPTQ": {}, "searched scales": {"search": True},
                "searched scales, desc_act, damping 0.1": {"search": True, "desc_act": True, "damp_percent": 0.1},
                "AWQ before, searched scales": {"search": True, "method": "awq+gptq"}}.items():
            yield f"{bits} bits", value, through(model, Scheme(**({"bits": bits, "sym": False} | changes)), pool, len(pool))
        yield f"{bits} bits", "rounding", through(model, Scheme("rtn", bits=bits, sym=False))


def awq_variants(model: nn.Module, tokenizer) -> Iterator[tuple[str, str, Variant]]:
    """At 3 bits, on the model and on its variant with outlier channels (the same function of its input)."""
    loud = add_outliers(copy.deepcopy(model))
    instructions = domain_tokens(tokenizer, "instructions")

    def largest_inputs_in_16_bits(model: nn.Module, share: float) -> Variant:
        """The paper's table 1: rounding, but with the weights of the channels of largest mean |x| kept."""
        def make() -> nn.Module:
            inputs: dict[str, torch.Tensor] = {}
            handles = [m.register_forward_pre_hook(lambda _, args, n=n: inputs.__setitem__(
                n, inputs.get(n, 0) + args[0].abs().flatten(0, -2).sum(0))) for n, m in linears(model)]
            with torch.inference_mode():
                model(torch.tensor(instructions[:WINDOWS]))
            for handle in handles:
                handle.remove()
            changed = copy.deepcopy(model)
            quantize_model(changed, Scheme("rtn", bits=3, sym=False))
            with torch.no_grad():
                for n, m in linears(changed):
                    keep = inputs[n].topk(max(4, round(share * m.in_features))).indices  # the loud variant has 4
                    m.weight[:, keep] = model.get_submodule(n).weight[:, keep]
            return changed

        return [make]

    for name, m in (("model", model), ("with outlier channels", loud)):
        gptq, scaled_gptq = (through(m, Scheme(method, bits=3, sym=False), instructions) for method in ("gptq", "awq+gptq"))
        yield name, "rounding", through(m, Scheme("rtn", bits=3, sym=False))
        yield name, "rounding, 4 channels in 16 bits", largest_inputs_in_16_bits(m, 0.01)
        yield name, "AWQ, scales only", through(m, Scheme("awq", bits=3, clip=False), instructions)
        yield name, "AWQ, clipping only", through(m, Scheme("awq", bits=3, scale=False), instructions)
        yield name, "AWQ, scales and clipping", through(m, Scheme("awq", bits=3), instructions)
        yield name, "GPTQ", gptq
        yield name, "AWQ's scales, then GPTQ", scaled_gptq
        yield f"{name}, GPTQ", "alone", gptq
        yield f"{name}, GPTQ", "after AWQ's scales", scaled_gptq
    for name, pool in calibration_texts(tokenizer):
        yield "calibration text", name, through(model, Scheme("awq", bits=3), pool)
    for group in (128, 64, 32, -1):
        yield "group size", str(group), through(model, Scheme("awq", bits=3, group_size=group), instructions)
    yield from by_whom(model, tokenizer, "awq", "autoawq-awq", "gptqmodel-awq")


VARIANTS = {"nf4": nf4_variants, "gptq": gptq_variants, "awq": awq_variants, "best": best_variants}


class Draws(NamedTuple):
    """Scores on answers of a variant's draws: nll and kl [draws, texts] in nats, tokens [texts], share of exact answers."""

    nll: np.ndarray
    kl: np.ndarray
    tokens: np.ndarray
    exact: float


def judge(variant: Variant, items: Sequence[Item], reference: nn.Module) -> Draws:
    scores = compare({str(n): make() for n, make in enumerate(variant)}, items, reference).values()
    return Draws(np.stack([s.answer.nll for s in scores]), np.stack([s.answer.kl for s in scores]),
                 next(iter(scores)).answer.tokens, float(np.mean([s.exact.mean() for s in scores])))


def sweep(name: str) -> dict:
    """Score every variant: {sweep: {value: measures with intervals}}."""
    model, tokenizer = load()
    items = [encode(tokenizer, e) for e in examples("judge", limit=None if name == "best" else LIMIT)]
    variants = list(VARIANTS[name](model, tokenizer))
    distinct = {id(v): v for _, _, v in variants}  # many panels begin with the same one
    judged = {key: judge(v, items, model) for key, v in tqdm(distinct.items(), desc=name)}
    full = judge([lambda: model], items, model)
    panels: dict[str, dict[str, Draws]] = {}
    for knob, value, variant in variants:
        panels.setdefault(knob, {})[value] = judged[id(variant)]
    return {"questions": len(items), "draws": DRAWS, "exact_16_bits": full.exact,
            "sweeps": {knob: {value: row(draws, panel, full) for value, draws in panel.items()}
                       for knob, panel in panels.items()}}


def row(it: Draws, panel: Mapping[str, Draws], full: Draws) -> dict:
    """A variant's measures with intervals, set against the 16-bit model, the panel's first, and rounding if it is there."""
    first = next(iter(panel.values()))
    measures = {
        "kl": ratio_interval(it.kl, it.tokens), "exact": it.exact,
        "kl_of_draws": [float(kl.sum() / it.tokens.sum()) for kl in it.kl],
        "delta_nll": ratio_interval(it.nll - full.nll, it.tokens),
        "kl_against_first": ratio_interval(it.kl - first.kl, it.tokens),
        "nll_against_first": ratio_interval(it.nll - first.nll, it.tokens)}
    if rounding := panel.get("rounding"):  # the share of its loss increase, and of its KL, that is gone
        measures["won_back"] = ratio_interval(rounding.nll - it.nll, (rounding.nll - full.nll)[0])
        measures["kl_won_back"] = ratio_interval(rounding.kl - it.kl, rounding.kl[0])
    return measures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=VARIANTS)
    only = parser.parse_args().only
    for name in [only] if only else VARIANTS:
        record = Record(f"sweep_{name}", sweep(name), command="make sweeps", seed=0, model_sha256=folder_hash(BUNDLED))
        print(save(record))
