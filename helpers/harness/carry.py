"""Which verdicts of the bundled model hold on a real one: the same sweep on both, panel by panel."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from helpers.measure.quality import right_answers
from helpers.measure.stats import Interval, paired, ratio_interval
from helpers.measure.tasks import ENGLISH
from helpers.results import read
from helpers.store import values

UNQUANTIZED = "16 bits: 16 bits"
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


def right(arrays: Mapping[str, np.ndarray], tasks: Iterable[str] = ENGLISH) -> np.ndarray:
    """Whether each of the real model's questions was answered right, [draws, questions]: the right choice was the likeliest."""
    at = [arrays["task"] == task for task in tasks]
    return np.concatenate([[list(right_answers(arrays["id"][a], exact[a], (nll / arrays["answer_tokens"])[a]).values())
                            for exact, nll in zip(arrays["exact"], arrays["answer_nll"], strict=True)] for a in at], 1)


def answers(name: str) -> dict[str, tuple[float, Interval]]:
    """Of the real model's questions: the share that each row of a sweep gets right, and that less what 16 bits get."""
    of = {row: right(arrays).astype(float) for row, arrays in values(f"sweep_small_{name}").items()}
    full = of.pop(UNQUANTIZED)
    return {row: (found.mean(), ratio_interval(found - full, np.ones(found.shape[1]))) for row, found in of.items()}


def differences(name: str) -> dict[tuple[str, str], dict[str, Interval]]:
    """{(panel, variant): {whose text: KL less that of the panel's first, in % of it}} of every variant that was measured. The
    first that both models have, where they share any; nothing for a text on which one of the two was not measured."""
    of = {whose: rows(name, whose) for whose in ("bundled", *VOICE_NAMES)}
    panels_: dict[str, list[str]] = {}
    for row in dict.fromkeys([*of["bundled"], *of["novel"]]):
        panels_.setdefault(row.split(": ", 1)[0], []).append(row)
    panels_.pop("16 bits")
    found = {}
    for knob, panel in panels_.items():
        first = next((row for row in panel if all(row in o for o in of.values())), panel[0])
        for row in (r for r in panel if r != first):
            found[knob, row.removeprefix(f"{knob}: ")] = {
                whose: share(o[row], o[first]) for whose, o in of.items() if row in o and first in o}
    return found


def share(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> Interval:
    """KL of one less that of the other, in % of the other's."""
    whole = 100 * other["tokens"].sum() / other["answer_kl"].mean(0).sum()
    return Interval(*(whole * x for x in paired(one, other, "answer_kl")))


def verdicts(name: str) -> pd.DataFrame:
    """A row for each variant that both models have, less the first of its panel; a column for each kind of text."""
    rows = {row: {whose: said(i.low, i.high) for whose, i in of.items()} for row, of in differences(name).items()
            if len(of) == 1 + len(VOICE_NAMES)}
    return pd.DataFrame.from_dict(rows, orient="index")


def side_by_side(name: str) -> pd.DataFrame:
    """Every variant of a sweep beside the first of its panel, on both models: KL less its KL, in % of it."""
    rows = {row: {whose: f"{of[whose].estimate:+.0f} [{of[whose].low:+.0f}, {of[whose].high:+.0f}]" if whose in of
                  else "not measured" for whose in ("bundled", *VOICE_NAMES)} for row, of in differences(name).items() if of}
    return pd.DataFrame.from_dict(rows, orient="index").rename(columns=VOICE_NAMES)


def pairs() -> pd.DataFrame:
    """Verdicts that no panel has: GPTQ beside rounding at each width, and AWQ beside GPTQ."""
    asked = {("GPTQ beside rounding", f"{bits} bits"): ("gptq", f"bits: GPTQ, {bits}", f"bits: rounding, {bits}")
             for bits in (2, 3, 4, 8)} | {
        ("AWQ beside GPTQ", "3 bits"): ("awq", "model: AWQ, scales and clipping", "model: GPTQ")}
    told = {row: {whose: said(*share((of := rows(name, whose))[one], of[other])[1:]) for whose in ("bundled", *VOICE_NAMES)}
            for row, (name, one, other) in asked.items()}
    return pd.DataFrame.from_dict(told, orient="index")


METHOD, SETTING, CALIBRATED, MAKER = "one method or another", "a setting", "calibration", "one maker or another"
HALVES = "beside rounding, 3 bits"
KNOBS = {"GPTQ beside rounding": METHOD, "AWQ beside GPTQ": METHOD, HALVES: METHOD, "grid at blocks of 64": METHOD,
         "output head": SETTING, "GPTQ, by whom": MAKER, "AWQ, by whom": MAKER, "as AutoRound": MAKER}


def kind(knob: str, value: str) -> str:
    """What kind of question a row of a panel answers."""
    if knob in KNOBS or knob.startswith("calibration"):
        return KNOBS.get(knob, CALIBRATED)
    return METHOD if value.startswith(("rounding", "AWQ", "NF4")) else SETTING


def both_models() -> pd.DataFrame:
    """Every question that the sweeps put to both models, with its kind and the verdict on each kind of text."""
    again = ["desc_act", "searched scales", "rounding"]  # which the recipes have as well
    halves = verdicts("awq").drop(index=["GPTQ", "AWQ's scales, then GPTQ"], level=1).rename(index={"model": HALVES}, level=0)
    table = pd.concat([pairs(), verdicts("recipes"), verdicts("gptq").drop(index="bits", level=0),
                       verdicts("remedies").drop(index=again, level=1), halves, verdicts("nf4"), verdicts("makers")])
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
    """For each kind of text: the recipe with the least KL on the tuning set, and of the judging set its KL, that of GPTQ with
    auto-gptq's settings less its own, and the recipes that are measurably nearer to full precision there."""
    told = {}
    for whose, of in panels("tuned").items():
        judged = {row.removeprefix(f"{panel}: "): arrays for row, arrays in rows("recipes", whose).items() if panel in row}
        tuned = {name: row["kl"][0] for name, row in of[panel].items() if name in judged}
        best = min(tuned, key=tuned.__getitem__)
        apart = {name: paired(judged[name], judged[best], "answer_kl") for name in {*tuned, usual}}
        told[whose] = {"tried": len(tuned), "chosen": best, "KL, tuning": f"{tuned[best]:.4f}",
                       "KL, judging": f"{judged[best]['answer_kl'].mean(0).sum() / judged[best]['tokens'].sum():.4f}",
                       "auto-gptq's settings less its own": str(apart[usual]),
                       "nearer": ", ".join(sorted(n for n, i in apart.items() if i.high < 0)) or "none"}
    return pd.DataFrame(told).T
