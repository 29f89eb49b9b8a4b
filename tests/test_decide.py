import numpy as np
import pytest

from helpers.harness.decide import Adjustment, decide, outcome, search
from helpers.harness.gates import FAIL, PASS, UNDECIDED, Finding, Gate
from helpers.harness.measured import NotMeasured
from helpers.harness.variants import bits
from helpers.measure.bytes import predicted_bytes, weights_inside
from helpers.measure.stats import Interval
from tests.handmade import CONFIG, Fake, measured, scores

OUTCOMES = {PASS: Interval(0.5, 0.4, 0.6), UNDECIDED: Interval(0.9, 0.5, 1.3), FAIL: Interval(2, 1.5, 2.5)}


def size(of_bits: float) -> int:
    """Bytes of a file of so many bits a weight."""
    return round(predicted_bytes(CONFIG) - weights_inside(CONFIG) * (16 - of_bits) / 8)


def judged(variants, **outcomes):
    """The verdict on {name: (bits or None, KL)}, where the gate "g" (and "h", ...) says what `outcomes` has, by name; pass."""
    m = {n: measured(n, b and size(b), questions=scores(nll=[1, 1], kl=[kl, kl])) for n, (b, kl) in variants.items()}

    def gate(field):
        return Gate(field, lambda v, _: OUTCOMES[outcomes[field].get(v.name, PASS)], True, 1.0)

    return decide([gate(f) for f in outcomes], m, next(iter(variants)))


PICKED = "picked: passes every gate, and is the smallest that does (within 2 %, the nearest to full precision)"
FOUR = {"full": (16, 0), "eight": (8.1, 0.01), "four": (4.2, 0.1), "three": (3.1, 0.5)}


def test_bits_of_what_is_only_its_size():
    assert bits(Fake("x", size(4.2))) == pytest.approx(4.2, abs=1e-3)


def test_the_smallest_that_passes_and_what_to_fall_back_on():
    v = judged(FOUR, g={"three": FAIL})
    assert (v.outcome, v.pick, v.fallback) == (PASS, "four", "eight")
    assert v.reasons == {"full": "passes; larger than four", "eight": "passes; larger than four",
                         "four": f"{PICKED}; smaller but not passing: three",
                         "three": "fails: g < 1 (measured 2 [1.5, 2.5])"}
    assert judged(FOUR, g={}).reasons["three"] == PICKED


def test_a_fallback_passes_too_and_is_of_more_bits():
    v = judged(FOUR, g={"three": FAIL, "eight": UNDECIDED})
    assert (v.pick, v.fallback) == ("four", "full")
    v = judged({"full": (16, 0), "larger": (4.9, 0), "four": (4.2, 0.1)}, g={"full": FAIL})
    assert (v.pick, v.fallback) == ("four", None)  # 4.9 bits are no higher precision
    assert judged(FOUR, g=dict.fromkeys(("eight", "four", "three"), FAIL)).fallback is None


@pytest.mark.parametrize("nearer, pick", [(1000, "nearer"), (1020, "nearer"), (1021, "smaller")])
def test_among_equally_small_ones_the_nearest_to_full_precision(nearer, pick):
    """Within 2 % of the smallest; a chain of such steps, to `far`, does not lead further."""
    asked = {"full": (9000, 0), "nearer": (nearer, 0.1), "smaller": (1000, 0.2), "far": (1022, 0)}
    v = decide([], {n: measured(n, b, questions=scores(kl=[kl, kl])) for n, (b, kl) in asked.items()}, "full")
    assert v.pick == pick
    if pick == "nearer":
        assert v.reasons["smaller"] == "passes; as small as nearer, but not nearer to full precision"
    else:
        assert v.reasons["nearer"] == v.reasons["far"] == "passes; larger than smaller"


def test_one_of_which_no_kl_is_known_is_not_the_nearest():
    m = {"full": measured("full", 9000), "a": measured("a", 1000), "b": measured("b", 1010, questions=scores(kl=[1, 1]))}
    assert decide([], m, "full").pick == "b"


def test_undecided_is_not_failed():
    every = dict.fromkeys(FOUR, FAIL)
    v = judged(FOUR, g=every)
    assert (v.outcome, v.pick, v.fallback) == (FAIL, None, None)
    v = judged(FOUR, g=every | {"four": UNDECIDED})
    assert (v.outcome, v.pick, v.fallback) == (UNDECIDED, None, None)
    assert v.reasons["four"] == "undecided: g < 1 (measured 0.9 [0.5, 1.3]: 16 times the sample would decide)"
    # one gate is enough to fail, whatever the others leave open; all that stop it are named
    v = judged(FOUR, g=every, h={"four": UNDECIDED, "three": FAIL})
    assert v.outcome == FAIL and v.reasons["four"] == "fails: g < 1 (measured 2 [1.5, 2.5])"
    assert v.reasons["three"].count("measured 2") == 2 and "; h < 1 (" in v.reasons["three"]
    assert judged(FOUR, g=dict.fromkeys(FOUR, UNDECIDED) | {"full": PASS}).outcome == PASS


