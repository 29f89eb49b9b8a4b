"""Every number that the README and the chapters' summaries state is held by something; tests/numbers.yml says by what.

A number is digits, or one of WORDS. Digits do not count in names that begin with a letter (NF4, H100, SmolLM2-135M), in code,
links' targets and a list's own numbering; "one", "once" and "both", which are mostly no quantity, do not count either.
"""

import contextlib
import json
import re
from functools import reduce
from operator import getitem
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_families import CONFIGS

from helpers.harness import carry
from helpers.quantizers.nf4 import codebook
from helpers.results import RESULTS, read

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = yaml.safe_load((ROOT / "tests/numbers.yml").read_text())
ALL = [pytest.param(file, entry, id=f"{file}: {entry['says']}") for file, entries in ENTRIES.items() for entry in entries]
KINDS = {"record", "code", "file", "cell", "definition"}
WORDS = dict(zip("two three four five six seven eight nine ten eleven twelve".split(), range(2, 13), strict=True)) | {
    "sixteen": 16, "seventeen": 17, "twenty": 20, "half": 1 / 2, "halves": 1 / 2, "halved": 1 / 2, "twice": 2, "third": 1 / 3,
    "thirds": 1 / 3, "quarter": 1 / 4, "an hour": 1}
NUMBER = re.compile(rf"(?:(?<!\w)[−-])?\d+(?:[.,]\d+)*|\b(?:{'|'.join(WORDS)})\b", re.IGNORECASE)
NO_PROSE = re.compile(r"```.*?```|`[^`]*`|(?<=\])\([^)]*\)|https?://\S+|(?<!\S)\d+\. (?=\[)|\b[A-Za-z][\w.-]*\d[\w.-]*")
def lost_of(recipe):
    """Right answers of 300 that a recipe loses on the real model, with their interval."""
    change, low, high = carry.answers("recipes")[f"recipes, 4 bits: {recipe}"][1]
    return [-300 * change, -300 * high, -300 * low]


FACTS = {  # what `code` may name: a number, or as many as the phrase has
    "families that are tested": lambda: len({type(config) for config in CONFIGS.values()}),
    "threads of the real model's rows without a GPU": lambda: {key["machine"][2] for key in json.loads(str(np.load(
        RESULTS / "sweep_small_recipes.npz")["about"]))["key"]["keys"] if not key["machine"][3]},
    "right answers, fitted scales": lambda: [
        (lost := lost_of("GPTQ, symmetric"))[0], 184, *lost[1:]],  # 184: test_two_models.py
    "right answers, our default": lambda: lost_of("GPTQ, symmetric, group aware, searched scales"),
    "right answers, NF4": lambda: lost_of("NF4"),
    "right answers, AWQ's scales": lambda: lost_of("AWQ's scales, then GPTQ, group aware, searched scales"),
    "seconds of training": lambda: json.loads((RESULTS / "training_curve.jsonl").read_text().splitlines()[-1])["seconds"],
    "seconds of engines": lambda: sum(c["seconds"] for r in read("portability").data["matrix"].values() for c in r.values()),
    "bits of the datasheet": lambda: map(int, read("datasheet").data["bits"]), "values of NF4": lambda: len(codebook())}


def prose(file):
    text = (ROOT / file).read_text()
    if file.endswith(".py"):
        text = re.sub("(?m)^# ?", "", "".join(re.findall(r"(?sm)^# ## Summary\n(.*?)(?=^# ## |^# %%|\Z)", text)))
    return " ".join(text.split())


def numbers(text):
    return list(NUMBER.finditer(NO_PROSE.sub(lambda m: "·" * len(m[0]), text)))


def unheld(text, entries):
    held = {i for e in entries for m in re.finditer(re.escape(e["says"]), text) for i in range(*m.span())}
    return [f"{n[0]!r} in '{text[max(n.start() - 40, 0):n.end() + 40]}': give tests/numbers.yml an entry, '- says:' a phrase "
            f"that has it, and one of {sorted(KINDS)}" for n in numbers(text) if not held.issuperset(range(*n.span()))]


