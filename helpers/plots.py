"""Figures: functions of (axes, table). One colour and marker for each method, the same in the whole book."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch

from helpers.measure.stats import share_interval
from helpers.measure.tasks import title

# method -> (colour, marker); Okabe-Ito colours, told apart by the marker where colours are not
METHODS = {
    "fp16": ("#000000", "o"), "int8": ("#8C8C8C", "s"), "rtn": ("#56B4E9", "v"), "nf4": ("#009E73", "D"),
    "gptq": ("#0072B2", "^"), "awq": ("#D55E00", "P"), "autoround": ("#CC79A7", "X"),
}
OTHERS = [("#E69F00", "*"), ("#7F3C8D", "<"), ("#4B4B8F", ">"), ("#A0522D", "h"), ("#3C7F6A", "d")]


def looks(names: Iterable[str], kinds: Mapping[str, str] | None = None) -> dict[str, tuple[str, str]]:
    """(colour, marker) of each row: that of its method (`kinds`; else the row's name is one). A method that is not in the
    table gets one of its own, in the order of appearance."""
    methods = {name: (kinds or {}).get(name, name) for name in names}
    unknown = [m for m in dict.fromkeys(methods.values()) if m not in METHODS]
    table = METHODS | {m: OTHERS[n % len(OTHERS)] for n, m in enumerate(unknown)}
    return {name: table[m] for name, m in methods.items()}


def style() -> AbstractContextManager:
    """The book's look, as a context."""
    return plt.style.context(Path(__file__).with_name("book.mplstyle"))


def between(interval: tuple[float, float, float], form: str) -> str:
    """An estimate and its interval as text, each number in this format."""
    estimate, low, high = interval
    return f"{estimate:{form}} [{low:{form}}, {high:{form}}]"


def intervals(ax, table: dict, xlabel: str, kinds: Mapping[str, str] | None = None) -> None:
    """A row for each name with its estimate and interval, and a line at zero."""
    for n, (i, (colour, marker)) in enumerate(zip(table.values(), looks(table, kinds).values(), strict=True)):
        ax.errorbar(i.estimate, n, xerr=[[i.estimate - i.low], [i.high - i.estimate]], fmt=marker, color=colour, capsize=3)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(table)), list(table))
    ax.set(xlabel=xlabel, ylim=(len(table) - 0.5, -0.5))
    ax.grid(axis="y", visible=False)


def exact_by_task(ax, table: dict[str, dict], kinds: Mapping[str, str] | None = None) -> None:
    """Share of right answers of each model by task, with 95 % intervals."""
    shown = looks(table, kinds)
    for n, (name, by_task) in enumerate(table.items()):
        colour, marker = shown[name]
        shares = [share_interval(right.sum(), len(right)) for right in by_task.values()]
        y = [i + 0.14 * (n - (len(table) - 1) / 2) for i in range(len(shares))]
        error = [[100 * max(0, s.estimate - s.low) for s in shares], [100 * max(0, s.high - s.estimate) for s in shares]]
        ax.errorbar([100 * s.estimate for s in shares], y, xerr=error, fmt=marker, color=colour, label=name, linewidth=1)
    ax.set_yticks(range(len(by_task)), [title(t) for t in by_task])
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set(xlabel="exact answers (%), 95 % interval", xlim=(-2, 102))
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=8)


def pipelines(ax) -> None:
    """The three flows from one checkpoint: what each looks at, does, and leaves behind."""
    rows = {
        "gptq": ("calibration text", "minimise the output\nerror, layer by layer", "packed GPTQ file"),
        "awq": ("size of the inputs\non calibration text", "scale what matters,\nround to nearest", "packed AWQ file"),
        "nf4": ("nothing but\nthe weights", "nearest of 16 values,\nwhile loading", "NF4 in memory,\na file if saved"),
    }

    def box(x: float, y: float, content: str, colour: str) -> None:
        ax.add_patch(FancyBboxPatch((x, y - 0.26), 0.22, 0.52, boxstyle="round,pad=0,rounding_size=0.02",
                                    fc="white", ec=colour))
        ax.text(x + 0.11, y, content, ha="center", va="center", fontsize=8.5)

    def arrow(start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
        ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "shrinkA": 0, "shrinkB": 0})

    box(0, 1, "16-bit\ncheckpoint", "black")
    for y, (method, steps) in zip((2, 1, 0), rows.items(), strict=True):
        colour, xs = METHODS[method][0], (0.32, 0.6, 0.88)
        arrow((0.22, 1), (xs[0], y), colour)
        for x, step in zip(xs, steps, strict=True):
            box(x, y, step, colour)
        for x in xs[:2]:
            arrow((x + 0.22, y), (x + 0.28, y), colour)
        ax.text(xs[0], y + 0.33, method.upper(), color=colour, weight="bold", fontsize=9)
    for x, head in zip((0.43, 0.71, 0.99), ("looks at", "does", "leaves"), strict=True):
        ax.text(x, 2.62, head, ha="center", style="italic", fontsize=9)
    ax.set(xlim=(-0.01, 1.11), ylim=(-0.35, 2.8))
    ax.axis("off")


