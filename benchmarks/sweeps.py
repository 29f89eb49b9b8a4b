"""What each knob of the methods does to a model's answers: `make sweeps`, the bundled model, hours on one core;
`make small-sweeps`, a real one, minutes on a large GPU and days on two cores.

Lists of variants. Each is scored on the same texts of the judging set, into a cell (helpers/store.py): a sweep that was
stopped goes on where it was. Those that are calibrated are quantized several times, each time on windows drawn anew from the
set: a last bit that differs tips roundings, and what follows from them moves the result. In data/results: the values of every
text (sweep_NAME.npz), and a record derived from them (sweep_NAME.json), with intervals over texts and draws.
"""

import argparse
import math
import random
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.methods import (
    AwqGptqFirstCounted,
    GptqAfterFirst,
    GptqBesideFirst,
    GptqFirstCounted,
    GptqMedian,
    GptqOneWay,
    LargestInputs,
    SignRound,
    SignRoundBySquares,
    SignRoundBySquaresToTheEnd,
)
from helpers.files import folder_hash, key_hash
from helpers.harness.carry import UNQUANTIZED, of_kind, right
from helpers.harness.compare import Quality
from helpers.harness.variants import Original, Simulation, ToolkitArtefact, Variant, loaded
from helpers.measure.stats import ratio_interval
from helpers.measure.tasks import ENGLISH, Item, encode, encode_choices, encode_text, examples, text
from helpers.methods.awq import Awq
from helpers.methods.awq_gptq import AwqGptq
from helpers.methods.gptq import PLAIN, Gptq
from helpers.methods.gptq_signround import GptqSignRound
from helpers.methods.nf4 import Nf4
from helpers.methods.reference import AutoGptq
from helpers.methods.rtn import Rtn
from helpers.models.fetch import origin
from helpers.models.method import Method, Plan
from helpers.models.outliers import add_outliers
from helpers.models.texts import calibration, random_tokens, windows
from helpers.results import RESULTS, Record, save
from helpers.store import Cell, Store, bundle, cells_of, unbundle
from helpers.toolkits import artefacts
from helpers.toolkits.artefacts import CALIBRATION, MOST

WINDOWS = 32  # of 256 tokens, unless their number is what is swept
SHARED, KEPT = ("id", "task", "answer_tokens"), ("answer_nll", "answer_kl", "exact")
Draws = list[Variant]  # one for each draw


@dataclass(frozen=True)
class Subject:
    """A model to sweep on, its usual group size, how many draws, and the calibration sets (the first is the usual one)."""

    name: str
    group: int
    groups: tuple[int, ...]
    draws: int
    sets: tuple[str, ...]
    searched: int = MOST  # windows for the toolkits' AWQ, whose search takes up to a minute a window on a real model
    loudest: str = ""  # the linear at which the first token outweighs all others (data/results/inputs.json)

    @cached_property
    def base(self) -> Original:
        return Original(self.name)

    @cached_property
    def loud(self) -> Original:
        return Original(self.name, change=add_outliers, name="with outlier channels")

    @property
    def tokenizer(self):
        return loaded(self.name, None, "float32", "cpu").tokenizer

    def tokens(self, name: str | None = None, length: int = 256, count: int = 128) -> list[tuple[int, ...]]:
        """Calibration windows of a set, or of uniformly random tokens as a control."""
        if name == "random":
            return random_tokens(self.tokenizer, length, count)
        return windows(calibration(self.tokenizer, name or self.sets[0]), length, count)

    def texts(self) -> dict[str, list[tuple[int, ...]]]:
        """Each calibration set, and random tokens, in windows of 128, which even the short texts fill."""
        return {name: self.tokens(name, 128) for name in (*self.sets, "random")}

    def drawn(self, plan: Plan | Method, pool: Sequence = (), count: int = WINDOWS, base: Original | None = None,
              **also) -> Draws:
        """Simulations by a plan on `count` windows drawn from the pool, several times; without a pool one."""
        return [Simulation(f"{plan} {draw}", plan, random.Random(draw).sample(pool, min(count, len(pool))), base or self.base,
                           **also) for draw in range(self.draws if pool else 1)]

    def items(self, sweep: str) -> list[Item]:
        """What the variants are scored on: 60 questions a task of the bundled model's world (all of them where differences are
        small); for a real model English passages of two voices, and questions (a quarter of them in the sweeps of QUARTER).
        Of the judging set, but for "tuned"."""
        split, limit = "tune" if sweep == "tuned" else "judge", None if sweep in ALL_QUESTIONS else 60
        step = 4 if sweep in QUARTER else 1
        if self.name == "bundled":
            return [encode(self.tokenizer, e) for e in examples(split, limit=limit)]
        asked = examples(f"english_{split}", limit=50)
        if split == "tune":  # by KL, for which wrong choices are not needed
            return [Item(ids, 1, voice, f"{voice}-{n}") for voice in VOICES for n, ids in enumerate(self.unseen(voice))] + [
                encode(self.tokenizer, e) for e in asked]
        return [i for voice in VOICES for i in encode_text(self.tokenizer, text(voice), 512, voice)[::step]] + [
            i for e in asked[::step] for i in encode_choices(self.tokenizer, e)]

    def unseen(self, voice: str) -> list[tuple[int, ...]]:
        """Windows of a calibration set after the 128 that "recipes" is calibrated on: to choose settings by."""
        return self.tokens(voice, count=sys.maxsize)[128 if voice == self.sets[0] else -28:]


