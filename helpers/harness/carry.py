"""Which verdicts of the bundled model hold on a real one: the same sweep on both, panel by panel."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from helpers.measure.stats import Interval, paired
from helpers.results import read
from helpers.store import values

SAID = {-1: "lower", 0: "no difference", 1: "higher"}
VOICE_NAMES = {"novel": "real, novel", "speeches": "real, speeches", "questions": "real, questions"}


def verdict(row: Mapping[str, Any]) -> str:
    """A variant's KL beside that of its panel's first: measurably (95 %, paired) lower, higher, or neither."""
    _, low, high = row["kl_against_first"]
    return SAID[(low > 0) - (high < 0)]


def panels(name: str) -> dict[str, dict[str, dict[str, dict]]]:
    """{whose text: {panel: {variant: measures}}} of a sweep on the bundled model (its questions) and on the small one."""
    domains = read(f"sweep_small_{name}").data["domains"]
    return {"bundled": read(f"sweep_{name}").data["sweeps"]} | {domain: told["sweeps"] for domain, told in domains.items()}


def of_kind(arrays: Mapping[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """What a row of the real model's sweep has of one voice, or of the right answers to questions."""
    voice = np.isin(arrays["task"], [k for k in VOICE_NAMES if k != "questions"])
    at = arrays["task"] == kind if kind != "questions" else ~voice & np.array([" or " not in i for i in arrays["id"]])
    return {name: values_[..., at] for name, values_ in arrays.items()}


def real(name: str, one: str, other: str) -> dict[str, Interval]:
    """KL of a row of the real model's sweep less that of another, nats/token, on each kind of its texts."""
    rows = values(f"sweep_small_{name}")
    return {label: paired(*(of_kind(rows[row], kind) for row in (one, other)), "answer_kl") for kind, label in
            VOICE_NAMES.items()}


def verdicts(name: str) -> pd.DataFrame:
    """A row for each variant that both models have, less the first of its panel; a column for each kind of text."""
    told = panels(name)
    rows = {(knob, value): {whose: verdict(of[knob][value]) for whose, of in told.items()}
            for knob, panel in told["bundled"].items() if all(knob in of for of in told.values())
            for value, row in panel.items() if row["kl_against_first"] != [0, 0, 0]
            and all(value in of[knob] for of in told.values())}
    return pd.DataFrame.from_dict(rows, orient="index")


def agreement(table: pd.DataFrame) -> pd.DataFrame:
    """Of `verdicts`: on how many the real model's text gives the bundled model's verdict, and on how many the opposite one."""
    opposite = {"lower": "higher", "higher": "lower"}
    return pd.DataFrame({whose: {
        "same": int((table[whose] == table["bundled"]).sum()),
        "one of them none": int(((table[whose] == SAID[0]) != (table["bundled"] == SAID[0])).sum()),
        "opposite": int((table[whose] == table["bundled"].map(opposite)).sum())} for whose in table.columns[1:]}).T
