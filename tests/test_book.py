"""The book holds together: pairs, table of contents, environments, outputs, and nothing of one machine in it."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import jupytext
import pytest
import yaml

from helpers.book import PROFILES, RevisionUnset, settings

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "chapters").glob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("source", CHAPTERS, ids=lambda p: p.stem)
def test_pairs_agree_cell_by_cell(source):
    script, notebook = jupytext.read(source), jupytext.read(source.with_suffix(".ipynb"))
    parts = [[(c.cell_type, c.source, c.metadata.get("tags", [])) for c in n.cells] for n in (script, notebook)]
    assert parts[0] == parts[1], "run `make refresh`"


@pytest.mark.parametrize("source", CHAPTERS, ids=lambda p: p.stem)
def test_notebooks_are_small_clean_and_executed(source):
    path = source.with_suffix(".ipynb")
    assert path.stat().st_size < 1_000_000
    notebook = json.loads(path.read_text())
    assert "papermill" not in notebook["metadata"]
    code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    assert all(c["execution_count"] for c in code)
    assert not [o for c in code for o in c["outputs"] if o["output_type"] == "error"]
    assert not [o for c in code for o in c["outputs"] if o.get("name") == "stderr"]
    assert sum("parameters" in c["metadata"].get("tags", []) for c in code) == 1


def test_every_chapter_is_in_the_table_of_contents():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    files = [c["file"] for part in toc["parts"] for c in part["chapters"]]
    assert [f for f in files if f.startswith("chapters/")] == [f"chapters/{p.stem}" for p in CHAPTERS]


def test_environments_are_one_set():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(d["pip"] for d in conda if isinstance(d, dict))
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().lower().split())
    assert f"torch=={pinned['torch']}" in pip and "-e .[book,test]" in pip and "-c constraints.txt" in pip
    assert f"python={PROJECT['requires-python'].removeprefix('>=')}" in conda
    wanted = PROJECT["dependencies"] + [d for extra in PROJECT["optional-dependencies"].values() for d in extra]
    for requirement in wanted:
        name, _, number = requirement.lower().partition("==")
        assert name in pinned, f"{name} is not in constraints.txt"
        assert number in ("", pinned[name])
    originals = yaml.safe_load((ROOT / "environment-originals.yml").read_text())["dependencies"]
    assert f"torch=={pinned['torch']}" in next(d["pip"] for d in originals if isinstance(d, dict))


def test_makefile_pins_the_same_torch():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert f"torch=={pinned['torch']} " in (ROOT / "Makefile").read_text()


def test_helpers_import_downwards():
    """Each room from those below it; nothing imports chapters, data or benchmarks."""
    floor = {"files": 0, "quantizers": 0, "results": 1, "store": 2, "models": 2, "methods": 3, "measure": 3, "toolkits": 4,
             "harness": 5, "plots": 5, "maps": 6, "quantize": 5, "page": 5, "book": 6, "colab": 6,
             "compare": 7, "sensitivity": 7, "replay": 7, "rollout": 7}
    for path in (ROOT / "helpers").rglob("*.py"):
        room = path.relative_to(ROOT / "helpers").parts[0].removesuffix(".py")
        for imported in re.findall(r"^\s*(?:from|import) (helpers\.(\w+)|chapters|data\b|benchmarks)", path.read_text(), re.M):
            assert imported[1] in floor, (path, imported)
            assert floor[imported[1]] <= floor[room], (path, imported)


def test_helpers_stay_small():
    sizes = {p: len(p.read_text().splitlines()) for p in (ROOT / "helpers").rglob("*.py")}
    assert max(sizes.values()) <= 250 and sum(sizes.values()) <= 11220


def test_nothing_of_one_machine_is_committed():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / f for f in listed.split("\0") if f]
    text = [f for f in files if f.is_file() and f.suffix in (".py", ".md", ".ipynb", ".json", ".yml", ".toml", ".txt", "")]
    # made up of parts, so that this file does not contain them
    found = [f.name for f in text if re.search("/" + "root/|/" + "work/|/" + "home/", f.read_text(errors="replace"))]
    assert not found


def test_setup_cells_are_one():
    """Colab readers have the notebook alone, so each carries the setup cell, with the one address of the book."""
    cells = [jupytext.read(p).cells[1] for p in CHAPTERS]
    assert all("setup" in c.metadata["tags"] for c in cells) and len({c.source for c in cells}) == 1


@pytest.mark.parametrize("profile, error", [("newest", RevisionUnset), ("nothing", KeyError)])
def test_profiles_are_checked(profile, error, monkeypatch):
    monkeypatch.setitem(PROFILES, "newest", PROFILES["gpu"] | {"revision": None})
    with pytest.raises(error):
        settings("", profile)
    assert settings("some/folder")["model"] == "some/folder"


@pytest.mark.parametrize("source", CHAPTERS, ids=lambda p: p.stem)
def test_numbered_formulas_have_one_line(source):
    """Sphinx wraps what has a line break in an environment in which MathJax refuses the number."""
    for formula in re.findall(r"\$\$(.*?)\$\$", source.read_text(), re.DOTALL):
        assert not ("\\tag" in formula and "\\\\" in formula), formula


def test_tables_that_cells_give_as_markdown_are_tables_on_the_site():
    """MyST-NB's own choice for outputs, CommonMark, has no tables: their rows would stand there as text."""
    given = [o["data"]["text/markdown"] for source in CHAPTERS for c in jupytext.read(source.with_suffix(".ipynb")).cells
             for o in c.get("outputs", []) if "text/markdown" in o.get("data", {})]
    assert any("| --- |" in "".join(g) for g in given)
    assert yaml.safe_load((ROOT / "_config.yml").read_text())["sphinx"]["config"]["nb_render_markdown_format"] == "myst"
