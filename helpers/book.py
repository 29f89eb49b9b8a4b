"""The book's own machinery: the start of a chapter, committed outputs, the site, and runs on other models.

`python -m helpers.book refresh [NAME ...] | site NOTEBOOKS OUT | execute-other | execute-profile NAME` (see the Makefile).
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
RECORDS = BUILD / "records"  # what chapters measured with a profile; execute-profile copies them to data/results
PROFILES = json.loads(Path(__file__).with_name("profiles.json").read_text())


class RevisionUnset(ValueError):
    """A profile that names a hub model without saying which revision."""


def settings(model: str, profile: str | None = None) -> dict:
    """What a chapter runs on: the named profile, or the default one with another model (its folder or name).

    Raises KeyError for an unknown profile, RevisionUnset if it would fetch whatever is newest on the hub.
    """
    chosen = PROFILES[profile] if profile else PROFILES["bundled"] | {"model": model}
    if profile and chosen["revision"] is None and "/" in chosen["model"] and not Path(chosen["model"]).is_dir():
        raise RevisionUnset(f"profile {profile!r} names {chosen['model']} without a revision: look up the commit on its hub "
                            "page and set it in helpers/profiles.json, so that results can be repeated")
    return chosen


def start(seed: int = 0) -> None:
    """Begin a chapter: fix the seeds, take on the book's plot style, quiet the libraries, print the versions."""
    for name in ("torchao", "torch.utils._pytree", "transformers", "bitsandbytes", "gptqmodel", "optimum"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="IProgress not found")
    import matplotlib.pyplot as plt
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    random.seed(seed)
    torch.manual_seed(seed)
    plt.style.use(Path(__file__).with_name("book.mplstyle"))
    print(", ".join(f"{name} {number}" for name, number in results.versions().items()))


def execute(notebook: Path, out: Path, **parameters) -> None:
    """Run a notebook with papermill, from the chapters' folder; `out` appears when it is finished."""
    import papermill

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.stem}.partial.ipynb")  # on failure it stays, with the traceback in it
    papermill.execute_notebook(notebook, partial, parameters, kernel_name="python3", cwd=CHAPTERS, progress_bar=False)
    partial.replace(out)


def refresh(names: list[str]) -> None:
    """Rewrite the committed notebooks (all, or these) from their .py halves, with the bundled model's outputs on this CPU."""
    import jupytext
    import nbformat

    for source in tqdm([CHAPTERS / f"{n}.py" for n in names] or sorted(CHAPTERS.glob("*.py")), desc="refresh"):
        notebook = jupytext.read(source)
        for n, cell in enumerate(notebook.cells):
            cell["id"] = f"{source.stem[:2]}-{n}"  # ids that do not change with every refresh
        fresh = BUILD / "refresh" / f"{source.stem}.ipynb"
        fresh.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, fresh)
        execute(fresh, fresh)
        done = nbformat.read(fresh, as_version=4)
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
    shutil.copytree(notebooks, source / "chapters", ignore=lambda _, names: [n for n in names if not n.endswith(".ipynb")])
    jupyter_book = Path(sys.executable).with_name("jupyter-book")
    subprocess.run([jupyter_book, "build", source, "--path-output", out, "-W", "-n", "--keep-going", "--quiet"], check=True)


def execute_all(folder: str, **parameters) -> None:
    """Every chapter with these parameters, into _build/FOLDER."""
    for notebook in tqdm(sorted(CHAPTERS.glob("*.ipynb")), desc=folder):
        execute(notebook, BUILD / folder / notebook.name, **parameters)


def other_model() -> Path:
    """A random Llama of another shape than the bundled one, with its tokenizer: chapters must hold for any model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = BUILD / "other-model"
    shutil.copytree(ROOT / "data" / "model", folder, dirs_exist_ok=True)
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=1280, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=False, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, dtype=torch.float16)).half().save_pretrained(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("refresh").add_argument("names", nargs="*")
    commands.add_parser("execute-other")
    build = commands.add_parser("site")
    build.add_argument("notebooks", type=Path)
    build.add_argument("out", type=Path)
    commands.add_parser("execute-profile").add_argument("name", choices=PROFILES)
    args = parser.parse_args()
    if args.command == "refresh":
        refresh(args.names)
    elif args.command == "site":
        site(args.notebooks, args.out)
    elif args.command == "execute-other":
        execute_all("other", model=str(other_model()))
    else:
        settings("", args.name)
        execute_all(args.name, profile=args.name)
        for record in sorted(RECORDS.glob("*.json")):
            print("measured:", shutil.copy(record, results.RESULTS))
