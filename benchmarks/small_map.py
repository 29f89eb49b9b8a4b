"""The layers of the small model, and plans made of their map: `python -m benchmarks.small_map --device cuda`, ten minutes on a
large GPU, days on two cores; goes on at the cell it was at, and in parts on several processes (`--part`).

What benchmarks/sensitivity.py does for the bundled model, with fewer settings. In data/results: the map on the tuning texts,
plans and rules of thumb beside uniform settings on the others (small_map.json), and the values of each text (small_map.npz).
"""

import argparse
import random
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.sensitivity import interval, nested
from benchmarks.sweeps import KEPT, SHARED, SUBJECTS, by_domain
from helpers.harness.compare import Quality
from helpers.harness.planner import Planner, single_kl
from helpers.harness.sensitivity import Sensitivity, where
from helpers.harness.variants import Original, Simulation
from helpers.methods.gptq import Gptq
from helpers.methods.rtn import Rtn
from helpers.models.fetch import origin
from helpers.models.formats import GPTQ
from helpers.models.method import Plan
from helpers.results import RESULTS, Record, save
from helpers.store import Store, bundle

SMALL, DRAWS = SUBJECTS["small"], 2
BASE = Gptq(group_size=SMALL.group)
GIVEN = tuple(replace(BASE, bits=b) for b in (2, 3, 4, 8))  # what a linear may get, and what uniform plans are made of
MAP = (*GIVEN, Rtn(3, SMALL.group), Rtn(4, SMALL.group))


class Study:
    """The map and the plans, on one device."""

    def __init__(self, device: str, store: Store):
        self.sens = Sensitivity(SMALL.items("tuned")[::2], SMALL.tokens(), SMALL.base, store, device)
        self.quality = Quality(SMALL.items("recipes"), SMALL.base, store, device)

    @property
    def layers(self) -> list[str]:
        return list(self.sens.shapes)

    @cached_property
    def planner(self) -> Planner:
        inside = [n for n in self.layers if where(n)[0] is not None]
        return Planner(self.sens, single_kl(self.sens.down(GIVEN, inside, progress=False)), GPTQ)

    def plans(self) -> dict[str, Plan]:
        """Uniform settings, plans of their bytes and between, rules of thumb on a base of 3 bits."""
        low, high = GIVEN[1], GIVEN[2]
        two, three, four, _ = sizes = [self.planner.bits(Plan(m)) for m in GIVEN]
        budgets = sorted([*sizes[1:3], (two + three) / 2, (three + four) / 2, four + 0.5])
        uniform = {f"uniform, {m.bits} bits": Plan(m) for m in GIVEN}
        rules = {"attention 4, MLP 3": r"self_attn", "MLP 4, attention 3": r"mlp", "down_proj 4, others 3": r"down_proj",
                 "v_proj and o_proj 4, others 3": r"[vo]_proj", "first and last block 4, others 3": r"layers\.(0|29)\."}
        return uniform | {f"plan, {b:.2f} bits": self.planner.plan(b) for b in budgets} | {
            name: Plan(low, ((pattern, high),)) for name, pattern in rules.items()}

    def simulations(self) -> dict[str, list[Simulation]]:
        pool = self.sens.tokens
        return {name: [Simulation(f"{name} {d}", plan, random.Random(d).sample(pool, len(pool)), SMALL.base)
                       for d in range(DRAWS)] for name, plan in self.plans().items()}

    def told(self) -> dict[str, Any]:
        cells = self.sens.down(MAP)
        judged = {"16 bits: 16 bits": [self.quality.cell(Original("small"))]} | {
            f"plans: {name}": [self.quality.cell(s) for s in draws] for name, draws in self.simulations().items()}
        values = bundle(judged, KEPT, SHARED)
        values.save(RESULTS / "small_map.npz")
        about = {name: {"bits": self.planner.bits(p), "plan": p.key()} for name, p in self.plans().items()}
        return {"texts": len(self.sens.items), "draws": DRAWS, "plans": about, "model": origin(SMALL.base.folder),
                "map": nested({k: interval(c.arrays) for k, c in cells.items()}),
                "errors": nested({k: [float(c.arrays[e]) for e in ("weight_error", "output_error")]
                                  for k, c in cells.items()}),
                "judged": by_domain(values, DRAWS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--part", default="0/1", help="K/N: of layers, or of plans, every N-th from the K-th on")
    parser.add_argument("--only", choices=("map", "plans", "record"), nargs="+", default=["map", "plans", "record"])
    parser.add_argument("--cells", type=Path, help="another folder of cells")
    args = parser.parse_args()
    study = Study(args.device, Store(args.cells) if args.cells else Store())
    part, parts = map(int, args.part.split("/"))
    if "map" in args.only:
        study.sens.down(MAP, study.layers[part::parts])
    if "plans" in args.only:
        for one in tqdm([s for draws in study.simulations().values() for s in draws][part::parts], desc="plans"):
            study.quality.cell(one)
    if "record" in args.only:
        print(save(Record("small_map", study.told(), command=f"python -m benchmarks.small_map --device {args.device}", seed=0,
                          model_sha256=SMALL.base.weights)))


if __name__ == "__main__":
    main()
