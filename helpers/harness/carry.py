"""Which verdicts of the bundled model hold on a real one: the same sweep on both, panel by panel."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from helpers.measure.stats import Interval, paired
from helpers.results import read
from helpers.store import values

FIRST = {"kl_against_first": [0, 0, 0]}  # what the first of a panel says of itself, and what is not there says nothing
SAID = {-1: "lower", 0: "no difference", 1: "higher"}
VOICE_NAMES = {"novel": "real, novel", "speeches": "real, speeches", "questions": "real, questions"}


def said(low: float, high: float) -> str:
    """What an interval of a difference says of it."""
    return SAID[int(low > 0) - int(high < 0)]


def verdict(row: Mapping[str, Any]) -> str:
    """A variant's KL beside that of its panel's first: measurably (95 %, paired) lower, higher, or neither."""
    return said(*row["kl_against_first"][1:])


def panels(name: str) -> dict[str, dict[str, dict[str, dict]]]:
    """{whose text: {panel: {variant: measures}}} of a sweep on the bundled model (its questions) and on the small one."""
    domains = read(f"sweep_small_{name}").data["domains"]
    return {"bundled": read(f"sweep_{name}").data["sweeps"]} | {domain: told["sweeps"] for domain, told in domains.items()}


def of_kind(arrays: Mapping[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """What a row of the real model's sweep has of one voice, or of the right answers to questions."""
    voice = np.isin(arrays["task"], [k for k in VOICE_NAMES if k != "questions"])
    at = arrays["task"] == kind if kind != "questions" else ~voice & np.array([" or " not in i for i in arrays["id"]])
    return {name: values_[..., at] for name, values_ in arrays.items()}


def rows(name: str, whose: str) -> dict[str, dict[str, np.ndarray]]:
    """{panel: variant} of a sweep, on the bundled model or on one kind of the real one's texts."""
    if whose == "bundled":
        return values(f"sweep_{name}")
    return {row: of_kind(arrays, whose) for row, arrays in values(f"sweep_small_{name}").items()}


def real(name: str, one: str, other: str) -> dict[str, Interval]:
    """KL of a row of the real model's sweep less that of another, nats/token, on each kind of its texts."""
    return {label: paired((of := rows(name, kind))[one], of[other], "answer_kl") for kind, label in VOICE_NAMES.items()}


def verdicts(name: str) -> pd.DataFrame:
    """A row for each variant that both models have, less the first of its panel; a column for each kind of text."""
    told = panels(name)
    rows = {(knob, value): {whose: verdict(of[knob][value]) for whose, of in told.items()}
            for knob, panel in told["bundled"].items() for value in panel
            if all(of.get(knob, {}).get(value, FIRST)["kl_against_first"] != FIRST["kl_against_first"]
                   for of in told.values())}
    return pd.DataFrame.from_dict(rows, orient="index")


def widths() -> pd.DataFrame:
    """The same for GPTQ beside rounding at each width, which the panel of widths sets against its first alone."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for whose in ("bundled", *VOICE_NAMES):
        of = rows("gptq", whose)
        for bits in (2, 3, 4, 8):
            i = paired(of[f"bits: GPTQ, {bits}"], of[f"bits: rounding, {bits}"], "answer_kl")
            found.setdefault(("GPTQ beside rounding", f"{bits} bits"), {})[whose] = said(i.low, i.high)
    return pd.DataFrame.from_dict(found, orient="index")


METHOD, SETTING, CALIBRATED = "one method or another", "a setting of GPTQ", "calibration"
HALVES = "beside rounding, 3 bits"
KNOBS = {"calibration windows of 256": CALIBRATED, "GPTQ beside rounding": METHOD, HALVES: METHOD}


def kind(knob: str, value: str) -> str:
    """What kind of question a row of a panel answers."""
    if knob in KNOBS:
        return KNOBS[knob]
    return METHOD if value.startswith(("rounding", "AWQ", "NF4")) else SETTING


def both_models() -> pd.DataFrame:
    """Every question that the sweeps put to both models, with its kind and the verdict on each kind of text."""
    again = ["desc_act", "searched scales", "rounding"]  # which the recipes have as well
    halves = verdicts("awq").loc[["model"]].rename(index={"model": HALVES}, level=0)
    table = pd.concat([widths(), verdicts("recipes"), verdicts("gptq").drop(index="bits", level=0),
                       verdicts("remedies").drop(index=again, level=1), halves])
    return table.assign(kind=[kind(*row) for row in table.index])


def agreement(table: pd.DataFrame) -> pd.DataFrame:
    """Of `verdicts`: on how many the real model's text gives the bundled model's verdict, and on how many the opposite one."""
    opposite = {"lower": "higher", "higher": "lower"}
    return pd.DataFrame({whose: {
        "same": int((table[whose] == table["bundled"]).sum()),
        "one of them none": int(((table[whose] == SAID[0]) != (table["bundled"] == SAID[0])).sum()),
        "opposite": int((table[whose] == table["bundled"].map(opposite)).sum())} for whose in VOICE_NAMES}).T


def agreement_by_kind(table: pd.DataFrame) -> pd.DataFrame:
    """Of `both_models`: for each kind of question on how many of (questions x the real model's texts) the two agree."""
    counts = {of: agreement(rows.drop(columns="kind")).sum() for of, rows in table.groupby("kind")}
    return pd.DataFrame(counts).T


def chosen(panel: str = "recipes, 4 bits", usual: str = "GPTQ, symmetric") -> pd.DataFrame:
    """For each kind of text: the recipe with the least KL on the tuning set, and of the judging set its KL, that of GPTQ as the
    toolkits do it less its own, and the recipes that are measurably nearer to full precision there."""
    told = {}
    for whose, of in panels("tuned").items():
        judged = {row.removeprefix(f"{panel}: "): arrays for row, arrays in rows("recipes", whose).items() if panel in row}
        tuned = {name: row["kl"][0] for name, row in of[panel].items() if name in judged}
        best = min(tuned, key=tuned.__getitem__)
        apart = {name: paired(judged[name], judged[best], "answer_kl") for name in {*tuned, usual}}
        told[whose] = {"tried": len(tuned), "chosen": best, "KL, tuning": f"{tuned[best]:.4f}",
                       "KL, judging": f"{judged[best]['answer_kl'].mean(0).sum() / judged[best]['tokens'].sum():.4f}",
                       "the toolkits' less its own": str(apart[usual]),
                       "nearer": ", ".join(sorted(n for n, i in apart.items() if i.high < 0)) or "none"}
    return pd.DataFrame(told).T
