"""The layers of the bundled model, and what plans made of their map are worth: `make maps`, over an hour on one core.

Goes on at the cell it was at. In data/results: the map, with the values of every question (sensitivity.npz, of the tuning
questions), and what is derived from it (sensitivity.json); plans, uniform settings, rules of thumb and the peers' allocations,
quantized for real by one solver on several draws of the calibration text, judged on other questions (plans.npz, plans.json);
the seconds of the map against those of the loop that everybody writes first (map_speed.json; on two idle cores).
"""

import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.sweeps import SUBJECTS
from helpers.files import folder_hash
from helpers.harness.allocate import Allocation
from helpers.harness.compare import Quality
from helpers.harness.planner import Choice, Planner, settings, single_kl
from helpers.harness.sensitivity import OWN, SHARED, Sensitivity, where
from helpers.harness.variants import Original, Simulation, loaded
from helpers.measure.quality import Judge
from helpers.measure.scores import cheap_scores
from helpers.measure.sensitivity import alone
from helpers.measure.stats import ratio_interval
from helpers.measure.tasks import Item, encode, examples
from helpers.methods.awq import Awq
from helpers.methods.gptq import PLAIN, Gptq
from helpers.methods.keep import Keep
from helpers.methods.nf4 import Nf4
from helpers.methods.rtn import Rtn
from helpers.models.formats import GPTQ
from helpers.models.method import Method, Plan
from helpers.models.quantize import quantized
from helpers.models.source import BUNDLED
from helpers.models.walk import walk
from helpers.results import RESULTS, Record, read, save
from helpers.store import Store, bundle
from helpers.toolkits.artefacts import CALIBRATION

TUNE, JUDGE, DRAWS = 30, 40, 2  # questions a task; quantizations of each plan
MAP = (Rtn(4), Rtn(3), Rtn(2), *(Gptq(b, **PLAIN) for b in (4, 3, 2)), Awq(4), Awq(3), Awq(2), Nf4())
BUDGETS = (2.75, 3.0, 3.25, 3.5, 3.75, 4.0, 4.25, 4.5, 5.0, 6.0)  # bits a weight, as files count them
BASE = Gptq(act_group_aware=False)  # what the committed map is of
KEPT = ("answer_nll", "answer_kl", "exact")


def items(split: str, limit: int) -> list[Item]:
    return [encode(loaded("bundled", None, "float32", "cpu").tokenizer, e) for e in examples(split, limit=limit)]


def given() -> list[Method]:
    """What a linear may get, and what uniform plans are made of; at 8 bits the group decides nothing."""
    return [m for m in settings(method=BASE) if m.bits < 8 or m.group_size == 128]


def rules() -> dict[str, Plan]:
    """Rules of thumb, on a base of 3 bits: what people keep high."""
    low, high, higher = (replace(BASE, bits=b) for b in (3, 4, 8))
    return {"attention 4, MLP 3": Plan(low, (("self_attn", high),)), "MLP 4, attention 3": Plan(low, (("mlp", high),)),
            "down_proj 4, others 3": Plan(low, (("down_proj", high),)),
            "down_proj 8, others 3": Plan(low, (("down_proj", higher),)),
            "first and last block 4, others 3": Plan(low, ((r"layers\.[03]\.", high),)),
            "last block 8, others 3": Plan(low, ((r"layers\.3\.", higher),)),
            "first block 8, others 3": Plan(low, ((r"layers\.0\.", higher),)),
            "v_proj and o_proj 8, others 3": Plan(low, (("[vo]_proj", higher),))}


def peers() -> dict[str, Plan]:
    """The allocations of data/results/peers.json, with our GPTQ as the solver of all."""
    found = {}
    for peer, budgets in read("peers").data["choices"].items():
        for budget, choice in budgets.items():
            methods = {n: replace(BASE, bits=c["bits"], group_size=c["group_size"]) if c["bits"] < 16 else Keep()
                       for n, c in choice["linears"].items()}
            found[f"{peer}, {budget}"] = Allocation(methods, 0, 0).plan()
    return found


def ends(sens: Sensitivity) -> dict[str, list[str]]:
    """What is raised together: each linear, each kind, each block."""
    inside = [n for n in sens.shapes if where(n)[0] is not None]
    kinds, blocks = ({k: [n for n in inside if where(n)[at] == k] for k in dict.fromkeys(where(n)[at] for n in inside)}
                     for at in (1, 0))
    return {n: [n] for n in inside} | kinds | {f"block {b}": layers for b, layers in blocks.items()}


