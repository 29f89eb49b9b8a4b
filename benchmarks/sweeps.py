"""What each knob of the methods does to the bundled model's answers: `make sweeps`, some 20 minutes on two cores.

One record for each chapter, in data/results: sweep_nf4, sweep_gptq, sweep_awq. Every variant is scored on the same questions
of the judging set; intervals are paired over questions.
"""

import argparse
import copy
import random
from collections.abc import Callable, Iterator

import torch
from torch import nn
from tqdm import tqdm

from helpers.measure.quality import Sums, compare
from helpers.measure.stats import ratio_interval
from helpers.models.layers import add_outliers, linears
from helpers.models.loading import BUNDLED, load
from helpers.models.quantize import quantize_model, with_weights
from helpers.models.scheme import Scheme
from helpers.models.texts import calibration, encode, examples, windows
from helpers.quantizers.affine import fit_qparams, on_grid
from helpers.quantizers.nf4 import NF4, dequantize_absmax, dequantize_nf4, quantize_absmax, quantize_nf4
from helpers.results import Record, folder_hash, save

LIMIT = 60  # questions a task
Variant = Callable[[], nn.Module]


def domain_tokens(tokenizer, name: str, length: int = 256, count: int = 128) -> list[tuple[int, ...]]:
    """Calibration windows of a set, or of uniformly random tokens as a control."""
    if name == "random":
        draw = random.Random(0)
        return [tuple(draw.randrange(5, len(tokenizer)) for _ in range(length)) for _ in range(count)]
    return windows(calibration(tokenizer, name), length, count)


def through(model: nn.Module, scheme: Scheme, tokens=()) -> Variant:
    """The model quantized by a scheme, when it is asked for."""
    def make() -> nn.Module:
        changed = copy.deepcopy(model)
        quantize_model(changed, scheme, tokens)
        return changed

    return make


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

        return make

    def uniform(group: int, sym: bool) -> Variant:
        return lambda: with_weights(model, lambda W: on_grid(W, fit_qparams(W, 4, group, sym)).dequantize())[0]

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
        yield "compute dtype", str(dtype).removeprefix("torch."), lambda dtype=dtype: nf4(64, True)().to(dtype)


