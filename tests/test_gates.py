import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import yaml

from helpers.harness.gates import (
    FAIL,
    PASS,
    SCHEMA,
    UNDECIDED,
    BadGates,
    Gate,
    check_names,
    parse_gates,
    read_gates,
)
from helpers.harness.load import Load
from helpers.harness.measured import NotMeasured
from helpers.harness.portability import Loads
from helpers.measure.bytes import fits
from helpers.measure.stats import Interval, quantile_interval, recovery_interval, share_interval
from helpers.models.source import DATA
from tests.handmade import CONFIG, measured, scores

EVERY = {
    "recovery: 0.98": ["recovery > 0.98"], "recovery: {overall: 0.9, json: 1}": ["recovery.overall > 0.9", "recovery.json > 1"],
    "exact: 0": ["exact > -1e-09"], "exact: {4: 0.5, yes: 0.5}": ["exact.4 > 0.5", "exact.True > 0.5"],
    "agreement: 0.5": ["agreement > 0.5"], "kl: '< 0.05'": ["kl < 0.05"],
    "kl: ['< 1e-2', ' >0 ']": ["kl < 0.01", "kl > 0"], "kl: {json: '< 1', tales: ['< 2', '>1']}": [
        "kl.json < 1", "kl.tales < 2", "kl.tales > 1"],
    "delta_nll: '< -0.5'": ["delta_nll < -0.5"], "perplexity: {essay: '< 20'}": ["perplexity.essay < 20"],
    "form: {json_parses: 0.5, schema: 0.5, ends: 0.5, no_loops: 0.5}": [
        f"form.{k} > 0.5" for k in ("json_parses", "schema", "ends", "no_loops")],
    "ttft_ms: p(95) < 450": ["ttft_ms p(95) < 450"], "itl_ms: [p(50) < 1, ' p(99)<2.5e1']": [
        "itl_ms p(50) < 1", "itl_ms p(99) < 25"],
    "e2el_ms: p(90) > 3": ["e2el_ms p(90) > 3"],
    "served: {rate: 0.5, ttft_ms: p(95) < 450, errors: '< 0.01', tokens_per_second: '> 10'}": [
        "served at 0.5/s, ttft_ms p(95) < 450", "served errors < 0.01", "served tokens/s > 10"],
    "memory_share: '< 0.5'": ["memory_share < 0.5"],
    "memory_bytes: '< 5e6'": ["memory_bytes < 5e+06"], "peak_bytes: '< 5e6'": ["peak_bytes < 5e+06"],
    "fits: {gpu_gb: 24, context: 8192}": ["fits 24 GB at 1 x 8192 tokens: share of it < 1"],
    "portability: 2": ["portability > 1.5"]}


@pytest.mark.parametrize("asked, gates", EVERY.items())
def test_every_field(asked, gates, tmp_path):
    path = tmp_path / "gates.yml"
    path.write_text(asked)
    assert [str(g) for g in read_gates(path)] == gates
    rates = {g.rate for g in read_gates(path)}
    assert rates == ({0.5} if asked.startswith("served") else {None})


def test_no_field_is_forgotten():
    assert {next(iter(yaml.safe_load(asked))) for asked in EVERY} == set(SCHEMA["properties"])


@pytest.mark.parametrize("asked, said", [
    ("latency: 3", "the file: 'latency' is unknown: expected some of recovery, exact,"),
    ("form: {ends: 0.5, 'loops(4)': 0.5}", "form: 'loops(4)' is unknown: expected some of json_parses, schema, ends, no_loops"),
    ("recovery: high", "recovery: 'high': expected a share from 0 to 1"), ("exact: true", "exact: True: expected a share"),
    ("recovery: 1.2", "recovery: 1.2: expected a share from 0 to 1"), ("agreement: -1", "agreement: -1: expected a share"),
    ("recovery: {json: 1.2}", "recovery.json: 1.2: expected a share from 0 to 1"), ("form: {}", "form: {}: expected shares"),
    ("recovery: {}", "recovery: {}: expected a share"), ("kl: []", "kl: []: expected at least one limit"),
    ("kl: 0.05", 'kl: 0.05: expected a limit such as "< 0.05", in quotes'), ("kl: '0.05'", "kl: '0.05': expected a limit"),
    ("kl: {a: ['< 1', 3]}", "kl.a.1: 3: expected a limit"), ("perplexity: '<= 3'", "perplexity: '<= 3': expected a limit"),
    ("ttft_ms: p(97) < 4", "ttft_ms: 'p(97) < 4': expected a percentile with a limit such as \"p(95) < 450\": p(50), p(90),"),
    ("itl_ms: '< 4'", "itl_ms: '< 4': expected a percentile"),
    ("served: {rate: 2}", "served: {'rate': 2}: expected limits with a rate"),
    ("served: {errors: '< 0.1'}", "served: expected rate too"), ("fits: {gpu_gb: 8}", "fits: expected context too"),
    ("served: {rate: 0, errors: '< 0.1'}", "served.rate: 0: expected a number of requests a second, above 0"),
    ("fits: {gpu_gb: 8, context: 1.5}", "fits.context: 1.5: expected a whole number of tokens"),
    ("portability: 0", "portability: 0: expected a whole number of engines, from 1"),
    ("kl: 2020-01-01", "kl: datetime.date(2020, 1, 1): expected a limit"), ("", "the file: None: expected limits by field"),
    ("[1]", "the file: [1]: expected limits by field"), ("{}", "the file: {}: expected limits by field"),
    ("kl: ['< 1', '> 2']", "kl: kl < 1 and kl > 2 contradict each other"), ("kl: ['> 1', '< 1']", "contradict"),
    ("{kl: '< 1', recovery: 1, kl: '< 2'}", "'kl' is there twice"), ("recovery: {json: 1, json: 0}", "'json' is there twice"),
    ("{[a]: 1, [a]: 2}", "is there twice"), ("recovery: .nan", "nan: expected a finite number"),
    ("fits: {gpu_gb: .inf, context: 1}", "inf: expected a finite number"), ("kl: [", "cannot be read"),
    ("kl: !!python/name:os.system x", "cannot be read"), (b"kl: '\xe9'", "cannot be read"), (None, "cannot be read")])
