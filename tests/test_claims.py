"""What the chapters say about the bundled model's numbers, held against the records they plot."""

import pytest

from helpers.results import read


def sweeps(name):
    return read(f"sweep_{name}").data["sweeps"]


def change(row):
    """The paired KL difference from the panel's first row: -1 measurably better, 1 worse, 0 no difference detectable."""
    _, low, high = row["kl_against_first"]
    return (low > 0) - (high < 0)


def changes(panel):
    return [change(row) for row in list(panel.values())[1:]]


def kl(row):
    return row["kl"][0]


def test_nf4():
    s = sweeps("nf4")
    assert {b: change(s["block size"][b]) for b in ("32", "128", "256", "1024")} == {"32": 0, "128": 1, "256": 1, "1024": 1}
    assert changes(s["double quantization"]) == [0] and changes(s["grid at blocks of 64"]) == [0, 0]
    head, cost = s["output head"], kl(s["block size"]["64"])
    assert changes(head) == [1] and 0.15 < head["NF4"]["kl_against_first"][0] / cost < 0.3
    dtype = s["compute dtype"]
    assert all(abs(row["kl_against_first"][0]) < 0.0002 for row in dtype.values())
    assert dtype["bfloat16"]["nll_against_first"][0] == pytest.approx(0.0003, abs=0.00005)


def test_gptq_calibration():
    s = sweeps("gptq")
    count, text = s["calibration windows of 256"], s["calibration text"]
    assert {n: change(row) for n, row in count.items()} == {"109": 0, "64": 0, "32": 0, "16": 0, "8": 0, "4": 1, "2": 1, "1": 1}
    assert kl(count["1"]) == pytest.approx(kl(s["bits"]["rounding, 3"]), rel=0.05)
    assert changes(text) == [1, 1, 1, 1] and next(iter(text)) == "instructions"
    assert text["recipes"]["kl"][1] > text["random"]["kl"][2]
    assert max(text, key=lambda t: kl(text[t])) == "recipes"


def test_gptq_knobs():
    s = sweeps("gptq")
    assert changes(s["damping"]) == [0] * 5 and changes(s["order of columns"]) == [0]
    assert {g: change(s["group size"][g]) for g in ("64", "32")} == {"64": -1, "32": -1}
    for group in ("64", "32"):
        _, low, high = s["group size"][group]["nll_against_first"]
        assert low < 0 < high
    assert changes(s["scales"]) == [-1] and changes(s["scales of groups of 32"]) == [0]
    assert changes(s["calibrated on"]) == [-1]


@pytest.mark.parametrize("bits, share", [(4, 0.6), (3, 0.5)])
def test_share_of_roundings_loss_won_back(bits, share):
    """The project's target, by plain GPTQ; none of the extras can be told from it."""
    s = sweeps("gptq")[f"best quality, {bits} bits"]
    rounding = s["rounding"]
    assert rounding["delta_nll"][1] > 0 and change(rounding) == 1  # both told from zero
    assert 1 - s["GPTQ"]["delta_nll"][0] / rounding["delta_nll"][0] >= share
    assert [change(row) for name, row in s.items() if "," in name] == [0, 0]


def test_awq():
    s = sweeps("awq")
    plain, loud = s["model"], s["with outlier channels"]
    assert change(plain["AWQ, scales only"]) == 0 and change(loud["AWQ, scales only"]) == -1
    added = kl(loud["rounding"]) - kl(plain["rounding"])
    assert 0.6 < (kl(loud["rounding"]) - kl(loud["AWQ, scales only"])) / added < 0.8
    for model in (plain, loud):
        assert change(model["AWQ, clipping only"]) == change(model["rounding, 4 channels in 16 bits"]) == -1
        both, clipping = kl(model["AWQ, scales and clipping"]), kl(model["AWQ, clipping only"])
        assert both < clipping < kl(model["AWQ, scales only"]) and both < kl(model["rounding, 4 channels in 16 bits"])
        assert kl(model["GPTQ"]) < 0.56 * both
    mixed = "rounding, 4 channels in 16 bits"
    assert kl(loud[mixed]) / kl(loud["rounding"]) < kl(plain[mixed]) / kl(plain["rounding"])
    assert kl(loud["AWQ's scales, then GPTQ"]) < kl(loud["GPTQ"]) and kl(plain["AWQ's scales, then GPTQ"]) > kl(plain["GPTQ"])
    assert {t: change(row) for t, row in s["calibration text"].items()} == {
        "instructions": 0, "recipes": 0, "long": 0, "short": 0, "random": 1}
    assert {g: change(row) for g, row in s["group size"].items()} == {"128": 0, "64": -1, "32": -1, "-1": 1}
