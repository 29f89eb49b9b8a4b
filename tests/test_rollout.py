"""A switch between two models: promoted, rolled back for each fault, nothing lost and nothing answered twice."""

import random
from dataclasses import replace

import pytest
import yaml

from helpers import rollout as command
from helpers.harness.gates import parse_gates
from helpers.harness.report import limits
from helpers.harness.rollout import (
    PROMOTED,
    ROLLED_BACK,
    UNDECIDED,
    BadManifest,
    Manifest,
    Step,
    execute,
    parsed,
    read_manifest,
)
from helpers.harness.serve import Answer
from helpers.measure.tasks import Example
from helpers.results import read

LOG = [Example("json", f"request {n}", '{"a": 1}') for n in range(400)]
PLAN = Manifest((Step(0.1, 100), Step(0.5, 100), Step(1.0, 100)), {"answered": 0.98, "json_parses": 0.95, "ends": 0.95})
SOUND = {"deploy": {"variant": "gptq"}, "canary": [{"share_of_traffic": 1.0, "requests_at_least": 10}],
         "roll_back_unless": {"ends": 0.9}}
GOOD, BROKEN, ENDLESS = '{"a": 1}', '{"a": ', "x " * 40


def decode(ids):
    return "".join(map(chr, ids))


def side(text=GOOD, ended=True, fails=lambda n: False, seen=None):
    """A model that says the same to everybody; `fails`, by the number of requests it has had."""
    had = []

    def ask(asked):
        found = []
        for e in asked:
            had.append(e.id)
            found.append(Answer([], False, "dead") if fails(len(had)) else Answer([*map(ord, text), *[0] * ended], ended, None))
        if seen is not None:
            seen.extend(e.id for e in asked)
        return found

    return ask


def test_a_sound_pick_is_promoted_step_by_step():
    switch = execute(PLAN, LOG, side(), side(), decode)
    assert switch.outcome == PROMOTED and not switch.lost
    shares = switch.table()["share"].tolist()
    assert shares == sorted(shares) and set(shares) == {0.1, 0.5, 1.0}
    by_pick = [n for n, (who, _) in switch.served.items() if who == "pick"]
    assert 0 < len([n for n in by_pick if n < 100]) < 30 and all(n in by_pick for n in range(200, 400))


@pytest.mark.parametrize("pick, broken", [
    (side(BROKEN), "json_parses"), (side(ended=False), "ends"), (side(fails=lambda n: n > 30), "answered"),
    (side(fails=lambda n: True), "answered")], ids=["broken JSON", "endless", "dies", "dead"])
def test_a_fault_rolls_back_and_nothing_is_lost(pick, broken):
    switch = execute(PLAN, LOG, side(), pick, decode)
    assert switch.outcome == ROLLED_BACK and switch.reason.startswith(broken)
    assert sorted(switch.served) == list(range(len(LOG))) and not switch.lost
    assert all(answer.error is None for _, answer in switch.served.values())
    rolled = next(n for n, row in enumerate(switch.history) if row["share"] == 0)
    assert all(row["by the pick"] == 0 and row["by the fallback"] == 20 for row in switch.history[rolled:])
    assert switch.served[len(LOG) - 1][0] == "fallback"


def test_a_request_that_fails_once_is_asked_again_and_that_alone():
    first, second = [], []
    switch = execute(PLAN, LOG, side(seen=first), side(fails=lambda n: n == 5, seen=second), decode)
    assert switch.outcome == PROMOTED and not switch.lost
    assert len(set(first) & set(second)) == 1 and len(first) + len(second) == len(LOG) + 1


def test_what_the_fallback_fails_on_too_is_named():
    switch = execute(PLAN, LOG[:20], side(fails=lambda n: n == 3), side(), decode)
    assert len(switch.lost) == 1 and switch.outcome == UNDECIDED


def test_the_same_log_goes_the_same_way():
    a, b = (execute(PLAN, LOG, side(), side(), decode) for _ in range(2))
    assert {n: who for n, (who, _) in a.served.items()} == {n: who for n, (who, _) in b.served.items()}


def test_false_alarms_are_rare():
    """A pick that is exactly as good as its limits ask (the worst case of a sound one), 150 times."""
    alarms = 0
    for seed in range(150):
        rng = random.Random(seed)
        log = [replace(e, id=f"{seed}-{n}") for n, e in enumerate(LOG)]

        def pick(asked, rng=rng):
            return [Answer([*map(ord, GOOD if rng.random() < 0.95 else BROKEN), 0], True, None) for _ in asked]

        alarms += execute(replace_keep({"json_parses": 0.95}), log, side(), pick, decode).outcome == ROLLED_BACK
    assert alarms / 150 <= 0.05


