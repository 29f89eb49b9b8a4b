"""The committed choices of the peers: of this model, of what was allowed, within their budgets. No peer runs here."""

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import peers
from benchmarks.peers import BUDGETS, GROUPS, METHODS, bits_in_file
from helpers.models.layers import linears
from helpers.results import RESULTS, read
from helpers.toolkits.process import ROOT

RECORD = read("peers")
CHOICES = {(peer, method, budget): RECORD.data["choices"][f"{peer}, {method}"][f"{budget:g}"]
           for peer in METHODS for method in METHODS[peer] for budget in BUDGETS}


def test_nothing_else_is_in_the_record():
    assert sum(map(len, RECORD.data["choices"].values())) == len(CHOICES) == 12
    assert RECORD.command == "make peers" and RECORD.versions["torch"] and RECORD.machine["cpu"]
    pinned = dict(re.findall(r"^([\w-]+)==(.*)$", (ROOT / "peers.txt").read_text(), re.M))
    assert {name.lower(): v for name, v in RECORD.versions.items()}.items() >= pinned.items()
    assert f'"auto-round=={RECORD.versions["auto-round"]}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("peer, method, budget", CHOICES)
def test_a_choice_is_whole_and_within_its_budget(peer, method, budget, bundled):
    choice, sizes = CHOICES[peer, method, budget], {name: m.weight.numel() for name, m in linears(bundled.model)}
    assert choice["linears"].keys() == sizes.keys() and len(sizes) == 28
    assert all(GROUPS[peer].get(c["bits"]) == c["group_size"] for c in choice["linears"].values())
    bits = sum(sizes[n] * bits_in_file(**c) for n, c in choice["linears"].items()) / sum(sizes.values())
    assert bits == pytest.approx(choice["bits"]) and budget - 0.15 < bits <= budget and choice["satisfied"]
    assert choice["version"] == RECORD.versions[peer] and choice["seconds"] > 0 and str(budget) in choice["call"]


@pytest.mark.parametrize("peer, method", [(peer, method) for peer in METHODS for method in METHODS[peer]])
def test_scores_are_of_all_linears_and_fall_with_bits(peer, method, bundled):
    rows = RECORD.data["scores"][f"{peer}, {method}"]
    assert sorted(n for row in rows for n in row["linears"]) == sorted(n for n, _ in linears(bundled.model))
    for row in rows:
        scores = [row["scores"][b] for b in "2 3 4 8".split()]
        assert scores == sorted(scores, reverse=True) and scores[-1] > 0


def test_what_is_there_is_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "versions_in", lambda _: {"nvidia-modelopt": RECORD.versions["nvidia-modelopt"]})
    path, made = Path(shutil.copy(RESULTS / "peers.json", tmp_path)), []

    def make(*what):
        made.append(what)
        return {"scores": [], "bits": 0}

    peers.main(make, tmp_path)
    assert made == [] and path.read_bytes() == (RESULTS / "peers.json").read_bytes()
    record = json.loads(path.read_text())
    del record["data"]["choices"]["nvidia-modelopt, kl_div"]["3.5"]
    record["data"]["choices"]["auto-round, DeltaLoss"]["4"]["version"] = "0"
    path.write_text(json.dumps(record))
    peers.main(make, tmp_path)
    assert made == [("auto-round", "DeltaLoss", 4.0), ("nvidia-modelopt", "kl_div", 3.5)]
    assert len(read("peers", tmp_path).data["choices"]["nvidia-modelopt, kl_div"]) == 4
    path.write_text(json.dumps(record | {"model_sha256": "of other weights"}))
    peers.main(make, tmp_path)
    assert len(made) == 2 + 12