VOICES = ("novel", "speeches")
ALL_QUESTIONS = ("best", "recipes", "tuned", "remedies", "makers", "raised", "learned")
QUARTER = ("awq", "nf4", "makers", "raised", "learned", "first")  # on two cores scoring takes longer than quantizing
SUBJECTS = {s.name: s for s in (
    Subject("bundled", 128, (128, 64, 32, -1), 4, ("instructions", "recipes", "long", "short")),
    # 64, since its width, 576, is no multiple of 128
    Subject("small", 64, (64, 32, -1), 4, (*VOICES, "instructions", "own"), 32, r"layers\.11\.mlp\.down_proj$"))}


class Panel(NamedTuple):
    """A row of a panel: which knob, which value, and the variant's draws."""

    knob: str
    value: str
    draws: Draws


def by_whom(s: Subject, method: Method, *theirs: str, knob: str = "4 bits, by whom", count: int = MOST) -> Iterator[Panel]:
    """Ours beside the toolkits' files (one draw each) at 4 bits, all calibrated on the same windows."""
    pool = s.tokens(**CALIBRATION | {"count": count})
    yield Panel(knob, "ours", s.drawn(method, pool, len(pool)))
    for name in theirs:
        yield Panel(knob, name.split("-")[0], [ToolkitArtefact(name, s.name, exact=True, windows=count)])


def makers_panels(s: Subject) -> Iterator[Panel]:
    """Ours and the toolkits' at equal settings, and our recipes beside AutoRound's file, which is as large."""
    pool, best = s.tokens(**CALIBRATION), Gptq(4, s.group, act_group_aware=False)
    yield from by_whom(s, replace(best, search=False), "autogptq-gptq", "gptqmodel-gptq", knob="GPTQ, by whom")
    yield from by_whom(s, Awq(4, s.group), "autoawq-awq", "gptqmodel-awq", knob="AWQ, by whom", count=s.searched)
    aware, scaled = replace(best, act_group_aware=True), AwqGptq(4, s.group, sym=True, act_group_aware=False)
    yield Panel("as AutoRound", "AutoRound", [ToolkitArtefact("autoround-gptq", s.name, exact=True)])
    one_way = GptqOneWay(4, s.group, act_group_aware=False)
    for value, method in {"GPTQ": best, "GPTQ, group aware": aware, "GPTQ, desc_act": replace(best, desc_act=True),
                          "GPTQ, scales above zero": one_way,
                          "GPTQ, desc_act, scales above zero": replace(one_way, desc_act=True),
                          "AWQ's scales, then GPTQ": scaled,
                          "AWQ's scales, then GPTQ, group aware": replace(scaled, act_group_aware=True),
                          "AWQ's scales, then GPTQ, desc_act": replace(scaled, desc_act=True),
                          "GPTQ, asymmetric, group aware": replace(aware, sym=False),
                          "AWQ's scales, then GPTQ, asymmetric, group aware": replace(scaled, sym=False, act_group_aware=True),
                          "GPTQ, group aware, then SignRound": GptqSignRound(4, s.group)}.items():
        yield Panel("as AutoRound", value, s.drawn(method, pool, len(pool)))


