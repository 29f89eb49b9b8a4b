"""What the inputs of linears look like, and what the remedies make of it."""

import copy
import math

import pytest
import torch

from benchmarks.methods import AfterFirst, GptqAfterFirst, GptqMedian
from helpers.measure.inputs import POSITIONS, SHARES, FirstApart, by_position, damping, look_at, shape_of
from helpers.methods.gptq import Gptq
from helpers.models.method import Gram
from helpers.models.outliers import add_outliers
from helpers.results import read

WINDOWS = [tuple(range(9, 73)), tuple(range(500, 564))]


def kept(kind, *batches):
    found = kind.of(batches[0].shape[-1])
    for X in batches:
        found.add(X)
    return found


def test_by_hand():
    """Two channels, two sequences of two tokens; the first tokens are (3, 0) and (1, 0), the others (1, 2) and (1, 0)."""
    X = torch.tensor([[[3.0, 0.0], [1.0, 2.0]], [[1.0, 0.0], [1.0, 0.0]]])
    found = kept(FirstApart, X[:1], X[1:])
    assert found.H.diagonal().tolist() == [12, 4] and found.of_first.tolist() == [10, 0] and found.tokens == 4
    told = shape_of(found)
    assert told["of_first"] == pytest.approx(10 / 16) and told["of_largest"] == pytest.approx(12 / 16)
    assert told["channels"][0] == pytest.approx(1.5) and told["channels"][-1] == pytest.approx(0.5)
    assert told["damping"] == pytest.approx(0.01 * 8 / 4)  # torch takes the lower of two in the middle
    assert told["damping_after_first"] == pytest.approx(0.01 * 3 / 2)
    eigenvalues = [(8 + s * math.sqrt(16 + 4)) / 8 for s in (1, -1)]  # of [[12, 2], [2, 4]], over their mean
    assert [told["spectrum"][0], told["spectrum"][-1]] == pytest.approx(eigenvalues, rel=1e-3)


def test_positions_are_set_against_the_middle_one():
    hidden = torch.ones(2, 5, 4)
    hidden[:, 0] = 10
    assert by_position([hidden]) == [10, 1, 1, 1] and POSITIONS[:4] == (0, 1, 2, 4)


def test_loud_channels_are_seen(tiny):
    quiet, loud = look_at(tiny, WINDOWS), look_at(add_outliers(copy.deepcopy(tiny)), WINDOWS)
    assert [r["block"] for r in quiet] == [0, 0, 0, 0, 1, 1, 1, 1] and all(len(r["channels"]) == len(SHARES) for r in quiet)
    for before, after in zip(quiet, loud, strict=True):
        if before["linear"].endswith(("q_proj", "gate_proj")):  # which read the norms
            assert after["damping"] > 5 * before["damping"] and after["of_largest"] > 2 * before["of_largest"]
        else:
            assert after["damping"] == pytest.approx(before["damping"], rel=1e-3)


def test_first_tokens_are_left_out_of_h():
    X = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(kept(AfterFirst, X).H, kept(Gram, X[:, 1:]).H) and kept(AfterFirst, X).tokens == 21
    assert GptqAfterFirst().keeps is AfterFirst and GptqAfterFirst().stacks


def test_damping_by_the_median_does_not_see_one_loud_channel():
    """What is added to H is the same with one channel a hundred times as loud; by the mean it is not."""
    draw = torch.Generator().manual_seed(0)
    X, W = torch.randn(1, 400, 64, generator=draw), torch.randn(8, 64, generator=draw)
    W[:, -1] = 0
    loud = X.clone()
    loud[..., -1] *= 100
    grams = [kept(Gram, x) for x in (X, loud)]

    def added(method):
        """To the diagonal of H, in each of the two."""
        return [float(method.solve(W, g)[1]["damp_percent"] * g.H.diagonal().mean()) for g in grams]

    quiet, noisy = added(GptqMedian(group_size=-1, damp_percent=0.1))
    assert quiet == pytest.approx(noisy, rel=0.05)
    quiet, noisy = added(Gptq(group_size=-1, damp_percent=0.1))
    assert noisy > 50 * quiet and damping(grams[1].H.diagonal()) > 50 * damping(grams[0].H.diagonal())


def test_the_record():
    """As chapter 12 tells it."""
    rows = read("inputs").data["rows"]
    worst = max(rows["real"], key=lambda r: r["damping"])
    assert (worst["block"], worst["linear"]) == (11, "mlp.down_proj") and worst["of_first"] > 0.99
    assert worst["damping"] > 5 and worst["damping_after_first"] < 0.02
    assert max(r["damping"] for r in rows["bundled"]) < 0.1
    first = {name: max(r["positions"][0] for r in of) for name, of in rows.items()}
    assert first["real"] > 150 and first["bundled"] < 1.1