def sweep(table: dict[str, dict], colour: str) -> None:
    """One panel a knob: KL from the 16-bit model at each of its values, with 95 % intervals and the share of right answers.

    Hollow: the paired difference from the panel's first row has an interval that contains zero. Grey: the single draws.
    """
    heights = [0.5 + 0.19 * len(values) for values in table.values()]
    figure, axes = plt.subplots(len(table), figsize=(5.4, sum(heights) + 0.5), squeeze=False, height_ratios=heights)
    for ax, (knob, values) in zip(axes.flat, table.items(), strict=True):
        for n, row in enumerate(values.values()):
            (estimate, low, high), (_, least, most) = row["kl"], row["kl_against_first"]
            ax.errorbar(estimate, n, xerr=[[estimate - low], [high - estimate]], fmt="o", color=colour, capsize=2,
                        mfc="white" if n and least <= 0 <= most else colour)
            ax.plot(row["kl_of_draws"], [n + 0.3] * len(row["kl_of_draws"]), "|", color="0.5", markersize=4)
            ax.annotate(f"{100 * row['exact']:.1f} %", (1.01, n), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        ax.set_yticks(range(len(values)), ["whole row" if v == "-1" else v for v in values], fontsize=9)
        ax.tick_params(labelsize=8)
        ax.set(title=knob, ylim=(len(values) - 0.5, -0.5))
        estimates = [row["kl"][0] for row in values.values()]
        if max(estimates) > 20 * min(estimates):
            ax.set_xscale("log")
        else:
            ax.set_xlim(left=0)
            ax.locator_params(axis="x", nbins=6)
        ax.grid(axis="y", visible=False)
    figure.supxlabel("KL from the 16-bit model on answers (nats/token), 95 % interval; at the right:\n"
                     "exact answers. Hollow: no difference from the first row detectable. Grey: single draws", fontsize=9)


def pareto(ax, table: Mapping[str, tuple[float, tuple[float, float, float]]], kinds: Mapping[str, str],
           passing: Mapping[str, str], pick: str | None) -> None:
    """Size (MB) against KL from full precision with its interval, for each variant; filled: passes every gate, hollow: does
    not. A ring marks the pick. Sizes that are nearly equal are set apart."""
    shown, at = looks(table, kinds), []
    apart = (max(size for size, _ in table.values()) - min(size for size, _ in table.values())) / 30
    for name, (size, (estimate, low, high)) in sorted(table.items(), key=lambda row: row[1][0]):
        colour, marker = shown[name]
        size = max(size, at[-1] + apart) if at else size
        at.append(size)
        ax.errorbar(size, estimate, yerr=[[estimate - low], [high - estimate]], fmt=marker, color=colour, capsize=2,
                    mfc=colour if passing[name] == "pass" else "white", label=name)
        if name == pick:
            ax.plot(size, estimate, "o", markersize=16, mfc="none", mec=colour)
    ax.legend(fontsize=8, ncols=2)
    ax.set(xlabel="weights on disk (MB)", ylabel="KL from full precision on answers\n(nats/token), 95 % interval")


def gates(ax, found: Mapping[str, Mapping[str, str]]) -> None:
    """A mark for each variant (across) and gate (down): pass, fail, undecided. `found`: {variant: {gate: outcome}}."""
    marks = {"pass": ("o", "#009E73", "full"), "fail": ("X", "#D55E00", "full"), "undecided": ("s", "#8C8C8C", "none")}
    rows = list(next(iter(found.values())))
    for x, of in enumerate(found.values()):
        for gate, outcome in of.items():
            marker, colour, fill = marks[outcome]
            ax.plot(x, rows.index(gate), marker, color=colour, fillstyle=fill, markersize=11)
    for name, (marker, colour, fill) in marks.items():
        ax.plot([], [], marker, color=colour, fillstyle=fill, label=name)
    ax.set_xticks(range(len(found)), list(found), rotation=30, ha="right")
    ax.set_yticks(range(len(rows)), rows)
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlim=(-0.5, len(found) - 0.5))
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, fontsize=8)