def nf4_panels(s: Subject) -> Iterator[Panel]:
    """Blocks, double quantization, the grid against uniform ones, what else is quantized."""
    for block in (64, 32, 128, 256, 1024):
        yield Panel("block size", str(block), s.drawn(Nf4(block, double=False)))
    yield Panel("grid at blocks of 64", "NF4", s.drawn(Nf4(64, double=False)))
    yield Panel("grid at blocks of 64", "INT4, symmetric", s.drawn(Rtn(4, 64)))
    yield Panel("grid at blocks of 64", "INT4, asymmetric", s.drawn(Rtn(4, 64, sym=False)))
    yield Panel("double quantization", "off", s.drawn(Nf4(64, double=False)))
    yield Panel("double quantization", "on", s.drawn(Nf4()))
    yield Panel("output head", "16 bits", s.drawn(Nf4()))
    yield Panel("output head", "NF4", s.drawn(Nf4(), head=Nf4()))
    yield Panel("compute dtype", "float32", s.drawn(Nf4()))
    for dtype in ("float16", "bfloat16"):
        yield Panel("compute dtype", dtype, s.drawn(Nf4(), dtype=dtype))


def gptq_panels(s: Subject) -> Iterator[Panel]:
    """At 3 bits, where there is something to lose, except where bits are swept."""
    plain, pool = Gptq(3, s.group, sym=False, **PLAIN), s.tokens()
    for bits in (2, 3, 4, 8):
        yield Panel("bits", f"rounding, {bits}", s.drawn(Rtn(bits, s.group, sym=False)))
        yield Panel("bits", f"GPTQ, {bits}", s.drawn(replace(plain, bits=bits), pool))
    for count in (len(pool), 64, 32, 16, 8, 4, 2, 1):
        yield Panel("calibration windows of 256", str(count), s.drawn(plain, pool, count))
    for length in (512, 128, 32):
        pieces = s.tokens(None, length, 1024)
        yield Panel("calibration length", str(length), s.drawn(plain, pieces, WINDOWS * 256 // length))
    for name, texts in s.texts().items():
        yield Panel("calibration text", name, s.drawn(plain, texts))
    for group in s.groups:
        yield Panel("group size", str(group), s.drawn(replace(plain, group_size=group), pool))
    for damp in (0.01, 1e-4, 0.1, 0.5):
        yield Panel("damping", f"{damp:g}", s.drawn(replace(plain, damp_percent=damp), pool))
    yield Panel("order of columns", "as they are", s.drawn(plain, pool))
    yield Panel("order of columns", "group aware", s.drawn(replace(plain, act_group_aware=True), pool))
    yield Panel("order of columns", "desc_act", s.drawn(replace(plain, desc_act=True), pool))
    yield Panel("scales", "fitted to the range", s.drawn(plain, pool))
    yield Panel("scales", "searched", s.drawn(replace(plain, search=True), pool))
    yield Panel("scales of groups of 32", "fresh", s.drawn(replace(plain, group_size=32), pool))
    yield Panel("scales of groups of 32", "stale, as the toolkits", s.drawn(AutoGptq(3, 32, sym=False), pool))
    yield Panel("calibrated on", "quantized predecessors", s.drawn(plain, pool))
    yield Panel("calibrated on", "same block unquantized", s.drawn(Plan(plain, inputs="block"), pool))
    if s.name == "bundled":  # of which such files are committed
        yield from by_whom(s, Gptq(**PLAIN), "autogptq-gptq", "gptqmodel-gptq")


def best_panels(s: Subject) -> Iterator[Panel]:
    """What GPTQ and its extras win back of what rounding loses: small differences, so all questions and all windows."""
    pool = s.tokens()
    for bits in (3, 4):
        plain = Gptq(bits, s.group, sym=False, **PLAIN)
        for value, method in {
                "GPTQ": plain, "searched scales": replace(plain, search=True),
                "searched scales, desc_act, damping 0.1": replace(plain, search=True, desc_act=True, damp_percent=0.1),
                "AWQ before, searched scales": AwqGptq(bits, s.group, sym=False, act_group_aware=False)}.items():
            yield Panel(f"{bits} bits", value, s.drawn(method, pool, len(pool)))
        yield Panel(f"{bits} bits", "rounding", s.drawn(Rtn(bits, s.group, sym=False)))


def recipe_panels(s: Subject) -> Iterator[Panel]:
    """What a reader may choose between, at equal bits and groups."""
    pool = s.tokens()
    for bits in (4, 3):
        plain = Gptq(bits, s.group, sym=False, **PLAIN)
        symmetric, scaled = replace(plain, sym=True), AwqGptq(bits, s.group, sym=False, act_group_aware=False)
        aware = {"act_group_aware": True, "search": True}
        recipes: dict[str, Method] = {
            "GPTQ": plain, "rounding": Rtn(bits, s.group, sym=False), "rounding, symmetric": Rtn(bits, s.group),
            "GPTQ, symmetric": symmetric, "GPTQ, damping 0.0001": replace(plain, damp_percent=1e-4),
            "GPTQ, damping 0.000001": replace(plain, damp_percent=1e-6),
            "GPTQ, damping 0.1": replace(plain, damp_percent=0.1), "GPTQ, desc_act": replace(plain, desc_act=True),
            "GPTQ, group aware": replace(plain, act_group_aware=True), "GPTQ, searched scales": replace(plain, search=True),
            "GPTQ, group aware, searched scales": replace(plain, **aware),
            "GPTQ, desc_act, searched scales": replace(plain, desc_act=True, search=True), "AWQ": Awq(bits, s.group),
            "AWQ's scales, then GPTQ": replace(scaled, search=False), "AWQ's scales, then GPTQ, searched scales": scaled,
            "AWQ's scales, then GPTQ, group aware, searched scales": replace(scaled, **aware),
            "AWQ's scales, then GPTQ, desc_act, searched scales": replace(scaled, desc_act=True)}
        if bits == 4:  # symmetric grids are what the fastest kernels, and vLLM on a CPU, read
            recipes |= {"NF4": Nf4(), "GPTQ, symmetric, searched scales": replace(symmetric, search=True),
                        "GPTQ, symmetric, group aware, searched scales": replace(symmetric, **aware),
                        "GPTQ, symmetric, desc_act, searched scales": replace(symmetric, desc_act=True, search=True),
                        "AWQ's scales, then GPTQ, symmetric, searched scales": replace(scaled, sym=True),
                        "AWQ's scales, then GPTQ, symmetric, group aware, searched scales": replace(scaled, sym=True, **aware)}
        for value, method in recipes.items():
            yield Panel(f"recipes, {bits} bits", value, s.drawn(method, pool if method.keeps else (), len(pool)))


def remedy_panels(s: Subject) -> Iterator[Panel]:
    """What helps GPTQ where a few channels and the first token are loud."""
    pool, plain = s.tokens(), {"bits": 4, "group_size": s.group, "sym": False, **PLAIN}
    gptq, first = Gptq(**plain), GptqAfterFirst(**plain)
    remedies: dict[str, Plan | Method] = {
        "GPTQ": gptq, "first tokens left out": first, "damping by the median": GptqMedian(**plain),
        "desc_act": replace(gptq, desc_act=True), "searched scales": replace(gptq, search=True),
        "AWQ's scales before": AwqGptq(**plain)}
    if s.loudest:
        remedies["first tokens left out where they are loudest"] = Plan(gptq, ((s.loudest, first),))
    for value, method in remedies.items():
        yield Panel("remedies, 4 bits", value, s.drawn(method, pool, len(pool)))
    yield Panel("remedies, 4 bits", "rounding", s.drawn(Rtn(4, s.group, sym=False)))


def first_panels(s: Subject) -> Iterator[Panel]:
    """First tokens left out of the Gram matrix of some linears: which of them need it? And counted more than others."""
    pool, gptq = s.tokens(), GptqBesideFirst(4, s.group, sym=False, **PLAIN)
    blind = replace(gptq, first=False)
    for value, pattern in {"none": None, "all": "", "queries": "q_proj$", "keys": "k_proj$", "values": "v_proj$",
                           "all others": "(o|gate|up|down)_proj$"}.items():
        plan = gptq if pattern is None else Plan(gptq, ((pattern, blind),)) if pattern else blind
        yield Panel("first tokens left out, 4 bits", value, s.drawn(plan, pool))
    for knob, also in {"first tokens counted, 4 bits": PLAIN, "the same, group aware, searched scales": {}}.items():
        for value, method in {"once": GptqBesideFirst, "16 times": GptqFirstCounted}.items():
            yield Panel(knob, value, s.drawn(method(4, s.group, sym=False, **also), pool))
    for knob, method in {"the same, after AWQ's scales": AwqGptqFirstCounted(4, s.group),
                         "first tokens counted, our default": GptqFirstCounted(4, s.group)}.items():
        for value, times in {"once": 1, "4 times": 4, "16 times": 16}.items():
            yield Panel(knob, value, s.drawn(replace(method, times=times), pool))


def learned_panels(s: Subject) -> Iterator[Panel]:
    """Learning after GPTQ: by which error, and kept when. A third of makers' windows, and half of the steps."""
    pool = s.tokens(CALIBRATION["name"], CALIBRATION["length"], 48)
    for value, method in {"GPTQ": Gptq, "by squares, to the end": SignRoundBySquaresToTheEnd,
                          "by squares, best kept": SignRoundBySquares, "by shares, best kept": SignRound}.items():
        yield Panel("learned after GPTQ, 4 bits", value, s.drawn(
            method(4, s.group) if method is Gptq else method(4, s.group, steps=100), pool, len(pool)))


def raised_panels(s: Subject) -> Iterator[Panel]:
    """3 bits, and one kind of linear in 8: is what the map of the layers says (chapter 7) true of the whole model?"""
    plain, pool = Gptq(3, s.group, act_group_aware=False), s.tokens()
    yield Panel("3 bits, in 8 bits", "none", s.drawn(plain, pool, len(pool)))
    for kind in ("v_proj", "o_proj", "q_proj", "down_proj"):
        yield Panel("3 bits, in 8 bits", kind, s.drawn(Plan(plain, ((rf"{kind}$", replace(plain, bits=8)),)), pool, len(pool)))


def awq_panels(s: Subject) -> Iterator[Panel]:
    """At 3 bits, on the model and on its variant with outlier channels (the same function of its input)."""
    pool = s.tokens()
    for name, base in (("model", s.base), ("with outlier channels", s.loud)):
        gptq, scaled = (s.drawn(method(3, s.group, sym=False, **PLAIN), pool, base=base)
                        for method in (Gptq, AwqGptq))
        yield Panel(name, "rounding", s.drawn(Rtn(3, s.group, sym=False), base=base))
        kept = Plan(LargestInputs(3, s.group, sym=False), inputs="model")
        yield Panel(name, "rounding, 4 channels in 16 bits", [Simulation(str(kept), kept, pool[:WINDOWS], base)])
        yield Panel(name, "AWQ, scales only", s.drawn(Awq(3, s.group, clip=False), pool, base=base))
        yield Panel(name, "AWQ, clipping only", s.drawn(Awq(3, s.group, scale=False), pool, base=base))
        yield Panel(name, "AWQ, scales and clipping", s.drawn(Awq(3, s.group), pool, base=base))
        yield Panel(name, "GPTQ", gptq)
        yield Panel(name, "AWQ's scales, then GPTQ", scaled)
        yield Panel(f"{name}, GPTQ", "alone", gptq)
        yield Panel(f"{name}, GPTQ", "after AWQ's scales", scaled)
    for name, texts in s.texts().items():
        yield Panel("calibration text", name, s.drawn(Awq(3, s.group), texts))
    for group in s.groups:
        yield Panel("group size", str(group), s.drawn(Awq(3, group), pool))
    if s.name == "bundled":
        yield from by_whom(s, Awq(), "autoawq-awq", "gptqmodel-awq")


PANELS = {"recipes": recipe_panels, "tuned": recipe_panels, "remedies": remedy_panels, "best": best_panels,
          "makers": makers_panels, "learned": learned_panels, "first": first_panels, "raised": raised_panels,
          "gptq": gptq_panels, "awq": awq_panels, "nf4": nf4_panels}


@dataclass(frozen=True)
class Sweep:
    """The panels of one name on one subject."""

    name: str
    subject: Subject
    device: str = "cpu"

    @property
    def record(self) -> str:
        return f"sweep_{self.name}" if self.subject.name == "bundled" else f"sweep_{self.subject.name}_{self.name}"

    @cached_property
    def quality(self) -> Quality:
        return Quality(self.subject.items(self.name), self.subject.base, Store(), self.device)

    def panels(self) -> list[Panel]:
        return [Panel("16 bits", "16 bits", [self.subject.base]), *PANELS[self.name](self.subject)]

    def measure(self) -> Cell:
        """Every variant, text by text: a row for each value of each knob and draw."""
        cells = {f"{p.knob}: {p.value}": [self.quality.cell(v) for v in p.draws] for p in tqdm(self.panels(), desc=self.record)}
        return bundle(cells, KEPT, SHARED)

    def found(self, paths: Sequence[Path]) -> Cell:
        """The same of cells that other machines left, in folders or in a bundle made before; they say where they were made.
        Of some variants fewer draws, or none (no toolkit is run for it: its rows in bundles go by their names). Where two
        are of the same, the later counts."""
        there, named, cells = measured_before(paths), named_before(paths), {}
        for name, draws in ((f"{p.knob}: {p.value}", p.draws) for p in self.panels()):
            if all(map(made, draws)):
                asked = (what_was_asked(self.quality.key | {"variant": v.key()}) for v in draws)
                of = [there[k] for k in asked if k in there]
            else:
                of = [c for c in named.get(name, ()) if c.key["items"] == self.quality.key["items"]]
            cells |= {name: of} if of else {}
        if UNQUANTIZED not in cells:
            raise ValueError(f"{self.record}: no cell of 16 bits on these texts among {', '.join(map(str, paths))}: name the "
                             "folder or the bundle that has it")
        return bundle(cells, KEPT, SHARED)


def made(variant: Variant) -> bool:
    """Whether its weights can be named without running a toolkit."""
    return not isinstance(variant, ToolkitArtefact) or artefacts.place(
        variant.artefact, variant.model, count=variant.windows).is_dir()


def measured_before(paths: Sequence[Path]) -> dict[str, Cell]:
    """{what was asked: the cell} of folders of cells, and of bundles."""
    cells = (c for p in paths for c in (map(Cell.read, sorted(p.glob("*.npz"))) if p.is_dir() else cells_of(Cell.read(p))))
    return {what_was_asked(c.key): c for c in cells}


def named_before(paths: Sequence[Path]) -> dict[str, list[Cell]]:
    """{row: its cells} of bundles."""
    bundles = [(b.key["rows"], cells_of(b)) for b in (Cell.read(p) for p in paths if not p.is_dir())]
    return {name: [cells[n] for n in of] for rows, cells in bundles for name, of in rows.items()}


def what_was_asked(key: Mapping[str, Any]) -> str:
    """A cell's key without the circumstances: code, versions (a config says which one of transformers wrote it), machine, and
    how many tokens went through at once."""
    def bare(part: Any) -> Any:
        return {k: bare(v) for k, v in part.items() if k != "config"} if isinstance(part, Mapping) else part

    return key_hash({k: bare(key.get(k)) for k in ("measure", "items", "reference", "variant")})


@dataclass
class Held:
    """A variant that is loaded once for all the sweeps it is in."""

    variant: Variant

    @property
    def name(self) -> str:
        return self.variant.name

    def key(self) -> dict[str, Any]:
        return self.variant.key()

    def load(self, device: str = "cpu"):
        self.model = getattr(self, "model", None) or self.variant.load(device)
        return self.model


def work(sweeps: Sequence[Sweep], part: int, parts: int, draws: int, minutes: float, known: Sequence[str] = ()) -> None:
    """Every `parts`-th of the variants, for several processes at once, until so many draws of each are there: what is neither
    stored nor `known`. One that fails is named, and left."""
    stop, todo = time.monotonic() + 60 * minutes, {}  # {hash of a variant: which draw, it, and the sweeps that ask for it}
    for sweep, panel in [(s, p) for s in sweeps for p in s.panels()]:
        try:  # a toolkit's file is made by asking for its key
            missing = [v for v in panel.draws if what_was_asked(sweep.quality.key | {"variant": v.key()}) not in known]
        except Exception:
            print(f"{sweep.record}: {panel.knob}: {panel.value} failed\n{traceback.format_exc()}", file=sys.stderr)
            continue
        there = len(panel.draws) - len(missing)
        for n, variant in enumerate(missing[:max(0, draws - there)], there):
            asked_by = todo.setdefault(key_hash(variant.key()), (n, variant, []))[2]
            asked_by += [] if sweep in asked_by else [sweep]
    first_draws_first = sorted(todo.values(), key=lambda it: it[0])
    for _, variant, of in tqdm(first_draws_first[part::parts], desc=f"part {part}"):
        if time.monotonic() > stop:
            return
        held = Held(variant)
        try:
            for sweep in of:
                sweep.quality.cell(held)
        except Exception:
            print(f"{[s.record for s in of]}: {variant.name} failed\n{traceback.format_exc()}", file=sys.stderr)


def derive(cell: Cell, draws: int = 4) -> dict[str, Any]:
    """{sweep: {value: measures with intervals}} from what `measure` found."""
    results = {name: arrays | {"tokens": arrays["answer_tokens"]} for name, arrays in unbundle(cell).items()}
    full = results.pop(UNQUANTIZED)
    return {"questions": len(full["id"]), "draws": draws, "exact_16_bits": float(full["exact"].mean()),
            "sweeps": panels_of(results, full)} | machines_of(cell)


def machines_of(cell: Cell) -> dict[str, dict[str, list[str]]]:
    """Where each row was measured, if that is not one machine for all."""
    made = [gpu or cpu for cpu, _, _, gpu in (k["machine"] for k in cell.key["keys"])]
    rows = {name: sorted({made[r] for r in rows}) for name, rows in cell.key["rows"].items()}
    return {"machines": rows} if len(set(made)) > 1 else {}


def by_domain(cell: Cell, draws: int) -> dict[str, Any]:
    """The same on each voice and on the questions: {domain: {texts, tokens, sweeps}}, with the share of right answers."""
    results, told = unbundle(cell), {}
    for domain in (*VOICES, "questions"):
        of = {name: of_kind(arrays | {"tokens": arrays["answer_tokens"]}, domain) for name, arrays in results.items()}
        full = of.pop(UNQUANTIZED)
        told[domain] = {"texts": len(full["id"]), "tokens": int(full["tokens"].sum()), "sweeps": panels_of(of, full)}
    right = {name: answered(arrays) for name, arrays in results.items()} if any(" or " in i for i in full["id"]) else {}
    return {"draws": draws, "domains": told, "answered": right} | machines_of(cell)


def answered(arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The share of each task's questions that were answered right, over the draws."""
    return {task: float(right(arrays, [task]).mean()) for task in ENGLISH}


def panels_of(results: Mapping[str, dict], full: dict) -> dict[str, dict[str, dict]]:
    panels: dict[str, dict[str, dict]] = {}
    for name, arrays in results.items():
        knob, value = name.split(": ", 1)
        panels.setdefault(knob, {})[value] = arrays
    return {knob: {value: row(arrays, panel, full) for value, arrays in panel.items()} for knob, panel in panels.items()}


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
    if len(a) != len(b):
        a, b = (x if len(x) == max(len(a), len(b)) else x.mean(0) for x in (a, b))
    return ratio_interval(a - b, it["tokens"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SUBJECTS, default="bundled")
    parser.add_argument("--only", choices=PANELS, nargs="+", default=list(PANELS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--part", help="K/N: only each N-th cell, from the K-th on; nothing is written but cells")
    parser.add_argument("--minutes", type=float, default=math.inf, help="with --part: begin no cell after so many")
    parser.add_argument("--draws", type=int, default=sys.maxsize, help="with --part: at most so many of a variant")
    parser.add_argument("--found", type=Path, nargs="+", help="folders of cells, or bundles (NAME.npz), of any machines: "
                        "measure nothing; with --part: nothing that they have")
    parser.add_argument("--derive", action="store_true", help="the records from the committed values, nothing measured")
    args = parser.parse_args()
    torch.manual_seed(0)
    subject = SUBJECTS[args.model]
    sweeps = [Sweep(name, subject, args.device) for name in args.only]
    if args.part:
        return work(sweeps, *map(int, args.part.split("/")), args.draws, args.minutes, measured_before(args.found or ()))
    for sweep in sweeps:
        path = RESULTS / f"{sweep.record}.npz"
        cell = Cell.read(path) if args.derive else sweep.found(args.found) if args.found else sweep.measure()
        told = derive(cell, subject.draws) if subject.name == "bundled" else by_domain(cell, subject.draws) | {
            "model": origin(subject.base.folder)}
        cell.save(path)  # after what could fail
        device = cell.key["keys"][0].get("device", "cpu")
        command = "make sweeps" if (subject.name, device) == ("bundled", "cpu") else (
            f"python -m benchmarks.sweeps --model {subject.name} --only {sweep.name} --device {device}")
        print(save(Record(sweep.record, told, command=command, seed=0, model_sha256=folder_hash(subject.base.folder),
                          machine=cell.made["machine"], versions=cell.made["versions"], date=cell.made["date"])))


if __name__ == "__main__":
    main()
