"""What each knob of the methods does to the bundled model's answers: `make sweeps`, some 35 minutes on one core.

Lists of variants. Each is scored on the same questions of the judging set, into a cell (helpers/store.py): a sweep that was
stopped goes on where it was. Those that are calibrated are quantized several times, each time on windows drawn anew from the
set: a last bit that differs tips roundings, and what follows from them moves the result. In data/results: the values of every
question (sweep_NAME.npz), and a record derived from them (sweep_NAME.json), with intervals over questions and draws.
"""

import argparse
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from helpers.files import folder_hash
from helpers.harness.compare import Quality
from helpers.harness.variants import Original, Simulation, ToolkitArtefact, Variant, loaded
from helpers.measure.stats import ratio_interval
from helpers.measure.tasks import encode, examples
from helpers.methods.awq import Awq
from helpers.methods.awq_gptq import AwqGptq
from helpers.methods.gptq import Gptq
from helpers.methods.nf4 import Nf4
from helpers.methods.reference import AutoGptq
from helpers.methods.rtn import Rtn
from helpers.models.method import Gram, Method, Notes, Plan
from helpers.models.outliers import add_outliers
from helpers.models.source import BUNDLED
from helpers.models.texts import calibration, random_tokens, windows
from helpers.results import RESULTS, Record, save
from helpers.store import Cell, Store, bundle, unbundle
from helpers.toolkits.artefacts import CALIBRATION

LIMIT = 60  # questions a task; all of them for "best"
DRAWS = 4
WINDOWS = 32  # of 256 tokens, unless their number is what is swept
SHARED, KEPT = ("id", "task", "answer_tokens"), ("answer_nll", "answer_kl", "exact")
Draws = list[Variant]  # one for each draw
QUIET, LOUD = Original(), Original(change=add_outliers, name="with outlier channels")


class Panel(NamedTuple):
    """A row of a panel: which knob, which value, and the variant's draws."""

    knob: str
    value: str
    draws: Draws


def tokens(name: str, length: int = 256, count: int = 128) -> list[tuple[int, ...]]:
    """Calibration windows of a set, or of uniformly random tokens as a control."""
    tokenizer = loaded("bundled", None, "float32", "cpu").tokenizer
    return random_tokens(tokenizer, length, count) if name == "random" else windows(calibration(tokenizer, name), length, count)


def drawn(plan: Plan | Method, pool: Sequence = (), count: int = WINDOWS, base: Original = QUIET, **also) -> Draws:
    """Simulations by a plan on `count` windows drawn from the pool, several times; without a pool one."""
    return [Simulation(f"{plan} {draw}", plan, random.Random(draw).sample(pool, min(count, len(pool))), base, **also)
            for draw in range(DRAWS if pool else 1)]


def by_whom(method: Method, *theirs: str) -> Iterator[Panel]:
    """Ours beside the toolkits' committed files (one draw each) at 4 bits, all calibrated on the same windows."""
    pool = tokens(**CALIBRATION)
    yield Panel("4 bits, by whom", "ours", drawn(method, pool, len(pool)))
    for name in theirs:
        yield Panel("4 bits, by whom", name.split("-")[0], [ToolkitArtefact(name, exact=True)])


def nf4_panels() -> Iterator[Panel]:
    """Blocks, double quantization, the grid against uniform ones, what else is quantized."""
    for block in (64, 32, 128, 256, 1024):
        yield Panel("block size", str(block), drawn(Nf4(block, double=False)))
    yield Panel("grid at blocks of 64", "NF4", drawn(Nf4(64, double=False)))
    yield Panel("grid at blocks of 64", "INT4, symmetric", drawn(Rtn(4, 64)))
    yield Panel("grid at blocks of 64", "INT4, asymmetric", drawn(Rtn(4, 64, sym=False)))
    yield Panel("double quantization", "off", drawn(Nf4(64, double=False)))
    yield Panel("double quantization", "on", drawn(Nf4()))
    yield Panel("output head", "16 bits", drawn(Nf4()))
    yield Panel("output head", "NF4", drawn(Nf4(), head=Nf4()))
    yield Panel("compute dtype", "float32", drawn(Nf4()))
    for dtype in ("float16", "bfloat16"):
        yield Panel("compute dtype", dtype, drawn(Nf4(), dtype=dtype))


def calibration_texts() -> dict[str, list[tuple[int, ...]]]:
    """Each calibration set, and random tokens, in windows of 128, which even the short texts fill."""
    return {name: tokens(name, 128) for name in ("instructions", "recipes", "long", "short", "random")}


