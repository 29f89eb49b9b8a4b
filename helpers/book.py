"""The book's own machinery: the start of a chapter, committed outputs, the site, and runs on other models.

`python -m helpers.book refresh [NAME ...] | site NOTEBOOKS OUT | execute-other | execute-profile PROFILE NAME |
keep-records` (see the Makefile).
"""

import argparse
import json
import logging
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

from tqdm import tqdm

from helpers import results

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = ROOT / "chapters"
BUILD = ROOT / "_build"
RECORDS = BUILD / "records"  # what chapters measured with a profile; keep-records copies them to data/results
PROFILES = json.loads(Path(__file__).with_name("profiles.json").read_text())


class RevisionUnset(ValueError):
    """A profile that names a hub model without saying which revision."""


def settings(model: str, profile: str | None = None) -> dict:
    """What a chapter runs on: the named profile, or the default one with another model (its folder or name), which is asked
    fewer questions, since most are larger.

    Raises KeyError for an unknown profile, RevisionUnset if it would fetch whatever is newest on the hub.
    """
    chosen = PROFILES[profile or "bundled"]
    if not profile and model != "bundled":
        chosen = chosen | {"model": model, "limit": 10}
    if profile and chosen["revision"] is None and "/" in chosen["model"] and not Path(chosen["model"]).is_dir():
        raise RevisionUnset(f"profile {profile!r} names {chosen['model']} without a revision: look up the commit on its hub "
                            "page and set it in helpers/profiles.json, so that results can be repeated")
    return chosen


def quiet() -> None:
    """Keep the libraries from talking of themselves."""
    for name in ("torchao", "torch.utils._pytree", "transformers", "bitsandbytes", "gptqmodel", "optimum"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="IProgress not found")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def start(seed: int = 0) -> None:
    """Begin a chapter: fix the seeds, take on the book's plot style, quiet the libraries, print the versions."""
    quiet()
    import matplotlib.pyplot as plt
    import torch

    random.seed(seed)
    torch.manual_seed(seed)
    plt.style.use(Path(__file__).with_name("book.mplstyle"))
    print(", ".join(f"{name} {number}" for name, number in results.versions().items()))


def execute(notebook: Path, out: Path, /, **parameters) -> None:
    """Run a notebook with papermill, from the chapters' folder; `out` appears when it is finished."""
    import papermill

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.stem}.partial.ipynb")  # on failure it stays, with the traceback in it
    papermill.execute_notebook(notebook, partial, parameters, kernel_name="python3", cwd=CHAPTERS, progress_bar=False)
    partial.replace(out)


def fresh(source: Path, out: Path) -> None:
    """The notebook of a chapter's .py half, not executed."""
    import jupytext
    import nbformat

    notebook = jupytext.read(source)
    for n, cell in enumerate(notebook.cells):
        cell["id"] = f"{source.stem[:2]}-{n}"  # ids that do not change with every refresh
    out.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, out)


def refresh(names: list[str]) -> None:
    """Rewrite the committed notebooks (all, or these) from their .py halves, with the bundled model's outputs on this CPU."""
    import nbformat

    for source in tqdm([CHAPTERS / f"{n}.py" for n in names] or sorted(CHAPTERS.glob("*.py")), desc="refresh"):
        notebook = BUILD / "refresh" / f"{source.stem}.ipynb"
        fresh(source, notebook)
        execute(notebook, notebook)
        done = nbformat.read(notebook, as_version=4)
        done.metadata.pop("papermill", None)
        for cell in done.cells:
            cell.metadata.pop("papermill", None)
            cell.metadata.pop("execution", None)
        nbformat.write(done, source.with_suffix(".ipynb"))


def site(notebooks: Path, out: Path) -> None:
    """Build the site from the notebooks of a folder into `out`, every warning an error."""
    source = out / "source"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(ROOT / "data" / "figures", source / "data" / "figures")
    shutil.copytree(ROOT / "static", source / "static")
    for name in ("README.md", "_config.yml", "_toc.yml", "references.bib", "data/README.md"):
        shutil.copy(ROOT / name, source / name)
    (source / "chapters").mkdir()
    for path in notebooks.glob("*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if "injected-parameters" in (tags := cell["metadata"].get("tags", [])):
                tags.append("remove-cell")  # what papermill was called with is no part of the page
        (source / "chapters" / path.name).write_text(json.dumps(notebook), encoding="utf-8")
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    subprocess.run([jupyter_book, "build", source, "--path-output", out, "-W", "-n", "--keep-going", "--quiet"], check=True)


def execute_other() -> None:
    """Every chapter on another model, into _build/other."""
    model = str(awkward_model())
    for notebook in tqdm(sorted(CHAPTERS.glob("*.ipynb")), desc="other"):
        execute(notebook, BUILD / "other" / notebook.name, model=model)


def random_llama(name: str, width: int, inner: int, tied: bool) -> Path:
    """A folder with a random Llama and the bundled tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = BUILD / name
    shutil.copytree(ROOT / "data" / "model", folder, dirs_exist_ok=True)
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=1280, hidden_size=width, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=width // 32,
        num_key_value_heads=width // 64, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=tied, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, dtype=torch.float16)).half().save_pretrained(folder)
    return folder


def awkward_model() -> Path:
    """Chapters must hold for any model: one that is awkward in every way that a Llama can be: no chat template, no start token,
    no limit of length, a tied head, widths that 128 does not divide."""
    folder = random_llama("awkward-model", 192, 352, tied=True)
    path = folder / "tokenizer_config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("chat_template", "model_max_length")}
    path.write_text(json.dumps(config | {"bos_token": None}))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("refresh").add_argument("names", nargs="*")
    commands.add_parser("execute-other")
    build = commands.add_parser("site")
    build.add_argument("notebooks", type=Path)
    build.add_argument("out", type=Path)
    commands.add_parser("keep-records")
    profiled = commands.add_parser("execute-profile")
    profiled.add_argument("profile", choices=PROFILES)
    profiled.add_argument("name")
    args = parser.parse_args()
    if args.command == "refresh":
        refresh(args.names)
    elif args.command == "site":
        site(args.notebooks, args.out)
    elif args.command == "execute-other":
        execute_other()
    elif args.command == "execute-profile":
        settings("", args.profile)  # which may not be fit to run
        execute(CHAPTERS / f"{args.name}.ipynb", BUILD / args.profile / f"{args.name}.ipynb", profile=args.profile)
    else:
        for record in sorted(RECORDS.glob("*.json")):
            print("measured:", shutil.copy(record, results.RESULTS))
