"""The sensitivity map of a model, and a mixed plan that is not worse than uniform: `python -m helpers.sensitivity --help`.

Leaves map.csv and map.png, and plan.json, which `python -m helpers.quantize --plan` and `python -m helpers.compare --methods`
take. Exit status: 0, or 2 for bad input.
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
from transformers import AutoTokenizer

from helpers import book, maps
from helpers.harness.allocate import save_plan
from helpers.harness.compare import Quality
from helpers.harness.planner import BITS, GROUPS, Planner, settings, single_kl
from helpers.harness.sensitivity import Sensitivity, table
from helpers.harness.study import DTYPES, material
from helpers.measure.stats import studentized_interval
from helpers.measure.tasks import encode_all
from helpers.methods.gptq import Gptq
from helpers.models.formats import GPTQ, GPTQ_V2
from helpers.models.source import ModelUnavailable
from helpers.models.texts import BadData


def parse(argv: list[str]) -> Namespace:
    parser = ArgumentParser("python -m helpers.sensitivity", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled", help="bundled, a folder with safetensors, or a hub id")
    parser.add_argument("--revision", help="of a hub id")
    parser.add_argument("--prompts", type=Path, help='your questions, a .jsonl of {"prompt", and if you have them "answer"}; a '
                        "third of them is measured on, and calibrated on; the others judge the plan")
    parser.add_argument("--budget", type=float, default=3.5, help="bits a weight inside the blocks, as files count them")
    parser.add_argument("--bits", nargs="+", type=int, default=list(BITS), help="what a linear may get, beside 16")
    parser.add_argument("--groups", nargs="+", type=int, default=list(GROUPS), help="group sizes that it may get")
    parser.add_argument("--asym", action="store_true", help="grids with zero points: better at 2 bits, and fewer engines")
    parser.add_argument("--unlike", action="store_true", help="let linears differ that engines fuse (q, k, v; gate, up)")
    parser.add_argument("--limit", type=int, default=30, help="most questions a task, of the book's own")
    parser.add_argument("--out", type=Path, default=book.BUILD / "sensitivity", help="folder for the map and the plan")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="that full precision is computed in")
    return parser.parse_args(argv)


def run(options: Namespace) -> None:
    """Measure, plan, check, write."""
    book.quiet()
    if options.model.endswith("config.json"):
        raise ModelUnavailable(f"{options.model}: the answers of random weights say nothing; give a model")
    options.out.mkdir(parents=True, exist_ok=True)
    given = material(options.model, options.revision, options.dtype, options.device, options.prompts, options.limit)
    if len(given.tune) < 2:
        raise BadData(f"{options.prompts}: of {len(given.tune) + len(given.judge)} questions {len(given.tune)} are left to "
                      "choose by, which is a third of them: expected at least 2")
    tokenizer, form = AutoTokenizer.from_pretrained(given.full.folder), GPTQ_V2 if options.asym else GPTQ
    tune, judge = (encode_all(tokenizer, part, given.full.config) for part in (given.tune, given.judge))
    sensitivity = Sensitivity(tune, given.tokens, given.full, device=options.device)
    inside = list(sensitivity.shapes)[1:-1]
    methods = settings(options.bits, options.groups, Gptq(sym=not options.asym))
    plain = Planner(sensitivity, {(n, m): 0.0 for n in inside for m in methods if sensitivity.fits(n, m)}, form,
                    alike=not options.unlike)
    plain.allocation(options.budget)  # a budget that cannot be kept is told before anything is measured
    cells = sensitivity.down(methods, inside)
    planner = Planner(sensitivity, single_kl(cells), form, alike=not options.unlike)
    choice = planner.choose(options.budget)
    frame = table({k: c.arrays for k, c in cells.items()}, sensitivity.panel.score())
    frame.to_csv(options.out / "map.csv", index=False)
    figure, ax = plt.subplots(figsize=(7, 1 + 0.35 * sensitivity.count))
    layers = Counter(frame.setting)  # in how many a group size fits
    maps.heat_map(ax, frame[frame.setting == min(layers, key=lambda m: (-layers[m], abs(m.bits - 3), -m.group_size))])
    figure.savefig(options.out / "map.png", dpi=160, bbox_inches="tight")
    plt.close(figure)
    quality = Quality(judge, given.full, sensitivity.store, options.device)
    plan, other = (quality.scores(planner.simulated(p)).answer for p in (choice.chosen, choice.uniform))
    apart = studentized_interval(plan.kl - other.kl, plan.tokens)
    save_plan(options.out / "plan.json", choice.chosen, given.full, bits=planner.bits(choice.chosen), why=str(choice),
              kl=list(plan.kl_interval()), kl_less_uniform=list(apart))
    print(f"on the questions to choose by: {choice}\non those to judge by: KL {plan.kl_interval()}"
          f"{f', {apart} against {choice.uniform.default}' if choice.chosen != choice.uniform else ''}; "
          f"{planner.bits(choice.chosen):.2f} bits a weight\n{options.out / 'plan.json'}")


def main(argv: list[str]) -> int:
    try:
        run(parse(argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}".replace("\n", " "), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