def replace_keep(keep):
    return Manifest(PLAN.steps, keep)


def step(**change):
    return {"canary": [{"share_of_traffic": 1.0, "requests_at_least": 10} | change]}


@pytest.mark.parametrize("change, told", [
    ({"deploy": None}, "deploy: None: expected a variant"), ({"canary": []}, "canary: .*at least one step"),
    (step(share_of_traffic=0.5), "shares that rise to 1"), (step(share_of_traffic=True), "canary.0.share_of_traffic"),
    (step(share_of_traffic="1"), "canary.0.share_of_traffic"), (step(requests_at_least=2.7), "canary.0.requests_at_least"),
    (step(requests_at_least=0), "canary.0.requests_at_least"), (step(share=1), "'share' is unknown"),
    ({"roll_back_unless": {"speed": 1}}, "'speed' is unknown"), ({"roll_back_unless": {}}, "roll_back_unless"),
    ({"roll_back_unless": {"ends": 1.1}}, "roll_back_unless.ends"),
    ({"roll_back_unless": {"ends": "0.9"}}, "roll_back_unless.ends: '0.9': expected a share"),
    ({"roll_back_unless": {"in_time": 0.9}}, "first_token_ms"), ({"first_token_ms": 0}, "milliseconds above 0"),
    ({"rollback": {}}, "'rollback' is unknown")])
def test_a_bad_manifest_names_the_field(change, told, tmp_path):
    assert parsed(SOUND).keep == {"ends": 0.9}
    path = tmp_path / "manifest.yml"
    path.write_text(yaml.safe_dump(SOUND | change))
    with pytest.raises(BadManifest, match=f"manifest.yml: .*{told}"):
        read_manifest(path)


def test_what_is_no_manifest_is_refused_by_the_command(tmp_path, capsys):
    path = tmp_path / "manifest.yml"
    path.write_text("deploy:\nbecause: 'verdict: fail'\n")  # of a comparison in which nothing passed
    for bad in (tmp_path / "none.yml", path):
        assert command.main([str(bad), "log", "http://127.0.0.1:1", "http://127.0.0.1:1"]) == 2
        assert bad.name in capsys.readouterr().err


def test_a_late_pick_is_rolled_back_and_a_limit_that_nothing_shows_decides_nothing():
    manifest = parsed(SOUND | {"roll_back_unless": {"in_time": 0.9}, "first_token_ms": 200})

    def pick(ms):
        return lambda asked: [replace(a, first_ms=ms) for a in side()(asked)]

    late, fast, unknown = (execute(manifest, LOG, side(), pick(ms), decode) for ms in (300.0, 100.0, None))
    assert (late.outcome, fast.outcome, unknown.outcome) == (ROLLED_BACK, PROMOTED, UNDECIDED)
    assert late.reason.startswith("in_time") and unknown.reason.startswith("in_time: no answer")


def test_the_manifest_of_a_comparison_can_be_executed():
    gates = parse_gates({"form": {"json_parses": 0.95}, "recovery": 0.9, "exact": 0.7, "served": {
        "rate": 1, "errors": "< 0.1", "ttft_ms": "p(95) < 1000"}})
    found = limits(gates, 0.8)
    assert found == {"roll_back_unless": {"json_parses": 0.95, "right": pytest.approx(0.72), "answered": 0.9,
                                          "in_time": 0.95}, "first_token_ms": 1000}
    assert limits(gates, None)["roll_back_unless"]["right"] == 0.7
    by_task = parse_gates({"recovery": {"overall": 0.9, "json": 0.8}, "exact": {"overall": 0.7}})
    assert limits(by_task, 0.8)["roll_back_unless"]["right"] == pytest.approx(0.72)
    assert limits(by_task, None)["roll_back_unless"]["right"] == 0.7
    assert parsed(SOUND | found).first_token_ms == 1000


def test_switches_of_the_record():
    """As chapter 10 shows them: a sound pick is promoted, a spoiled one and a dead one are rolled back, nothing is lost."""
    told = read("rollout").data
    found = told["switches"]
    assert [s["outcome"] for s in found.values()] == [PROMOTED, ROLLED_BACK, ROLLED_BACK]
    assert all(s["answered"] == told["requests"] and s["lost"] == 0 for s in found.values())
    assert all(s["history"][-1]["by the pick"] == (20 if s["outcome"] == PROMOTED else 0) for s in found.values())
    assert parsed(told["manifest"]).keep["json_parses"] == 0.93