def gptq_panels() -> Iterator[Panel]:
    """At 3 bits, where there is something to lose, except where bits are swept."""
    plain, pool = Gptq(3, sym=False), tokens("instructions")
    for bits in (2, 3, 4, 8):
        yield Panel("bits", f"rounding, {bits}", drawn(Rtn(bits, sym=False)))
        yield Panel("bits", f"GPTQ, {bits}", drawn(replace(plain, bits=bits), pool))
    for count in (len(pool), 64, 32, 16, 8, 4, 2, 1):
        yield Panel("calibration windows of 256", str(count), drawn(plain, pool, count))
    for length in (512, 128, 32):
        pieces = tokens("instructions", length, 1024)
        yield Panel("calibration length", str(length), drawn(plain, pieces, WINDOWS * 256 // length))
    for name, texts in calibration_texts().items():
        yield Panel("calibration text", name, drawn(plain, texts))
    for group in (128, 64, 32, -1):
        yield Panel("group size", str(group), drawn(replace(plain, group_size=group), pool))
    for damp in (0.01, 1e-4, 0.1, 0.5):
        yield Panel("damping", f"{damp:g}", drawn(replace(plain, damp_percent=damp), pool))
    yield Panel("order of columns", "as they are", drawn(plain, pool))
    yield Panel("order of columns", "desc_act", drawn(replace(plain, desc_act=True), pool))
    yield Panel("scales", "fitted to the range", drawn(plain, pool))
    yield Panel("scales", "searched", drawn(replace(plain, search=True), pool))
    yield Panel("scales of groups of 32", "fresh", drawn(replace(plain, group_size=32), pool))
    yield Panel("scales of groups of 32", "stale, as the toolkits", drawn(AutoGptq(3, 32, sym=False), pool))
    yield Panel("calibrated on", "quantized predecessors", drawn(plain, pool))
    yield Panel("calibrated on", "same block unquantized", drawn(Plan(plain, inputs="block"), pool))
    yield from by_whom(Gptq(), "autogptq-gptq", "gptqmodel-gptq")


def best_panels() -> Iterator[Panel]:
    """What GPTQ and its extras win back of what rounding loses: small differences, so all questions and all windows."""
    pool = tokens(**CALIBRATION)
    for bits in (3, 4):
        for value, method in {
                "GPTQ": Gptq(bits, sym=False), "searched scales": Gptq(bits, sym=False, search=True),
                "searched scales, desc_act, damping 0.1": Gptq(bits, sym=False, search=True, desc_act=True, damp_percent=0.1),
                "AWQ before, searched scales": AwqGptq(bits, sym=False, search=True)}.items():
            yield Panel(f"{bits} bits", value, drawn(method, pool, len(pool)))
        yield Panel(f"{bits} bits", "rounding", drawn(Rtn(bits, sym=False)))


class Mixed(NamedTuple):
    """A rounded weight with some columns as they were."""

    W_hat: Tensor

    def dequantize(self) -> Tensor:
        return self.W_hat

    def stored(self) -> "Mixed":
        return self


@dataclass(frozen=True)
class LargestInputs(Rtn):
    """The observation that AWQ starts from (Lin et al. 2023, table 1): rounding, but the columns of the largest inputs stay
    in 16 bits. No file format has them, so `formats` is empty."""

    name: ClassVar[str] = "rtn, largest inputs in 16 bits"
    keeps: ClassVar[type[Gram]] = Gram
    calibrated: ClassVar[bool] = True
    share: float = 0.01
    least: int = 4  # the outlier variant has 4

    def formats(self) -> tuple:
        return ()

    def solve(self, W: Tensor, kept: Gram) -> tuple[Mixed, Notes]:
        W_hat = super().solve(W, kept)[0].stored().dequantize()
        largest = kept.x_mean().topk(max(self.least, round(self.share * W.shape[1]))).indices
        W_hat[:, largest] = W[:, largest].float()
        return Mixed(W_hat), {}


def awq_panels() -> Iterator[Panel]:
    """At 3 bits, on the model and on its variant with outlier channels (the same function of its input)."""
    pool = tokens("instructions")
    for name, base in (("model", QUIET), ("with outlier channels", LOUD)):
        gptq, scaled = (drawn(method, pool, base=base) for method in (Gptq(3, sym=False), AwqGptq(3, sym=False)))
        yield Panel(name, "rounding", drawn(Rtn(3, sym=False), base=base))
        kept = Plan(LargestInputs(3, sym=False), inputs="model")
        yield Panel(name, "rounding, 4 channels in 16 bits", [Simulation(str(kept), kept, pool[:WINDOWS], base)])
        yield Panel(name, "AWQ, scales only", drawn(Awq(3, clip=False), pool, base=base))
        yield Panel(name, "AWQ, clipping only", drawn(Awq(3, scale=False), pool, base=base))
        yield Panel(name, "AWQ, scales and clipping", drawn(Awq(3), pool, base=base))
        yield Panel(name, "GPTQ", gptq)
        yield Panel(name, "AWQ's scales, then GPTQ", scaled)
        yield Panel(f"{name}, GPTQ", "alone", gptq)
        yield Panel(f"{name}, GPTQ", "after AWQ's scales", scaled)
    for name, texts in calibration_texts().items():
        yield Panel("calibration text", name, drawn(Awq(3), texts))
    for group in (128, 64, 32, -1):
        yield Panel("group size", str(group), drawn(Awq(3, group), pool))
    yield from by_whom(Awq(), "autoawq-awq", "gptqmodel-awq")


PANELS = {"nf4": nf4_panels, "gptq": gptq_panels, "awq": awq_panels, "best": best_panels}


def measure(name: str, store: Store) -> Cell:
    """Every variant of a sweep, question by question: a row for each value of each knob and draw."""
    tokenizer = loaded("bundled", None, "float32", "cpu").tokenizer
    items = [encode(tokenizer, e) for e in examples("judge", limit=None if name == "best" else LIMIT)]
    quality = Quality(items, QUIET, store)
    panels = [Panel("16 bits", "16 bits", [QUIET]), *PANELS[name]()]
    cells = {f"{p.knob}: {p.value}": [quality.cell(v) for v in p.draws] for p in tqdm(panels, desc=name)}
    return bundle(cells, KEPT, SHARED)


def derive(cell: Cell) -> dict[str, Any]:
    """{sweep: {value: measures with intervals}} from what `measure` found."""
    results = {name: arrays | {"tokens": arrays["answer_tokens"]} for name, arrays in unbundle(cell).items()}
    full = results.pop("16 bits: 16 bits")
    panels: dict[str, dict[str, dict]] = {}
    for name, arrays in results.items():
        knob, value = name.split(": ", 1)
        panels.setdefault(knob, {})[value] = arrays
    return {"questions": len(full["id"]), "draws": DRAWS, "exact_16_bits": float(full["exact"].mean()),
            "sweeps": {knob: {value: row(arrays, panel, full) for value, arrays in panel.items()}
                       for knob, panel in panels.items()}}


def row(it: dict, panel: Mapping[str, dict], full: dict) -> dict[str, Any]:
    """A variant's measures with intervals, set against the 16-bit model, the panel's first, and rounding if it is there."""
    first, (nll, kl, tokens) = next(iter(panel.values())), (it[k] for k in ("answer_nll", "answer_kl", "tokens"))
    measures = {
        "kl": ratio_interval(kl, tokens), "exact": float(it["exact"].mean()),
        "kl_of_draws": [float(one.sum() / tokens.sum()) for one in kl],
        "delta_nll": ratio_interval(nll - full["answer_nll"], tokens),
        "kl_against_first": against(it, first, "answer_kl"), "nll_against_first": against(it, first, "answer_nll")}
    if rounding := panel.get("rounding"):  # the share of its loss increase, and of its KL, that is gone
        lost = (rounding["answer_nll"] - full["answer_nll"])[0]
        measures["won_back"] = ratio_interval(rounding["answer_nll"] - nll, lost)
        measures["kl_won_back"] = ratio_interval(rounding["answer_kl"] - kl, rounding["answer_kl"][0])
    return measures


def against(it: dict, other: dict, what: str):
    """The paired difference of two variants of a sweep; with unequal draws, against the mean of the fewer."""
    a, b = it[what], other[what]
    return ratio_interval(a - (b if len(a) == len(b) else b.mean(0) if len(a) > len(b) else b), it["tokens"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PANELS)
    parser.add_argument("--derive", action="store_true", help="the records from the committed values, nothing measured")
    args = parser.parse_args()
    torch.manual_seed(0)
    for name in [args.only] if args.only else PANELS:
        path = RESULTS / f"sweep_{name}.npz"
        if not args.derive:
            measure(name, Store()).save(path)
        cell = Cell.read(path)
        print(save(Record(f"sweep_{name}", derive(cell), command="make sweeps", seed=0, model_sha256=folder_hash(BUNDLED),
                          machine=cell.made["machine"], versions=cell.made["versions"], date=cell.made["date"])))