def random_plans(planner: Planner, count: int = 40) -> Iterator[dict[str, Method]]:
    """Allocations drawn at random, of which each has its own range of bits."""
    draw = random.Random(0)
    units = [*planner.units, *((n,) for n in planner.options if not any(n in u for u in planner.units))]
    for _ in range(count):
        pool = draw.choice([(2, 3), (3, 4), (2, 3, 4), (3, 4, 8), (2, 3, 4, 8), (4, 8)])
        yield {n: method for unit in units for method in [replace(BASE, bits=draw.choice(pool))] for n in unit}


def interval(arrays: Mapping) -> list[float]:
    """KL, nats/token."""
    return list(ratio_interval(arrays["answer_kl"], arrays["answer_tokens"]))


def cheap(planner: Planner, methods: Sequence[Method]) -> dict[str, Any]:
    """The cheap scores of every linear and setting, and what they cost: on 32 windows, in seconds."""
    model, started = loaded("bundled", None, "float32", "cpu").model, time.perf_counter()
    W_hats = {(f"{step.name}.{n}", m): alone(step, n, m).W_hat for step in walk(model, planner.sensitivity.tokens)
              for group in step.layout.groups for n in group for m in methods}
    seconds = {"codes": time.perf_counter() - started}
    for gradients in (False, True):
        started = time.perf_counter()
        found = cheap_scores(model, W_hats, planner.sensitivity.tokens[:32], gradients)
        seconds["with gradients" if gradients else "without"] = time.perf_counter() - started
    return {"seconds": seconds, "scores": {s: nested(values) for s, values in found.items()}}


def nested(values: Mapping[tuple[str, Method], Any]) -> dict[str, dict[str, Any]]:
    """{layer: {setting: value}}."""
    found: dict[str, dict[str, Any]] = {}
    for (layer, method), value in values.items():
        found.setdefault(layer, {})[str(method)] = value
    return found


