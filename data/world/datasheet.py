"""Measure the bundled model: `python -m data.world.datasheet` writes its record, figures and tables.

Full precision, and rounding to nearest (group 128, asymmetric) at 4, 3 and 2 bits: exact match per task with Wilson
intervals, loss increase and KL with paired bootstrap intervals, on all tokens and on the answers alone.
"""

import argparse
import json
import re
import textwrap

import matplotlib.pyplot as plt
from tqdm import tqdm

from helpers import plots, results
from helpers.files import folder_hash, write_atomically
from helpers.measure.answers import generate, is_correct, parses
from helpers.measure.quality import Scores, score
from helpers.measure.stats import mcnemar, share_interval
from helpers.measure.tasks import TASKS, encode, encode_text, examples, text, title
from helpers.methods.rtn import Rtn
from helpers.models.quantize import quantized
from helpers.models.source import BUNDLED, DATA, load

BITS = (4, 3, 2)
STRUCTURED = [t for t, task in TASKS.items() if task.structured]
FIGURES = DATA / "figures"


def losses(scores: Scores, full: Scores) -> dict:
    """ΔNLL and KL, nats/token, as [estimate, low, high], over all tokens and over the answers."""
    return {where: {"delta_nll": list(a.delta_nll(b)), "kl": list(a.kl_interval()), "agreement": a.agreement(),
                    "nll": a.mean_nll()}
            for where, a, b in (("all", scores.all, full.all), ("answer", scores.answer, full.answer))}


def measure() -> dict:
    """Everything the datasheet states about the model's quality."""
    model, tokenizer = load("bundled")
    asked = examples("judge")
    items = [encode(tokenizer, e) for e in asked]
    prose = {name: encode_text(tokenizer, text(name)) for name in ("tales", "recipes")}
    tasks = list(dict.fromkeys(e.task for e in asked))
    full, right, table = None, {}, {}
    for bits in tqdm((16, *BITS), desc="bits"):
        variant = model if bits == 16 else quantized(model, Rtn(bits, sym=False))
        scores = score(variant, items, model)
        said = generate(variant, tokenizer, asked)
        full = full or scores
        ok = {t: [is_correct(e, s) for e, s in zip(asked, said, strict=True) if e.task == t] for t in tasks}
        right.setdefault(16, ok)
        row = {"exact": {t: list(share_interval(sum(ok[t]), len(ok[t]))) for t in tasks},
               "flips": {t: mcnemar(right[16][t], ok[t])._asdict() for t in tasks},
               "parses": {t: sum(parses(s) for e, s in zip(asked, said, strict=True) if e.task == t) / len(ok[t])
                          for t in STRUCTURED},
               "perplexity": {n: score(variant, p).all.perplexity() for n, p in prose.items()},
               "losses": losses(scores, full),
               "losses_by_task": {t: losses(scores.select(t), full.select(t))["answer"] for t in tasks}}
        table[str(bits)] = row
    return {"examples": {t: len(right[16][t]) for t in tasks}, "parameters": model.num_parameters(), "bits": table}


def label_ends(ax, lines: dict[str, tuple[float, float, str]], gap: float) -> None:
    """Write each label at the end of its line, moved down to at least `gap` (in units of y) below the one above."""
    at = float("inf")
    for name, (x, y, colour) in sorted(lines.items(), key=lambda item: -item[1][1]):
        at = min(y, at - gap)
        ax.text(x, at, f"  {name}", va="center", color=colour, fontsize=8, clip_on=False)