def power(ax, curves: Mapping[str, list[dict]]) -> None:
    """How often a planted effect was found, with 95 % intervals, against how often the printed one promises."""
    for n, (name, points) in enumerate(curves.items()):
        x, y = ([100 * p[k] for p in points] for k in ("promised", "found"))
        error = [[100 * (p["found"] - p["low"]) for p in points], [100 * (p["high"] - p["found"]) for p in points]]
        ax.errorbar(x, y, yerr=error, fmt="o^sD"[n % 4], capsize=2, label=name)
    ax.plot([0, 100], [0, 100], color="0.5", linewidth=0.8)
    ax.set(xlabel="promised (%)", ylabel="found (%)", xlim=(0, 102), ylim=(0, 102))
    ax.legend(fontsize=8)


def won_back(panels: Mapping[str, Mapping[str, dict]]) -> None:
    """{whose text: {variant: measures}}: the share of rounding's KL that each variant wins back, with its interval."""
    names = [n for n in next(iter(panels.values())) if n != "rounding" and all(n in p for p in panels.values())]
    figure, ax = plt.subplots(figsize=(5.4, 0.42 * len(names) + 1.2))
    for k, (whose, panel) in enumerate(panels.items()):
        estimate, low, high = np.array([panel[n]["kl_won_back"] for n in names]).T
        ax.errorbar(100 * estimate, np.arange(len(names)) + 0.18 * (k - (len(panels) - 1) / 2), capsize=2, label=whose,
                    xerr=100 * np.array([estimate - low, high - estimate]), fmt="osD^"[k], color=f"C{k}", markersize=4)
    ax.axvline(0, color="0.5", linewidth=0.8)
    ax.set_yticks(range(len(names)), [fill(name, 32) for name in names], fontsize=8)
    ax.set(ylim=(len(names) - 0.5, -0.5), xlabel="% of rounding's KL that is won back")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8)


def flow(ax, trials: Iterable[tuple[str, str, str, str]], ends: Iterable[tuple[str, str]]) -> None:
    """A decision as it ran, from above: `trials` (variant, outcome, what the gate said, why the next was tried), then `ends`
    (what it is, its name): the pick, the fallback."""
    colours, y, rows = {"pass": "#009E73", "fail": "#D55E00", "undecided": "#8C8C8C"}, 0.0, list(trials)

    def box(content: str, colour: str, line: str = "-") -> None:
        ax.add_patch(FancyBboxPatch((0, y - 0.5), 1, 0.74, boxstyle="round,pad=0,rounding_size=0.06", fc="white", ec=colour,
                                    lw=1.6, ls=line))
        ax.text(0.5, y - 0.13, content, ha="center", va="center", fontsize=7.5)

    for n, (variant, outcome, said, change) in enumerate(rows):
        box(f"{variant}\n{outcome}: {said}", colours[outcome])
        if n < len(rows) - 1 or ends:
            ax.annotate("", (0.5, y - 0.98), (0.5, y - 0.52), arrowprops={"arrowstyle": "->", "color": "0.4"})
            ax.text(0.54, y - 0.74, change, fontsize=7, color="0.35", va="center")
        y -= 1.24
    for what, name in ends:
        box(f"{what}\n{name}", "black", "-" if name else ":")
        y -= 0.9
    ax.set(xlim=(-0.02, 1.02), ylim=(y + 0.3, 0.35))
    ax.axis("off")


def recipes(ax, table: Mapping[str, tuple[float, float, float]]) -> None:
    """KL of each recipe with its interval, from above; the colour is that of the method its name begins with."""
    for y, (name, (estimate, low, high)) in enumerate(table.items()):
        colour, marker = METHODS[next((m for m in METHODS if name.lower().startswith(m)), "rtn")]
        ax.errorbar(estimate, y, xerr=[[estimate - low], [high - estimate]], fmt=marker, color=colour, capsize=2)
    ax.set(yticks=range(len(table)), ylim=(len(table) - 0.5, -0.5), xlim=(0, None), yticklabels=list(table))
    ax.tick_params(labelsize=8)
