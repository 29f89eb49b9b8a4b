"""Verdicts on claims, each from a rule on measured values, with the place that holds them and a primary source."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Markdown

from helpers.measure.stats import paired
from helpers.results import read
from helpers.store import values

HOLDS, CONDITIONS, NOT, UNDECIDED = "holds", "holds with conditions", "does not hold", "undecided here"
VERDICTS = (HOLDS, CONDITIONS, NOT, UNDECIDED)
COUNT = 24
GPTQ, AWQ, QLORA = "arXiv:2210.17323", "arXiv:2306.00978", "arXiv:2305.14314"
ADDRESS = {name: f"https://arxiv.org/abs/{name.partition(':')[2]}" for name in (GPTQ, AWQ, QLORA)}


class UnknownClaim(ValueError):
    """A verdict or a claim that is not one of those there are."""


class Finding(NamedTuple):
    """What came of a claim: `seen` on both models where it could be, `where` as a link of markdown, `decide` a command."""

    claim: str
    verdict: str
    seen: str
    where: str
    source: str
    decide: str


@dataclass
class Audit:
    """The findings so far, by the claim's number."""

    findings: dict[int, Finding] = field(default_factory=dict)

    def say(self, number: int, claim: str, verdict: str, seen: str, where: str, source: str = "", decide: str = "") -> None:
        """Note and print a verdict. Raises UnknownClaim for a number, or a verdict, that there is not."""
        if verdict not in VERDICTS or not 1 <= number <= COUNT:
            raise UnknownClaim(f"C{number}, {verdict!r}: expected C1 to C{COUNT}, and one of {', '.join(VERDICTS)}")
        if verdict == UNDECIDED and not decide:
            raise UnknownClaim(f"C{number} is {UNDECIDED}: say the command that would decide it")
        self.findings[number] = Finding(claim, verdict, seen, where, source, decide)
        print(f"C{number}: {verdict}")

    def missing(self) -> list[int]:
        return [n for n in range(1, COUNT + 1) if n not in self.findings]

    def counts(self) -> str:
        """How many claims have each verdict, in words."""
        of = [f.verdict for f in self.findings.values()]
        return ", ".join(f"{verdict}: {of.count(verdict)}" for verdict in VERDICTS)

    def table(self) -> Markdown:
        """All of them, in order."""
        head = ["", "the article says", "verdict", "what was seen", "where", "primary source", "decided by"]
        rows = [[f"C{n}", f.claim, f"**{f.verdict}**", f.seen, f.where, _link(f.source), f.decide and f"`{f.decide}`"]
                for n, f in sorted(self.findings.items())]
        return Markdown("\n".join("| " + " | ".join(r) + " |" for r in (head, ["---"] * len(head), *rows)))

    def draw(self, ax: plt.Axes) -> None:
        """How many claims have each verdict."""
        colours = ("#009E73", "#E69F00", "#D55E00", "#8C8C8C")
        for y, (verdict, colour) in enumerate(zip(VERDICTS, colours, strict=True)):
            which = [n for n, f in sorted(self.findings.items()) if f.verdict == verdict]
            ax.barh(y, len(which), color=colour, height=0.6)
            ax.text(len(which) + 0.2, y, ", ".join(f"C{n}" for n in which), va="center", fontsize=8)
        ax.set(yticks=range(len(VERDICTS)), yticklabels=VERDICTS, xlabel="claims", xlim=(0, COUNT))
        ax.invert_yaxis()


def _link(source: str) -> str:
    name, comma, rest = source.partition(",")
    return f"[{name}]({ADDRESS[name]}){comma}{rest}" if name in ADDRESS else source


def plans_against_uniform() -> dict[str, int]:
    """{plan of data/results/plans.json: -1, 0 or 1}: its KL measurably below, not told from, or above that of the uniform
    setting of no more bits that has the least KL."""
    record, scores = read("plans").data["plans"], values("plans")
    uniform = {n: p["bits"] for n, p in record.items() if n.startswith("gptq")}

    def kl(name: str) -> float:
        return float(scores[name]["answer_kl"].sum() / scores[name]["answer_tokens"].sum())

    found = {}
    for name, plan in record.items():
        rivals = [n for n, bits in uniform.items() if bits <= plan["bits"] + 0.01]
        if name.startswith("plan, ") and rivals:
            _, low, high = paired(scores[name], scores[min(rivals, key=kl)], "answer_kl")
            found[name] = int(low > 0) - int(high < 0)
    return found


def grids_on_the_real_model() -> pd.DataFrame:
    """Perplexity of the real model's two voices at 4 bits by each grid, one token after the other; the rows that are there."""
    scores = values("sweep_small_recipes")
    rows = {"16 bits": "16 bits: 16 bits", **{name: f"recipes, 4 bits: {row}" for name, row in (
        ("NF4", "NF4"), ("INT4, symmetric", "rounding, symmetric"), ("INT4, asymmetric", "rounding"))}}
    return pd.DataFrame({name: {f"real, {voice}": _perplexity(scores[row], voice) for voice in ("novel", "speeches")}
                         for name, row in rows.items() if row in scores})


def _perplexity(arrays: Mapping[str, np.ndarray], voice: str) -> float:
    at = arrays["task"] == voice
    return float(np.exp(arrays["answer_nll"][0, at].sum() / arrays["answer_tokens"][at].sum()))
