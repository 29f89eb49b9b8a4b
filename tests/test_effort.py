"""The committed seconds of quantizing and of a first answer: of all sides, on both models. No toolkit runs here."""

import json

import pytest

from benchmarks import effort
from benchmarks.effort import ANSWER, PAIRS, PARTS, SIDES, TOOLKITS
from helpers.files import folder_hash
from helpers.models.source import BUNDLED
from helpers.results import BadRecord, read


@pytest.fixture(scope="module")
def record():
    try:
        return read("effort")
    except BadRecord:  # timings want a quiet machine
        pytest.skip("no record yet: python -m benchmarks.effort")


def run_of(side: str) -> dict[str, float]:
    """What a run of this side could have given: GPTQ takes 3 s, AWQ 2 s, and the Gram matrix a third of GPTQ."""
    seconds = 3.0 if side.endswith("gptq") else 2.0
    return {"seconds": seconds, "cold_seconds": 9.0, "first_token": 2 * seconds, "gram": 1.0, "factor": 0.5}


def test_the_record_says_how_it_was_made(record):
    assert record.model_sha256 == folder_hash(BUNDLED) and record.command.startswith("python -m benchmarks.effort")
    said = record.data["calibration"]
    assert said["tokens"] == said["windows"] * said["length"] > 0
    assert {"torch", "gptqmodel", "bitsandbytes"} <= record.versions.keys() and record.machine["threads"] > 0
    assert {"auto_gptq", "autoawq"} <= record.data["originals"].keys()


@pytest.mark.parametrize("model, parameters", [("bundled", 3.8e6), ("larger", 39e6)])
def test_every_side_was_run_on_both_models(model, parameters, record):
    found = record.data["models"][model]
    assert found["parameters"] == pytest.approx(parameters, rel=0.03) and found["repeats"] >= 1
    assert found["runs"].keys() == set(SIDES)
    for runs in found["runs"].values():
        assert all(len(seconds) == found["repeats"] for seconds in runs.values()) and min(runs["seconds"]) > 0
    for side in TOOLKITS:
        assert all(a < b for a, b in zip(*(found["runs"][side][k] for k in ("seconds", "with_imports")), strict=True))
    for side in ANSWER:
        runs = found["runs"][side]
        assert all(a < b for a, b in zip(runs["seconds"], runs["first_token"], strict=True))


@pytest.mark.parametrize("model", ["bundled", "larger"])
def test_parts_add_up_and_ratios_are_those_of_the_runs(model, record):
    found = record.data["models"][model]
    for method in ("nf4", "gptq", "awq"):
        runs = found["runs"][f"ours-{method}"]
        for n, seconds in enumerate(runs["seconds"]):
            assert sum(runs[part][n] for part in (*PARTS, "rest")) == pytest.approx(seconds) and runs["rest"][n] > 0
        assert (max(runs["gram"]) > 0) == (method != "nf4") and (max(runs["factor"]) > 0) == (method == "gptq")
    assert found["gptq_over_awq"].keys() == PAIRS.keys() and all(0 < r < 100 for r in found["gptq_over_awq"].values())
    assert all(0 < share < 1 for share in found["share_of_gptq"].values())


@pytest.mark.parametrize("method", ["nf4", "gptq", "awq"])
def test_ours_is_timed_by_parts_and_left_as_it_was(method, tmp_path):
    before = effort.resolve_name("helpers.models.method.Gram.add")
    found = effort.ours(BUNDLED, method, [tuple(range(5, 37))], tmp_path / method)
    assert (tmp_path / method / "model.safetensors").is_file()
    assert effort.resolve_name("helpers.models.method.Gram.add") is before
    assert sum(found[part] for part in (*PARTS, "rest")) == pytest.approx(found["seconds"]) and min(found.values()) >= 0
    used = {"nf4": set(), "gptq": {"gram", "factor", "solve", "error"}, "awq": {"gram", "scale search", "clip search"}}[method]
    assert {p for p in PARTS if found[p]} - {"layout", "pack", "write"} == used


def test_a_first_answer_comes_after_loading():
    found = effort.answer("16 bits", BUNDLED)
    assert 0 < found["seconds"] < found["first_token"] and 0 < found["cold_seconds"] < found["cold_first_token"]


def test_a_toolkit_is_asked_for_what_its_artefact_is(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(effort, "run", lambda *a: asked.append(a) or {"quantize_seconds": 1.5, "seconds": 4.0})
    for side in TOOLKITS:
        assert effort.measured(side, BUNDLED, [(5, 6)], tmp_path) == {"seconds": 1.5, "with_imports": 4.0}
    assert [(a[0], a[1].method, a[3]) for a in asked] == [
        ("autogptq", "gptq", True), ("gptqmodel", "gptq", False), ("autoawq", "awq", True), ("gptqmodel", "awq", False)]


def test_a_stopped_run_goes_on(tmp_path):
    made, at = [], tmp_path / "partial"

    def work(side, source, tokens, files):
        assert [len(t) for t in tokens] == [128, 128] and source == BUNDLED
        if len(made) == 9:
            made.append("stopped")
            raise KeyboardInterrupt
        made.append(side)
        return run_of(side)

    with pytest.raises(KeyboardInterrupt):
        effort.main((2, 0), 2, tmp_path, work, at)
    assert len(json.loads((at / "runs.json").read_text())) == 9 and not (tmp_path / "effort.json").exists()
    effort.main((2, 0), 2, tmp_path, work, at)
    assert [m for m in made if m != "stopped"] == [*SIDES] * 2 and not at.exists()
    data = read("effort", tmp_path).data
    found = data["models"]["bundled"]
    assert data["calibration"]["tokens"] == 256 and found["runs"]["ours-gptq"]["seconds"] == [3.0, 3.0]
    assert found["gptq_over_awq"] == dict.fromkeys(PAIRS, 1.5)
    assert found["share_of_gptq"] == pytest.approx({"gram": 1 / 3, "factor": 1 / 6})