def test_what_is_wrong_with_gates(asked, said, tmp_path):
    """The file, the field and what was expected, in one line; of no file, too."""
    path = tmp_path / "gates.yml"
    if asked is not None:
        path.write_bytes(asked if isinstance(asked, bytes) else asked.encode())
    with pytest.raises(BadGates) as error:
        read_gates(path)
    assert str(error.value).startswith(str(path)) and said in str(error.value) and "\n" not in str(error.value)


def test_limits_on_what_is_not_asked():
    tasks, texts = {"json", "facts"}, {"tales"}
    check_names(parse_gates({"recovery": {"json": 1, "overall": 1}, "exact": 1, "kl": {"json": "< 1", "tales": "< 1"},
                             "perplexity": {"tales": "< 9"}, "ttft_ms": "p(95) < 1", "fits": {"gpu_gb": 1.5, "context": 1},
                             "served": {"rate": 0.5, "errors": "< 1"}}), tasks, texts)
    for asked, said in (({"recovery": {"jsno": 1}}, "recovery.jsno: nothing of that name is asked: expected overall or one of "
                         "facts, json"), ({"exact": {"tales": 1}}, "exact.tales"), ({"kl": {"x.y": "< 1"}}, "kl.x.y"),
                        ({"perplexity": {"json": "< 1"}}, "expected overall or one of tales")):
        with pytest.raises(BadGates, match=said):
            check_names(parse_gates(asked), tasks, texts)


def test_the_schema_is_one_and_the_books_gates_hold_it():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    files = sorted((DATA / "gates").glob("*.yml"))
    for path in files:
        jsonschema.validate(yaml.safe_load(path.read_text()), SCHEMA, jsonschema.Draft202012Validator)
        assert read_gates(path) and path.read_text().startswith("# yaml-language-server: $schema=")
        named = path.read_text().splitlines()[0].split("=")[1]
        assert json.loads((path.parent / Path(named)).read_text()) == SCHEMA
    assert files


INF = np.inf


@pytest.mark.parametrize("below, interval, outcome, needed", [
    (True, (0.5, 0.4, 0.9), PASS, ""), (True, (1.5, 1.1, 1.9), FAIL, ""), (False, (1.5, 1.1, 1.9), PASS, ""),
    (False, (0.5, 0.4, 0.9), FAIL, ""),
    # at the limit exactly: below is below, so that what just reaches it fails
    (True, (1, 1, 1), FAIL, ""), (False, (1, 1, 1), FAIL, ""), (True, (1.1, 1, 1.2), FAIL, ""),
    (False, (0.9, 0.8, 1), FAIL, ""),
    (True, (0.9, 0.8, 1), UNDECIDED, "1 times"), (False, (1.1, 1, 1.2), UNDECIDED, "1 times"),
    (True, (1, 0.5, 2), UNDECIDED, "at its limit"), (False, (1 + 1e-9, 0.5, 2), UNDECIDED, "at its limit"),
    # the bound between the estimate and the limit decides: (reach / gap)^2, on either side, for either sign
    (True, (0.9, 0.8, 1.3), UNDECIDED, "16 times"), (True, (1.2, 0.8, 1.3), UNDECIDED, "4 times"),
    (False, (0.9, 0.8, 1.3), UNDECIDED, "16 times"), (False, (1.2, 0.8, 1.3), UNDECIDED, "4 times"),
    (True, (0.5, 0.1, INF), UNDECIDED, "too few values"), (True, (1.5, 1.2, INF), FAIL, ""), (True, (0.5, -INF, 0.9), PASS, ""),
    (False, (1.5, 1.2, INF), PASS, ""), (False, (1.5, -INF, INF), UNDECIDED, "too few values")])
