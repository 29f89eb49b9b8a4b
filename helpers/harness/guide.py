"""What to try first, made of records: each method with when to take it, when not, and what was measured on both models."""

from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd
from IPython.display import Markdown

from helpers.harness.carry import VOICE_NAMES, panels, verdict

MODELS = {"bundled": "bundled", **VOICE_NAMES}


class Entry(NamedTuple):
    """A method's row: `recipe` is its name in the sweep of recipes at 4 bits."""

    recipe: str
    take: str
    avoid: str
    instead: str
    where: str


ENTRIES = {
    "NF4": Entry("NF4", "today, without calibration text; to train adapters on top",
                 "if an engine has to serve a file at speed", "GPTQ", "04_nf4.ipynb"),
    "GPTQ": Entry("GPTQ", "as the yardstick of this table", "wherever scales can be searched", "our default", "05_gptq.ipynb"),
    "GPTQ, our default": Entry(
        "GPTQ, symmetric, group aware, searched scales",
        "the first to try of one method alone (its gain is on the real model): vLLM reads its file, on a CPU too",
        "calibrated on the first text at hand", "several texts, compared", "05_gptq.ipynb"),
    "GPTQ, desc_act, searched scales": Entry(
        "GPTQ, desc_act, searched scales", "for less KL still, where the engine reads desc_act and asymmetric grids",
        "if the file has to become an AWQ file", "our default", "05_gptq.ipynb"),
    "AWQ": Entry("AWQ", "if the GPTQ at hand is plain, on a model with loud channels as the real one here",
                 "below 4 bits, which the format cannot hold", "GPTQ, our default", "06_awq.ipynb"),
    "AWQ, then GPTQ": Entry("AWQ's scales, then GPTQ, group aware, searched scales",
                            "for the least KL on a model like the real one, in a file vLLM reads",
                            "below 4 bits, which that file cannot hold", "GPTQ, our default", "06_awq.ipynb"),
}


def measured(recipe: str, whose: Mapping[str, Mapping]) -> dict[str, str]:
    """{whose text: KL, and the verdict beside plain GPTQ} of the sweep of recipes at 4 bits."""
    found = {}
    for text, panel in whose.items():
        row = panel["recipes, 4 bits"].get(recipe)
        found[f"KL, {MODELS[text]}"] = "not measured" if row is None else f"{row['kl'][0]:.3g}" + (
            "" if recipe == "GPTQ" else f" ({verdict(row)})")
    return found


def table() -> pd.DataFrame:
    """A row a method. In brackets: beside plain GPTQ, paired by question."""
    whose = panels("recipes")
    return pd.DataFrame({name: {"take it": e.take, "avoid it": e.avoid, "else": e.instead, **measured(e.recipe, whose),
                                "see": e.where} for name, e in ENTRIES.items()}).T


def linked() -> Markdown:
    """The same as a table whose methods are links to the chapters that measure them."""
    rows = table()
    head = ["", *rows.columns[:-1]]
    lines = [[f"[{name}]({row['see']})", *row.iloc[:-1]] for name, row in rows.iterrows()]
    return Markdown("\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines]))