def test_the_reason_of_what_was_not_measured():
    def missing(*_):
        raise NotMeasured("no server")

    v = decide([Gate("g", missing, True, 1)], {"full": measured("full")}, "full")
    assert v.outcome == UNDECIDED and v.reasons["full"] == "undecided: g < 1 (no server)"


def test_what_no_file_holds_is_never_smaller():
    """A simulation passes, but there is nothing to serve; it is taken only where nothing else passes."""
    variants = FOUR | {"simulated": (None, 0)}
    v = judged(variants, g={"three": FAIL})
    assert v.pick == "four" and v.reasons["simulated"] == "passes; larger than four"
    v = judged(variants, g=dict.fromkeys(FOUR, FAIL))
    assert v.pick == "simulated" and "smaller but not passing: full, eight, four, three" in v.reasons["simulated"]


@pytest.mark.parametrize("found, whole", [([], PASS), ([PASS, PASS], PASS), ([PASS, UNDECIDED], UNDECIDED),
                                          ([UNDECIDED, FAIL, PASS], FAIL)])
def test_outcome_of_all_gates(found, whole):
    assert outcome([Finding("g", o, None, "") for o in found]) == whole


def searched(first, adjustments, tuning, judging=PASS):
    """What `search` tries, given {variant: its findings on the tuning questions}; and how often it looks at each set."""
    looked = {"tune": [], "judge": []}

    def tune(v):
        looked["tune"].append(v.name)
        return [Finding(g, o, None, "") for g, o in tuning[v.name]]

    def judge(v):
        looked["judge"].append(v.name)
        return [Finding("kl < 1", judging, None, "")]

    found = search(Fake(first), (Adjustment(helps, change, Fake(name)) for helps, change, name in adjustments), tune, judge)
    return *found, looked


def test_search_tries_what_can_help_until_one_passes():
    trials, final, looked = searched("first", [
        (("ttft_ms",), "faster", "a"), (("recovery", "kl"), "finer", "b"), (("kl",), "no use now", "c"),
        (("ttft_ms", "itl_ms"), "kernel", "d"), (("ttft_ms",), "more", "e")],
        {"first": [("ttft_ms p(95) < 9", PASS), ("kl.json < 1", FAIL), ("exact > 1", UNDECIDED)],
         "b": [("ttft_ms p(95) < 9", UNDECIDED), ("kl.json < 1", PASS)], "d": [("ttft_ms p(95) < 9", PASS)]})
    assert looked == {"tune": ["first", "b", "d"], "judge": ["d"]} and final[0].outcome == PASS
    assert [(t.variant, t.because, t.outcome) for t in trials] == [
        ("first", "first", FAIL), ("b", "kl.json fail: finer", UNDECIDED), ("d", "ttft_ms undecided: kernel", PASS)]


def test_search_names_the_gate_that_an_adjustment_is_for():
    """Not whichever stopped first, nor the outcome of all gates together."""
    trials, _, _ = searched("x", [(("kl",), "finer", "y")], {"x": [("exact > 1", FAIL), ("kl < 1", UNDECIDED)], "y": []})
    assert trials[1].because == "kl undecided: finer"


def test_search_ends():
    failing = [("kl < 1", FAIL)]
    trials, final, looked = searched("x", [(("kl",), "1", "y"), (("exact",), "2", "z")], {"x": failing, "y": failing})
    assert final is None and looked == {"tune": ["x", "y"], "judge": []} and len(trials) == 2
    trials, final, looked = searched("x", [], {"x": failing})
    assert final is None and len(trials) == 1
    trials, final, looked = searched("x", [(("kl",), "1", "y")], {"x": [("kl < 1", PASS)]}, judging=FAIL)
    assert final[0].outcome == FAIL and looked == {"tune": ["x"], "judge": ["x"]}  # judged once, whatever comes of it


def test_nan_is_not_a_pass():
    nan = Gate("g", lambda *_: Interval(np.nan, np.nan, np.nan), True, 1.0).check(None, None)
    assert nan.outcome == UNDECIDED
