"""What chapter 7 says of the bundled model is what its records hold."""

import numpy as np
import pytest

from helpers.harness.sensitivity import stored, table, where
from helpers.measure.stats import paired, rank_correlation, ratio_interval
from helpers.methods.gptq import PLAIN, Gptq
from helpers.methods.rtn import Rtn
from helpers.results import read
from helpers.store import values


@pytest.fixture(scope="module")
def frame():
    full, cells = stored()
    found = table(cells, full)
    return found.assign(kl=[1000 * k.estimate for k in found.kl])


@pytest.fixture(scope="module")
def record():
    return read("sensitivity").data


@pytest.fixture(scope="module")
def plans():
    return values("plans"), read("plans").data["plans"]


def kl(arrays):
    return ratio_interval(arrays["answer_kl"], arrays["tokens"])


def test_the_map(frame):
    inside = frame[frame.block.notna()]
    assert len(inside) == 28 * 10 and set(frame[frame.block.isna()].layer) == {"embedding", "output head"}
    both = Rtn(3), Gptq(3, **PLAIN)
    rounding, gptq = (inside[inside.setting == m].groupby("kind").kl.sum().sort_values() for m in both)
    assert list(rounding.index[-2:]) == ["v_proj", "o_proj"] and list(gptq.index[-3:]) == ["gate_proj", "down_proj", "o_proj"]
    assert set(gptq.index[:2]) == {"q_proj", "k_proj"} and rounding["o_proj"] > 4 * gptq["o_proj"]
    blocks, alike = (inside[inside.setting == m].groupby("block").kl.sum() for m in both)
    assert 6 < blocks[0] / blocks[3] < 7 and alike.max() / alike.min() < 1.5
    ends = {(r.layer, r.setting): r.kl for r in frame[frame.block.isna()].itertuples()}
    assert ends["output head", Rtn(3)] > 2 * ends["output head", Gptq(3, **PLAIN)]
    assert ends["embedding", Rtn(2)] > 2 * inside[inside.setting == Rtn(2)].groupby("kind").kl.sum().max()


def test_the_head_is_not_the_dearest(frame):
    """KL for each byte saved by rounding to 4 bits."""
    size = {"output head": 1280 * 256, "v_proj": 4 * 128 * 256, "o_proj": 4 * 256 * 256}
    kl_of = frame[frame.setting == Rtn(4)].groupby("kind").kl.sum()
    head, *dear = (kl_of[kind] / n for kind, n in size.items())
    assert dear[0] / head == pytest.approx(14, abs=0.5) and dear[1] / head == pytest.approx(5, abs=0.5)


def test_what_fails_first(plans):
    arrays, _ = plans
    before = arrays["16 bits"]

    def lost(kind, task):
        of = before["task"] == task
        return before["exact"][0][of].mean() - arrays[f"{kind} alone at 2 bits"]["exact"][0][of].mean()

    kinds = [n.split()[0] for n in arrays if n.endswith("alone at 2 bits")]
    assert len(kinds) == 7
    for task in ("json", "tool", "condense"):
        assert all(lost(kind, task) > 0.44 for kind in ("v_proj", "o_proj"))
        assert all(lost(kind, task) < 0.35 for kind in kinds if kind not in ("v_proj", "o_proj"))
    assert all(lost(kind, task) > 0 for kind in kinds for task in ("facts_tail", "arithmetic_steps"))
    assert all(lost(kind, task) == 0 for kind in kinds for task in ("recall_4", "recall_12"))
    answers = {kind: int((before["exact"][0] & ~arrays[f"{kind} alone at 2 bits"]["exact"][0]).sum()) for kind in kinds}
    mlp = [answers[f"{kind}_proj"] for kind in ("gate", "up", "down")]
    assert (min(mlp), max(mlp)) == (33, 44) and max(mlp) < min(answers["q_proj"], answers["k_proj"])


def test_upwards_and_downwards(record):
    for bits, (together, back) in {"2": (0.19, 2.18), "3": (0.68, 1.43)}.items():
        ups, setting = record["upwards"][bits], str(Gptq(int(bits), act_group_aware=False))
        low, layers = ups[""][0], list(record["options"])
        down, up = [record["options"][n][setting][0] for n in layers], [low - ups[n][0] for n in layers]
        assert sum(down) / low == pytest.approx(together, abs=0.01) and sum(up) / low == pytest.approx(back, abs=0.01)
        assert 0.4 < rank_correlation(down, up).estimate < 0.65
    first, last = ([1 - record["upwards"]["2"][f"block {b}"][0] / record["upwards"]["2"][""][0] for b in part]
                   for part in ((0, 1), (2, 3)))
    assert min(first) > 2 * max(last)
    by_block = [sum(of[str(Gptq(2, act_group_aware=False))][0] for n, of in record["options"].items() if where(n)[0] == b)
                for b in range(4)]
    assert round(sum(by_block[:2]) / sum(by_block), 2) == 0.62