def gptq_variants(model: nn.Module, tokenizer) -> Iterator[tuple[str, str, Variant]]:
    """At 3 bits, where there is something to lose, except where bits are swept."""
    base = Scheme(bits=3, sym=False)
    tokens = domain_tokens(tokenizer, "instructions")

    def but(scheme: Scheme = base, tokens=tokens, **changes) -> Variant:
        return through(model, Scheme(**(vars(scheme) | changes)), tokens)

    for bits in (2, 3, 4, 8):
        yield "bits", f"rounding, {bits}", but(method="rtn", bits=bits)
        yield "bits", f"GPTQ, {bits}", but(bits=bits)
    for count in (len(tokens), 64, 32, 16, 8, 4, 2, 1):
        yield "calibration windows of 256", str(count), but(tokens=tokens[:count])
    for length in (512, 128, 32):
        yield "calibration length", str(length), but(tokens=domain_tokens(tokenizer, "instructions", length, 16384 // length))
    for domain in ("instructions", "recipes", "long", "short", "random"):
        yield "calibration text", domain, but(tokens=domain_tokens(tokenizer, domain, 128, 32))
    for group in (128, 64, 32, -1):
        yield "group size", str(group), but(group_size=group)
    for damp in (0.01, 1e-4, 1e-3, 0.05, 0.1, 0.5):
        yield "damping", f"{damp:g}", but(damp_percent=damp)
    yield "order of columns", "as they are", but()
    yield "order of columns", "desc_act", but(desc_act=True)
    yield "scales", "fitted to the range", but()
    yield "scales", "searched", but(search=True)
    yield "scales of groups of 32", "fresh", but(group_size=32)
    yield "scales of groups of 32", "stale, as the toolkits", but(reference=True, group_size=32)
    yield "calibrated on", "quantized predecessors", but()
    yield "calibrated on", "same block unquantized", but(true_sequential=False)
    for bits in (3, 4):
        yield f"best quality, {bits} bits", "GPTQ", but(bits=bits)
        yield f"best quality, {bits} bits", "rounding", but(method="rtn", bits=bits)
        yield f"best quality, {bits} bits", "GPTQ, searched scales, desc_act", but(bits=bits, search=True, desc_act=True)
        yield f"best quality, {bits} bits", "AWQ, then GPTQ, searched scales", but(bits=bits, method="awq+gptq", search=True)


def awq_variants(model: nn.Module, tokenizer) -> Iterator[tuple[str, str, Variant]]:
    """At 3 bits, on the model and on its variant with outlier channels (the same function of its input)."""
    loud = add_outliers(copy.deepcopy(model))
    tokens = domain_tokens(tokenizer, "instructions", 128, 64)

    def largest_inputs_in_16_bits(model: nn.Module, share: float) -> Variant:
        """The paper's table 1: rounding, but with the weights of the channels of largest mean |x| kept."""
        def make() -> nn.Module:
            inputs: dict[str, torch.Tensor] = {}
            handles = [m.register_forward_pre_hook(lambda _, args, n=n: inputs.__setitem__(
                n, inputs.get(n, 0) + args[0].abs().flatten(0, -2).sum(0))) for n, m in linears(model)]
            with torch.inference_mode():
                model(torch.tensor(tokens))
            for handle in handles:
                handle.remove()
            changed = copy.deepcopy(model)
            quantize_model(changed, Scheme("rtn", bits=3, sym=False))
            with torch.no_grad():
                for n, m in linears(changed):
                    keep = inputs[n].topk(max(4, round(share * m.in_features))).indices  # the loud variant has 4
                    m.weight[:, keep] = model.get_submodule(n).weight[:, keep]
            return changed

        return make

    for name, m in (("model", model), ("with outlier channels", loud)):
        yield name, "rounding", through(m, Scheme("rtn", bits=3, sym=False))
        yield name, "rounding, 4 channels in 16 bits", largest_inputs_in_16_bits(m, 0.01)
        yield name, "AWQ, scales only", through(m, Scheme("awq", bits=3, clip=False), tokens)
        yield name, "AWQ, clipping only", through(m, Scheme("awq", bits=3, scale=False), tokens)
        yield name, "AWQ, scales and clipping", through(m, Scheme("awq", bits=3), tokens)
        yield name, "GPTQ", through(m, Scheme("gptq", bits=3, sym=False), tokens)
        yield name, "AWQ's scales, then GPTQ", through(m, Scheme("awq+gptq", bits=3, sym=False), tokens)
    for domain in ("instructions", "recipes", "long", "short", "random"):
        yield "calibration text", domain, through(model, Scheme("awq", bits=3), domain_tokens(tokenizer, domain, 128, 32))
    for group in (128, 64, 32, -1):
        yield "group size", str(group), through(model, Scheme("awq", bits=3, group_size=group), tokens)


VARIANTS = {"nf4": nf4_variants, "gptq": gptq_variants, "awq": awq_variants}


def sweep(name: str) -> dict:
    """Score every variant: {sweep: {value: measures with intervals}}."""
    model, tokenizer = load()
    items = [encode(tokenizer, e) for e in examples("judge", limit=LIMIT)]
    full = compare({"full": model}, items, model)["full"]
    table: dict[str, dict] = {}
    base: dict[str, Sums] = {}
    for knob, value, make in tqdm(list(VARIANTS[name](model, tokenizer)), desc=name):
        scores = compare({"it": make()}, items, model)["it"]
        first = base.setdefault(knob, scores.answer)  # the panel's first value is what the others are set against
        table.setdefault(knob, {})[value] = {
            "kl": scores.answer.kl_interval(), "exact": scores.exact.mean(),
            "delta_nll": scores.answer.delta_nll(full.answer),
            "kl_against_first": ratio_interval(scores.answer.kl - first.kl, first.tokens),
            "nll_against_first": scores.answer.delta_nll(first)}
    return {"questions": len(items), "exact_16_bits": full.exact.mean(), "sweeps": table}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=VARIANTS)
    only = parser.parse_args().only
    for name in [only] if only else VARIANTS:
        record = Record(f"sweep_{name}", sweep(name), command="make sweeps", seed=0, model_sha256=folder_hash(BUNDLED))
        print(save(record))