def test_three_outcomes(below, interval, outcome, needed):
    found = Gate("x", lambda *_: Interval(*interval), below, 1.0).check(None, None)
    assert (found.outcome, found.interval) == (outcome, interval) and found.gate == f"x {'<' if below else '>'} 1"
    assert needed in found.reason and (":" in found.reason) is (outcome == UNDECIDED)


def test_what_was_not_measured_is_undecided():
    def missing(*_):
        raise NotMeasured("no time")

    assert tuple(Gate("x", missing, True, 1).check(None, None)) == ("x < 1", UNDECIDED, None, "no time")


@pytest.mark.parametrize("limit", ["< 0.24", "> 0.24", "< 0.185", "> 0.185"])
def test_so_many_times_the_sample_decide(limit):
    """The promise kept: a quarter more than is said decides, a quarter less does not."""
    kl = np.random.default_rng(0).exponential(0.2, 60)
    full, (gate,) = measured(), parse_gates({"kl": limit})

    def check(times):
        n = round(60 * times)
        return gate.check(measured(questions=scores(nll=np.ones(n), kl=np.resize(kl, n))), full)

    few = check(1)
    times = float(few.reason.split(": ")[1].split(" times")[0])
    assert few.outcome == UNDECIDED and times > 1.4
    mean = kl.mean() < float(limit[2:])
    assert check(np.ceil(times * 1.4)).outcome == (PASS if mean == (limit[0] == "<") else FAIL)
    assert check(max(1, np.floor(times * 0.7))).outcome == UNDECIDED


def only(asked, variant, full=None):
    (gate,) = parse_gates(asked)
    return gate.check(variant, full or measured())


def test_what_gates_measure_by_hand():
    """Two tasks of 20 questions each, and a text of three windows."""
    tasks, before = ["a"] * 20 + ["b"] * 20, np.array([True] * 30 + [False] * 10)
    after = before.copy()
    after[:4] = False
    tokens = np.array([1, 3] * 20)
    q = scores(nll=tokens * 0.5, kl=[0.1] * 20 + [0.4] * 20, exact=after, tokens=tokens, tasks=tasks, agree=tokens * 1.0)
    full = measured(questions=scores(nll=tokens * 0.25, exact=before, tokens=tokens, tasks=tasks),
                    texts=scores(nll=[10] * 21, tokens=[9] * 21, tasks=["tales"] * 21))
    v = measured(questions=q, texts=scores(nll=[10] * 10 + [20] * 10 + [30], tokens=[9] * 20 + [19],
                                           tasks=["tales"] * 20 + ["more"]))
    assert only({"recovery": 0.9}, v, full).interval == recovery_interval(after, before, 0.9)
    assert only({"recovery": {"a": 0.9}}, v, full).interval.estimate == pytest.approx(16 / 20)
    assert only({"recovery": {"b": 0.9}}, v, full).interval.estimate == 1
    assert only({"exact": {"a": 0.9}}, v, full).interval == share_interval(16, 20, 0.9)
    assert only({"agreement": 0.9}, v, full).interval == (1, 1, 1)
    assert only({"kl": "< 1"}, v, full).interval.estimate == pytest.approx((20 * 0.1 + 20 * 0.4) / 80)
    assert only({"kl": {"b": "< 1"}}, v, full).interval.estimate == pytest.approx(20 * 0.4 / 40)
    assert tuple(only({"delta_nll": "< 1"}, v, full).interval) == pytest.approx((0.25, 0.25, 0.25))
    # of a text all tokens count, of an answer its own
    assert only({"perplexity": "< 9"}, v).interval.estimate == pytest.approx(np.exp((10 * 20 + 10 * 30 + 40) / 220))
    assert only({"perplexity": {"tales": "< 9"}}, v).interval.estimate == pytest.approx(np.exp((20 + 30) / 20))
    few = measured(questions=scores(nll=[1.0] * 19, kl=[0.1] * 19, exact=[True] * 19, tokens=[1.0] * 19, tasks=["a"] * 19))
    assert only({"kl": "< 1"}, few, full).outcome == UNDECIDED and "fewer than 20" in only({"kl": "< 1"}, few, full).reason
    assert only({"kl": {"more": "< 1"}}, v, full).reason.startswith("a single text")