def test_cheap_scores(record):
    setting, layers = str(Gptq(3, act_group_aware=False)), list(record["options"])
    dear = [record["options"][n][setting][0] for n in layers]
    ranks = {score: rank_correlation([of[n][setting] for n in layers], dear) for score, of in record["cheap"]["scores"].items()}
    assert max(ranks, key=lambda s: ranks[s].estimate) == "gradient x output error"
    assert ranks["gradient x output error"].estimate == pytest.approx(0.66, abs=0.01)
    assert [name for name, i in ranks.items() if i.low < 0] == ["weight error", "Fisher x error"]
    best = sorted(round(i.estimate, 2) for i in ranks.values())[-3:]
    assert (best[0], best[-1]) == (0.62, 0.66)


def test_no_power_is_the_one(record):
    apart = {}
    for p in (0.4, 0.7, 1.0):
        foreseen = [sum(max(record["options"][n][s][0], 0) ** p for n, s in r["methods"].items()) ** (1 / p)
                    for r in record["additivity"]]
        apart[p] = np.exp(np.std(np.log([r["kl"][0] for r in record["additivity"]]) - np.log(foreseen)))
    assert all(1.6 < spread < 1.8 for spread in apart.values())


def test_plans_against_uniform(record, plans):
    """25 % less than the best uniform setting within the bytes, measurably, from 3.25 bits to 4; nothing at 4 bits itself."""
    arrays, about = plans
    uniform = {n: kl(arrays[n]).estimate for n in about if n.startswith("gptq")}
    for bits in ("3.25", "3.5", "3.75", "4"):
        best = min((n for n in uniform if about[n]["bits"] <= float(bits)), key=uniform.get)
        assert kl(arrays[f"plan, {bits} bits"]).estimate < 0.75 * uniform[best]
        assert paired(arrays[f"plan, {bits} bits"], arrays[best], "answer_kl").high < 0
    assert not paired(arrays["plan, 4.25 bits"], arrays[str(Gptq(act_group_aware=False))], "answer_kl").excludes_zero()
    taken = {bits: told["taken"] == "plan" for bits, told in record["choices"].items()}
    assert taken == {"2.75": True, "3": True, "3.25": False, "3.5": True, "3.75": True, "4": True, "4.25": False, "4.5": False,
                     "5": True, "6": True}
    assert all((told["difference"][2] < 0) == (told["taken"] == "plan") for told in record["choices"].values())


def test_rules_and_peers(plans):
    arrays, about = plans
    others = [n for n in about if not n.startswith(("plan", "gptq", "climbed"))]
    apart = {n: paired(arrays[f"plan at the bytes of {n}"], arrays[n], "answer_kl") for n in others}
    assert not any(i.low > 0 for i in apart.values())  # none is measurably better than the plan
    rules = [n for n in others if not n.startswith(("auto-round", "nvidia"))]
    assert len(rules) == 8 and [n for n in rules if apart[n].high >= 0] == ["attention 4, MLP 3"]
    beaten = [n for n in others if n not in rules and apart[n].high < 0]
    assert len(others) == 20 and beaten == ["nvidia-modelopt, kl_div, 3.75", "nvidia-modelopt, kl_div, 4"]


def test_exchanges_find_nothing(plans):
    arrays, _ = plans
    climbed = next(n for n in arrays if n.startswith("climbed"))
    assert not paired(arrays[climbed], arrays[climbed.removeprefix("climbed from the ")], "answer_kl").excludes_zero()


def test_speed():
    """(L + 1) / 2L of the passes, a fifth of the quantizing, a third of the whole; on the machine of the record."""
    speed = read("map_speed").data
    share = {part: speed["ours_s"][part] / speed["naive_s"][part] for part in ("forward", "quantize", "whole")}
    assert share["forward"] <= (speed["blocks"] + 1) / (2 * speed["blocks"]) and share["quantize"] <= 1 / 5
    assert share["whole"] <= 1 / 3 and speed["largest_relative_difference_of_kl"] < 0.02