def values(entry):
    def at(path):
        return reduce(getitem, path, vars(read(entry["record"])))
    if "cell" in entry:
        cells = json.loads((ROOT / f"chapters/{entry['cell']}.ipynb").read_text())["cells"]
        outputs = [o for c in cells if "".join(c["source"]).startswith(entry["source"]) for o in c["outputs"]]
        lines = "\n".join("".join(o.get("text") or o["data"].get("text/plain", "")) for o in outputs).splitlines()
        found = [float(x) for line in lines if entry["row"] in line for x in re.findall(r"-?\d+(?:\.\d+)?", line)]
    else:
        found = FACTS[entry["code"]]() if "code" in entry else at(entry["path"])
    per = at(entry["per"]) if isinstance(entry.get("per"), list) else entry.get("per", 1)
    return [v / per * entry.get("times", 1) for v in ([found] if isinstance(found, int | float) else found)]


def check(text, entry):
    start, kind, count = text.find(entry["says"]), KINDS & entry.keys(), text.count(entry["says"])
    said = [n[0] for n in numbers(text) if start <= n.start() and n.end() <= start + len(entry["says"])]
    assert count == 1 and said, f"the text has {entry['says']!r} {count} times: expected once, with a number (found {said})"
    assert len(kind) == 1, f"expected one of {sorted(KINDS)} in {entry}"
    if "definition" in entry:
        assert len(str(entry["definition"]).split()) > 2, f"say why, in three words or more: {entry}"
    elif "file" in entry:
        there = NUMBER.findall(entry["has"]) if entry["has"] in (ROOT / entry["file"]).read_text() else None
        assert there == said, f"the text says {said}, {entry['file']} has {there} in {entry['has']!r}"
    else:
        found = values(entry)
        assert "cell" in entry or len(found) == len(said), f"{entry['says']!r} has {said}, but {entry} gives {found}"
        for i, number in enumerate(said):
            digits = entry.get("digits", len(number.partition(".")[2]) if number[-1].isdigit() else 2)
            given = [round(v, digits) for v in (found if "cell" in entry else found[i:i + 1])]  # a cell's line may have others
            meant = WORDS.get(number.lower()) or float(number.replace(",", "").replace("−", "-"))
            assert round(meant, digits) in given, f"{number!r} in {entry['says']!r}: {entry} gives {found}"


@pytest.mark.parametrize("file", ["README.md", *(f"chapters/{p.name}" for p in sorted((ROOT / "chapters").glob("*.py")))])
def test_every_number_is_held(file):
    assert prose(file) or file == "chapters/01_start_here.py", f"{file} has no '## Summary'"
    found = unheld(prose(file), ENTRIES.get(file, []))
    assert not found, f"{file}:\n" + "\n".join(found)


@pytest.mark.parametrize("file, entry", ALL)
def test_a_number_is_what_holds_it_and_another_is_caught(file, entry):
    check(text := prose(file), entry)
    other = NUMBER.sub(lambda m: f"{m[0][:-1]}{(int(m[0][-1]) + 1) % 10}" if m[0][-1].isdigit() else
                       "ten" if m[0].lower() == "two" else "two", entry["says"])
    changed = text.replace(entry["says"], other)
    assert unheld(changed, ENTRIES[file])
    with pytest.raises(AssertionError, match="expected once"):
        check(changed, entry)
    with contextlib.nullcontext() if "definition" in entry else pytest.raises(AssertionError, match="gives|the text says"):
        check(changed, entry | {"says": other})


def test_a_number_without_an_entry_is_caught():
    assert len(unheld(prose("README.md") + " It is 57 % of an H100's `99`, twice.", ENTRIES["README.md"])) == 2


@pytest.mark.parametrize("bad", [{}, {"definition": None}, {"code": "x"}, {"record": "datasheet", "path": ["x"]}], ids=str)
def test_an_entry_that_holds_nothing_is_caught(bad):
    with pytest.raises((AssertionError, KeyError)):
        check("3.8 million", {"says": "3.8 million"} | bad)
