from helpers.measure.latency import beside, tokens_per_second


def test_beside_sets_sides_against_ours():
    side = {"least": 1.0, "median": 2.0, "most": 4.0, "runs": 3}
    table = beside({"work": {"ours": side, "theirs": {"least": 8.0, "median": 20.0, "most": 30.0, "runs": 3}, "note": 0.5}})
    assert list(table.index) == [("work", "theirs")]
    row = table.loc[("work", "theirs")]
    assert row["theirs / ours"] == "10" and row["range"] == "2 to 30" and row["ours (s)"] == "2"


def test_a_single_run_has_no_range():
    once = {"least": 1.0, "median": 1.0, "most": 1.0, "runs": 1}
    assert beside({"work": {"ours": once, "theirs": once}}).loc[("work", "theirs"), "range"] == "one run"


def test_generation_has_a_speed(tiny):
    median, fastest = tokens_per_second(tiny, new_tokens=4, repeats=2)
    assert 0 < median <= fastest
