"""What the chapters say about the bundled model's numbers, held against the records they plot."""

import pytest

from helpers.results import read


def sweeps(name):
    return read(f"sweep_{name}").data["sweeps"]


def kl(row):
    return row["kl"][0]


def apart(better, worse):
    """The KL intervals do not overlap."""
    return better["kl"][2] < worse["kl"][1]


def alike(rows):
    """All KL intervals have a point in common."""
    return max(r["kl"][1] for r in rows) <= min(r["kl"][2] for r in rows)


def test_nf4():
    s = sweeps("nf4")
    assert alike(s["double quantization"].values()) and alike(s["compute dtype"].values())
    assert alike(s["grid at blocks of 64"].values()) and alike(s["output head"].values())
    assert alike([s["block size"][b] for b in ("64", "128", "256", "1024")])
    assert kl(s["block size"]["32"]) < min(kl(s["block size"][b]) for b in ("128", "256", "1024"))


def test_gptq_calibration():
    s = sweeps("gptq")
    count, text = s["calibration windows of 256"], s["calibration text"]
    assert alike([count["1"], s["bits"]["rounding, 3"]]) and alike([count[n] for n in ("16", "32", "64", "109")])
    assert apart(count["16"], count["2"])
    assert apart(text["instructions"], text["recipes"]) and apart(text["random"], text["recipes"])
    assert 2.5 < kl(text["recipes"]) / kl(text["instructions"]) < 3


def test_gptq_knobs():
    s = sweeps("gptq")
    assert alike(s["damping"].values()) and alike(s["order of columns"].values()) and alike(s["calibrated on"].values())
    assert alike([s["scales"][k] for k in ("fitted to the range", "searched")])
    assert alike([s["scales"][k] for k in ("stale inside a block, group 32", "fresh, group 32")])
    assert apart(s["group size"]["32"], s["group size"]["128"]) and kl(s["group size"]["64"]) < kl(s["group size"]["128"])
    for bits in (2, 3, 4):
        assert apart(s["bits"][f"GPTQ, {bits}"], s["bits"][f"rounding, {bits}"])


@pytest.mark.parametrize("bits, share", [(4, 0.6), (3, 0.5)])
def test_share_of_roundings_loss_won_back(bits, share):
    """The target of the project: by the best of the methods, of the increase in loss that rounding costs."""
    s = sweeps("gptq")[f"best quality, {bits} bits"]
    rounding = s["rounding"]["delta_nll"]
    assert rounding[1] > 0  # told from zero
    assert 1 - s["GPTQ, searched scales, desc_act"]["delta_nll"][0] / rounding[0] >= share


def test_awq():
    s = sweeps("awq")
    quiet, loud = s["model"], s["with outlier channels"]
    assert alike([quiet["rounding"], quiet["AWQ, scales only"]])
    assert apart(loud["AWQ, scales only"], loud["rounding"]) and alike([loud["AWQ, scales only"], quiet["rounding"]])
    for model in (quiet, loud):
        assert kl(model["AWQ, scales and clipping"]) < 0.6 * kl(model["AWQ, scales only"])
        assert apart(model["GPTQ"], model["AWQ, scales and clipping"])
        assert kl(model["AWQ, scales and clipping"]) < kl(model["rounding, 1 % of channels in 16 bits"])
    assert apart(loud["rounding, 1 % of channels in 16 bits"], loud["rounding"])
    assert kl(quiet["GPTQ"]) < kl(loud["GPTQ"]) and kl(loud["AWQ, then GPTQ"]) < kl(loud["GPTQ"])
    text = s["calibration text"]
    assert alike([text[t] for t in ("instructions", "recipes", "long", "short")])
    assert kl(text["random"]) > max(kl(text[t]) for t in ("instructions", "recipes", "long", "short"))