def test_what_gates_measure_beside_answers():
    times = np.arange(60.0)
    form = {"id": np.arange(4), "structured": np.array([1, 1, 0, 0], bool), "json_parses": np.array([1, 0, 1, 1], bool),
            "ends": np.array([1, 1, 1, 0], bool)}
    load = Load(2.0, times + 1, times + 2, times + 3, {"refused": 2, "short": 1}, 9.0, None)
    doubted = Load(3.0, times, times, times, {}, 9.0, "clumps")
    nothing = Load(4.0, times[:0], times[:0], times[:0], {"refused": 5}, 0.0, None)
    v = measured(size=500, form=form, timed={"ttft_ms": times, "itl_ms": np.stack([times, times + 2], 1)},
                 served={2.0: load, 3.0: doubted, 4.0: nothing}, peaks={"peak_prefill": 7.0, "peak_decode": 9.0},
                 loads={"x": Loads(True, 5, 5, "", 1, ""), "y": Loads(True, 4, 5, "", 1, ""),
                        "z": Loads(False, 0, 5, "", 1, "not installed: z")}, failed={"memory": "?"})
    assert only({"form": {"json_parses": 0.5}}, v).interval == share_interval(1, 2, 0.9)  # of those that are to be JSON
    assert only({"form": {"ends": 0.5}}, v).interval == share_interval(3, 4, 0.9)
    assert only({"ttft_ms": "p(95) < 60"}, v).interval == quantile_interval(times, 0.95, 0.9)
    assert only({"itl_ms": "p(50) < 60"}, v).interval.estimate == 30.5
    assert only({"served": {"rate": 2, "e2el_ms": "p(50) < 9"}}, v).interval.estimate == 32.5
    assert only({"served": {"rate": 2, "errors": "< 0.1"}}, v).interval == share_interval(3, 63, 0.9)
    assert only({"served": {"rate": 4, "errors": "< 0.1"}}, v).outcome == FAIL
    assert only({"memory_bytes": "< 501"}, v).outcome == PASS and only({"memory_bytes": "< 500"}, v).outcome == FAIL
    assert only({"peak_bytes": "< 9.5"}, v).interval == (9, 9, 9)
    fit = fits(CONFIG, 500, 0.001, 64, 2).share
    assert only({"fits": {"gpu_gb": 0.001, "context": 64, "batch": 2}}, v).interval == (fit, fit, fit)
    # one engine works, one answers wrong, one was not tried: two may work, three cannot
    assert only({"portability": 1}, v).outcome == PASS and only({"portability": 3}, v).outcome == FAIL
    assert only({"portability": 2}, v).outcome == UNDECIDED
    assert only({"portability": 2}, v).reason.endswith("not tried")
    for asked, why in (({"rate": 3, "ttft_ms": "p(50) < 9"}, "clumps"), ({"rate": 4, "ttft_ms": "p(50) < 9"}, "no request"),
                       ({"rate": 5, "errors": "< 0.1"}, "nothing was served at 5")):
        assert why in only({"served": asked}, v).reason
    assert only({"served": {"rate": 3, "e2el_ms": "p(50) < 30"}}, v).interval.estimate == 29.5  # which is not in doubt


@pytest.mark.parametrize("asked, why", [
    ({"recovery": 1}, "no questions were asked"), ({"kl": {"x": "< 1"}}, "nothing of the name 'x'"),
    ({"perplexity": "< 1"}, "no texts"), ({"form": {"ends": 1}}, "no answers"), ({"ttft_ms": "p(95) < 1"}, "out of memory"),
    ({"peak_bytes": "< 1"}, "out of memory"), ({"portability": 1}, "out of memory"),
    ({"memory_bytes": "< 1"}, "no file format"),
    ({"fits": {"gpu_gb": 1, "context": 1}}, "no file format")])
def test_reasons_why_something_was_not_measured(asked, why):
    found = only(asked, measured(size=None, failed={"memory": "out of memory"}))
    assert (found.outcome, found.interval) == (UNDECIDED, None) and why in found.reason
    assert only({"kl": {"json": "< 1"}}, measured(failed={"questions": "no weights"})).reason == "no weights"
    for of, said in (({"ttft_ms": "p(95) < 1"}, "latency was not measured"), ({"portability": 1}, "no engine was tried")):
        assert only(of, measured()).reason == said


def test_questions_that_say_nothing():
    asked = measured(questions=scores(exact=[False, False]))
    assert "none of 2 answers right" in only({"recovery": 1}, asked, asked).reason
    assert "nothing of the name 'x'" in only({"recovery": {"x": 1}}, asked, asked).reason
    assert "nothing of the name 'x'" in only({"exact": {"x": 1}}, asked, asked).reason
    plain = measured(form={"id": np.arange(2), "structured": np.zeros(2, bool), "schema": np.ones(2, bool)})
    assert "no question asks for JSON" in only({"form": {"schema": 1}}, plain).reason