def speed() -> None:
    """The map, and on a linear of each block, of as many kinds, the loop that everybody writes first."""
    with tempfile.TemporaryDirectory() as folder:
        sens = Sensitivity(items("tune", TUNE), SUBJECTS["bundled"].tokens(**CALIBRATION), store=Store(Path(folder)))
        model, judge = sens.base.load(), Judge(sens.items, sens.base.load())
        started = time.perf_counter()
        judge.score(model)  # what the reference says is remembered from here on
        reference = time.perf_counter() - started
        names = list(sens.shapes)[1:-1]
        started = time.perf_counter()
        cells = sens.down(MAP, names)
        ours = {"whole": time.perf_counter() - started} | {k: float(sum(c.arrays[f"{k}_s"] for c in cells.values()))
                                                           for k in ("quantize", "forward")}
    sample, naive, apart = names[::len(names) // 4 + 2], {"whole": reference, "quantize": 0.0, "forward": reference}, 0.0
    for name, method in tqdm([(n, m) for n in sample for m in MAP], desc="naive"):
        started = time.perf_counter()
        changed = quantized(model, Plan(Keep(), ((f"^{name}$", method),), inputs="model"), sens.tokens)
        between = time.perf_counter()
        kl = judge.score(changed).answer.kl.sum()
        took = {"quantize": between - started, "forward": time.perf_counter() - between}
        for part, seconds in (took | {"whole": sum(took.values())}).items():
            naive[part] += seconds * len(names) / len(sample)
        apart = max(apart, float(abs(kl - cells[name, method].arrays["answer_kl"].sum()) / kl))
    save(Record("map_speed", {
        "linears": len(names), "settings": [str(m) for m in MAP], "blocks": sens.count, "questions": len(sens.items),
        "naive_on": sample, "largest_relative_difference_of_kl": apart, "naive_s": naive, "ours_s": ours},
        command="make maps", model_sha256=folder_hash(BUNDLED)))


def climbed(planner: Planner, bits: float, steps: int = 60) -> Allocation:
    """From the plan by exchanges, one unit wider and others narrower, each made for real, and kept if its KL is lower: how much
    is there to win for a better foresight? On the tuning questions, so it fits their noise too."""
    draw, budget = random.Random(0), planner.weights * bits / 8
    best = planner.allocation(bits).methods
    units = [*planner.units, *((n,) for n in planner.options if not any(n in u for u in planner.units))]
    size = {(n, o.method): o.bytes for n, found in planner.options.items() for o in found}

    def moved(methods: dict[str, Method], unit: Sequence[str], by: int) -> dict[str, Method]:
        widths = sorted((m for n, m in size if n == unit[0] and not m.stays), key=lambda m: size[unit[0], m])
        at = widths.index(methods[unit[0]]) + by
        return methods | dict.fromkeys(unit, widths[at]) if 0 <= at < len(widths) else methods

    def measured(methods: dict[str, Method]) -> float:
        scores = planner.judge.scores(planner.simulated(Allocation(methods, 0, 0).plan(planner.units)))
        return scores.answer.kl.sum()

    least = measured(best)
    for _ in tqdm(range(steps), desc="climbing"):
        wider = draw.choice(units)
        trial = moved(best, wider, 1)
        while sum(size[item] for item in trial.items()) > budget:
            trial = moved(trial, draw.choice([u for u in units if u != wider]), -1)
        if (kl := measured(trial)) < least:
            best, least = trial, kl
    return Allocation(best, sum(size[item] for item in best.items()), 0)


def told(choice: Choice) -> tuple[list[float], str, str]:
    return list(choice.difference), "plan" if choice.chosen == choice.plan else str(choice.uniform), str(choice)


def the_map() -> Planner:
    """Cells of the tuning questions, and what is derived from them."""
    sens = Sensitivity(items("tune", TUNE), SUBJECTS["bundled"].tokens(**CALIBRATION))
    options = given()
    cells = sens.down(MAP)
    plan_cells = sens.down(options, [n for n in sens.shapes if where(n)[0] is not None])
    full = sens.store.get("full", sens.key | {"full": True}, lambda: sens.panel.score() | dict.fromkeys(OWN, np.array(0.0)))
    planner = Planner(sens, single_kl(plan_cells), GPTQ)
    ups = {bits: sens.up(Plan(replace(BASE, bits=bits)), ends(sens)) for bits in (2, 3)}
    real = []
    for methods in tqdm([*({n: m for n in planner.options} for m in options), *random_plans(planner)], desc="additivity"):
        scores = planner.judge.scores(planner.simulated(Allocation(methods, 0, 0).plan(planner.units)))
        real.append({"methods": {n: str(m) for n, m in methods.items()}, "kl": list(scores.answer.kl_interval())})
    bundle({"16 bits": [full]} | {f"{n} | {m}": [c] for (n, m), c in cells.items()}, KEPT + OWN, SHARED).save(
        RESULTS / "sensitivity.npz")
    save(Record("sensitivity", {
        "questions": len(sens.items), "calibration": CALIBRATION, "power": planner.power,
        "choices": {f"{b:g}": dict(zip(("difference", "taken", "why"), told(planner.choose(b)), strict=True)) for b in BUDGETS},
        "options": nested({k: interval(c.arrays) for k, c in plan_cells.items()}),
        "upwards": {str(b): {name: interval(c.arrays) for name, c in found.items()} for b, found in ups.items()},
        "cheap": cheap(planner, [*options, *(m for m in MAP if m.name == "rtn")]), "additivity": real},
        command="make maps", model_sha256=folder_hash(BUNDLED)))
    return planner


def the_plans(planner: Planner) -> None:
    """Everything at its bytes, on the judging questions, over draws."""
    sens = planner.sensitivity
    fixed = {str(m): Plan(m) for m in given()} | rules() | peers()
    chosen = {f"plan, {b:g} bits": planner.plan(b) for b in BUDGETS}
    # what the peers could choose from: groups of 128 alone
    same = replace(planner, kl={k: v for k, v in planner.kl.items() if k[1].group_size == 128})
    chosen["climbed from the plan at the bytes of nvidia-modelopt, kl_div, 3.5"] = climbed(
        same, same.bits(fixed["nvidia-modelopt, kl_div, 3.5"])).plan(planner.units)
    chosen |= {f"plan at the bytes of {name}": same.plan(same.bits(p)) for name, p in (rules() | peers()).items()}
    failing = {f"{kind} alone at 2 bits": Plan(Keep(), ((rf"{kind}$", Rtn(2)),)) for kind in dict.fromkeys(
        where(n)[1] for n in planner.options)}
    quality, draws = Quality(items("judge", JUDGE), sens.base, sens.store), {}
    everything = fixed | chosen | failing
    for name, plan in tqdm(everything.items(), desc="plans"):
        calibrated = any(m.keeps for m in plan.methods())
        draws[name] = [quality.cell(Simulation(name, plan, random.Random(d).sample(sens.tokens, len(sens.tokens)), sens.base))
                       for d in range(DRAWS if calibrated else 1)]
    draws["16 bits"] = [quality.cell(Original())]
    bundle(draws, KEPT, SHARED).save(RESULTS / "plans.npz")
    about = {name: {"bits": planner.bits(plan), "plan": plan.key()} for name, plan in (fixed | chosen).items()}
    save(Record("plans", {"draws": DRAWS, "questions": len(quality.items), "plans": about}, command="make maps",
                model_sha256=folder_hash(BUNDLED)))


if __name__ == "__main__":
    parts = sys.argv[1:] or ["map", "speed"]
    if "map" in parts:
        the_plans(the_map())
    if "speed" in parts:
        speed()