def learning_curves(ax, curve: list[dict], tasks: list[str]) -> None:
    """Share of exact answers of each task against training tokens."""
    ends = {}
    for n, task in enumerate(tasks):
        points = [(row["tokens"] / 1e6, 100 * row[task]) for row in curve if task in row]
        [line] = ax.plot(*zip(*points, strict=True), linestyle=("-", "--")[n // 7])
        ends[title(task)] = (*points[-1], line.get_color())
    label_ends(ax, ends, gap=4.5)
    ax.set(xlabel="training tokens (millions)", ylabel="exact answers (%)", ylim=(0, 104))


def exact_by_bits(ax, data: dict) -> None:
    """Exact match of each task at 16, 4, 3 and 2 bits (rounding to nearest), with 95 % intervals."""
    tasks, widths = list(data["examples"]), ("16", "4", "3", "2")
    for n, bits in enumerate(widths):
        shares = [data["bits"][bits]["exact"][t] for t in tasks]
        error = [[100 * max(0, s[0] - s[1]) for s in shares], [100 * max(0, s[2] - s[0]) for s in shares]]
        y = [i + 0.17 * (n - 1.5) for i in range(len(tasks))]
        ax.errorbar([100 * s[0] for s in shares], y, xerr=error, fmt="osDv"[n], label=f"{bits} bits", capsize=2, linewidth=1)
    ax.set_yticks(range(len(tasks)), [title(t) for t in tasks])
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set(xlabel="exact answers (%), 95 % interval", xlim=(-2, 102))
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)


def draw(data: dict, curve: list[dict]) -> None:
    """The two figures of the datasheet."""
    FIGURES.mkdir(exist_ok=True)
    with plots.style():
        figure, axes = plt.subplots(figsize=(7, 4))
        learning_curves(axes, curve, list(data["examples"]))
        figure.savefig(FIGURES / "learning.png")
        figure, axes = plt.subplots(figsize=(7, 4.5))
        exact_by_bits(axes, data)
        figure.savefig(FIGURES / "bits.png")


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _range(interval: list, unit: float = 1, form: str = "+.4f") -> str:
    estimate, low, high = (unit * x for x in interval)
    return f"{estimate:{form}} ({low:{form}} to {high:{form}})"


def tables(data: dict) -> dict[str, str]:
    """The generated parts of data/README.md, by the name of their marker."""
    bits = list(data["bits"])
    shown = {}
    for e in examples("tune"):
        shown.setdefault(e.task, e)
    asked = [[title(t), textwrap.shorten(e.prompt, 230), f"`{e.answer}`"] for t, e in shown.items()]
    exact = [[title(t), str(n), *(_range(data["bits"][b]["exact"][t], 100, ".0f") for b in bits)]
             for t, n in data["examples"].items()]
    lost = [[title(t), *(f"{f['lost']} / {f['won']} (p {f['p_value']:.2g})"
                                    for f in (data["bits"][b]["flips"][t] for b in bits[1:]))] for t in data["examples"]]
    loss = [[b, where, *(_range(data["bits"][b]["losses"][where][k]) for k in ("delta_nll", "kl"))]
            for b in bits[1:] for where in ("all", "answer")]
    perplexity = [[name, *(f"{data['bits'][b]['perplexity'][name]:.3f}" for b in bits)]
                  for name in data["bits"][bits[0]]["perplexity"]]
    parse = [[title(t), *(f"{100 * data['bits'][b]['parses'][t]:.0f}" for b in bits)] for t in STRUCTURED]
    widths = [f"{b} bits" for b in bits]
    return {"examples": _table(["task", "request", "right answer"], asked),
            "exact": _table(["task", "questions", *widths], exact),
            "flips": _table(["task", *widths[1:]], lost),
            "losses": _table(["bits", "tokens", "ΔNLL (nats/token)", "KL (nats/token)"], loss),
            "perplexity": _table(["text", *widths], perplexity),
            "parses": _table(["task", *widths], parse)}


def fill(page: str, parts: dict[str, str]) -> str:
    """A page with each `<!-- NAME -->...<!-- end -->` filled in."""
    for name, content in parts.items():
        part = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        page, found = re.subn(part, lambda m, c=content: f"{m[1]}{c}\n{m[2]}", page, flags=re.S)
        if found != 1:
            raise ValueError(f"data/README.md: expected one part <!-- {name} -->, found {found}")
    return page


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--redraw", action="store_true", help="figures and tables from the record, nothing measured")
    if parser.parse_args().redraw:
        record = results.read("datasheet")
    else:
        record = results.Record("datasheet", measure(), model_sha256=folder_hash(BUNDLED))
        results.save(record)
    curve_file = DATA / "results" / "training_curve.jsonl"
    draw(record.data, [json.loads(line) for line in curve_file.read_text().splitlines()])
    page = DATA / "README.md"
    write_atomically(page, fill(page.read_text(encoding="utf-8"), tables(record.data)))
