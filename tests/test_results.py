import json
import os

import pytest

from helpers import results
from helpers.files import code_hash, folder_hash, write_atomically
from helpers.results import BadRecord, Record


def test_round_trip_with_provenance(tmp_path):
    record = Record("speed", {"ms": [1.5, 2.0]}, seed=3)
    path = results.save(record, tmp_path)
    assert results.read("speed", tmp_path) == record
    stored = json.loads(path.read_text())
    assert stored["versions"]["torch"] and stored["machine"]["cpu_capability"] and stored["command"]


def test_refuses_nan_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError):
        results.save(Record("bad", {"loss": float("nan")}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    results.save(Record("r", {"v": 1}), tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        results.save(Record("r", {"v": 2}), tmp_path)
    assert results.read("r", tmp_path).data == {"v": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_hash_is_of_names_and_weights(tmp_path):
    for name, content in (("a.safetensors", b"1"), ("config.json", b"2")):
        write_atomically(tmp_path / name, content)
    before = folder_hash(tmp_path)
    write_atomically(tmp_path / "config.json", "3")
    assert folder_hash(tmp_path) == before
    write_atomically(tmp_path / "a.safetensors", b"4")
    assert folder_hash(tmp_path) != before


def test_the_hash_of_code_is_of_what_it_does(tmp_path):
    code = tmp_path / "a.py"
    code.write_text("def f(x):\n    return x + 1\n")
    before = code_hash(tmp_path)
    code.write_text('"""About."""\n\ndef f(x):  # one more\n    """Adds."""\n    return (x + 1)\n')
    assert code_hash(tmp_path) == before
    code.write_text("def f(x):\n    return x + 2\n")
    assert code_hash(tmp_path) != before


def test_names_what_is_missing_or_broken(tmp_path):
    with pytest.raises(BadRecord, match="nothing.json is missing"):
        results.read("nothing", tmp_path)
    (tmp_path / "half.json").write_text('{"name": "ha')
    with pytest.raises(BadRecord, match="cut short"):
        results.read("half", tmp_path)


def test_read_all(tmp_path):
    assert results.read_all("gpu_", tmp_path) == []
    for name in ("gpu_b", "gpu_a", "other"):
        results.save(Record(name, {}), tmp_path)
    assert [r.name for r in results.read_all("gpu_", tmp_path)] == ["gpu_a", "gpu_b"]


def test_committed_records_are_of_the_committed_model():
    """Those of the small one, which is not committed, are all of the same; those of chapter 2 name theirs."""
    records = [r for r in results.read_all("") if not r.name.startswith("pipelines_")]
    small = [r for r in records if "small_" in r.name]
    assert len(records) >= 5 and len({r.model_sha256 for r in small}) == 1
    committed = folder_hash(results.RESULTS.parent / "model")
    assert {r.model_sha256 for r in records if r not in small} == {committed} != {r.model_sha256 for r in small}
