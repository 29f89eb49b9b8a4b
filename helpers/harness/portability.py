"""Who reads whose file: each artefact in each engine, its answers held against those of exact dequantization.

`python -m helpers.harness.portability --commit` asks the engines that are installed about all committed artefacts.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
from tqdm import tqdm
from transformers import AutoTokenizer

from helpers.files import folder_hash
from helpers.measure.tasks import questions
from helpers.models.reading import BadCheckpoint, load_simulated, read_artefact
from helpers.models.source import BUNDLED, end_tokens
from helpers.results import Record, save, versions_in
from helpers.toolkits.answers import greedy_answer
from helpers.toolkits.artefacts import COMMITTED
from helpers.toolkits.process import ORIGINALS, ROOT, Job, ToolkitFailed, ToolkitMissing, ask

NEW_TOKENS = 24


@dataclass(frozen=True)
class Loads:
    """One artefact in one engine: `right` of `asked` answers are those of exact dequantization, token by token."""

    loads: bool
    right: int
    asked: int
    kernel: str  # the class that computes the linears
    seconds: float  # from the start of the engine's process to its end
    reason: str  # why it does not load, or broke off


Engine = Callable[[Job, float], dict]  # to {loads, kernel, answers, reason}; whatever it does, it raises nothing


def library(name: str, originals: bool, job: Job, timeout: float) -> dict:
    """A library of helpers/toolkits/answers.py, in a process of its own."""
    try:
        return ask("answers", replace(job, method=name), originals, timeout)
    except ToolkitMissing as error:
        return {"reason": f"not installed: {error}"}
    except ToolkitFailed as error:  # its process died
        return {"reason": str(error).partition(";")[0]}


def vllm(job: Job, timeout: float) -> dict:
    """vLLM's server, which has `timeout` seconds to get ready."""
    from helpers.harness import serve  # which only this engine needs

    try:
        with serve.serving(Path(job.source), timeout=timeout) as server:
            found, kernel = serve.answers(server, job.tokens, job.settings["new_tokens"]), ", ".join(server.kernels())
    except serve.EngineMissing as error:
        return {"reason": f"not installed: {error}"}
    except (serve.EngineRefused, serve.EngineFailed) as error:
        return {"reason": str(error).partition("\n")[0]}
    broken = next((a.error for a in found if a.error), "")
    return {"loads": True, "kernel": kernel, "answers": [a.tokens for a in found], "reason": broken}


ENGINES: dict[str, Engine] = {
    "transformers": partial(library, "transformers", False), "GPTQModel": partial(library, "gptqmodel", False),
    "auto-gptq": partial(library, "auto-gptq", True), "autoawq": partial(library, "autoawq", True), "vLLM": vllm}


def _cell(engine: Engine, folder: Path, tokenizer: Path, job: Job, expected: Sequence[Sequence[int]], timeout: float) -> Loads:
    with tempfile.TemporaryDirectory() as temporary:  # some need the tokenizer there, and auto-gptq writes into the folder
        for path in [*folder.iterdir(), *tokenizer.glob("*token*"), *tokenizer.glob("chat_template*")]:
            if not (link := Path(temporary) / path.name).exists():
                link.symlink_to(path.resolve())
        started = time.perf_counter()
        said = engine(replace(job, source=temporary), timeout)
        seconds = round(time.perf_counter() - started, 1)
    answers = [a[:-1] if a and a[-1] in job.settings["ends"] else a for a in said.get("answers", [])]  # vLLM keeps the end
    right = sum(a == e for a, e in zip(answers, expected, strict=False))  # fewer answers where it broke off
    reason = said["reason"].replace(temporary, "FOLDER")
    return Loads(said.get("loads", False), right, len(expected), said.get("kernel", ""), seconds, reason)


def matrix(folders: Mapping[str, Path], engines: Mapping[str, Engine] = ENGINES, asked: Sequence[Sequence[int]] | None = None,
           tokenizer: Path = BUNDLED, timeout: float = 600, progress: bool = True) -> dict[str, dict[str, Loads]]:
    """{artefact: {engine: Loads}} of these folders; a cell is a process of its own, and has `timeout` seconds.

    `asked`: prompts as token ids (20 of the judging set); `tokenizer`: its folder. No artefact: our reader's reason everywhere.
    """
    asked = questions(AutoTokenizer.from_pretrained(tokenizer)) if asked is None else asked
    found: dict[str, dict[str, Loads]] = {}
    for name, folder in (bar := tqdm(folders.items(), disable=not progress)):
        try:
            quantized, model = sorted(read_artefact(folder).linears), load_simulated(folder)
        except BadCheckpoint as error:
            found[name] = dict.fromkeys(engines, Loads(False, 0, len(asked), "", 0.0, str(error).partition("\n")[0]))
            continue
        expected = [greedy_answer(model, prompt, NEW_TOKENS, ends := end_tokens(folder)) for prompt in asked]
        del model  # what an engine loads needs the room
        job = Job("", str(folder), asked, {"linears": quantized, "ends": ends, "new_tokens": NEW_TOKENS}, calibrated=False)
        for engine, reply in engines.items():
            bar.set_description(f"{name} in {engine}")
            found.setdefault(name, {})[engine] = _cell(reply, folder, tokenizer, job, expected, timeout)
    return found


def table(found: Mapping[str, Mapping[str, Loads]]) -> pd.DataFrame:
    """To read: artefacts down, engines across; how many answers are right and the kernel, or the reason."""
    return pd.DataFrame(found).T.map(
        lambda x: "; ".join([f"{x.right} of {x.asked}, {x.kernel}"] * x.loads + [x.reason] * bool(x.reason)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit", action="store_true", help="write data/results/portability.json")
    args = parser.parse_args()
    measured = matrix({p.name: p for p in sorted(COMMITTED.iterdir()) if p.is_dir()})
    print(table(measured).to_string())
    if args.commit:
        cells = {name: {engine: asdict(x) for engine, x in row.items()} for name, row in measured.items()}
        others = {place.parts[-4]: versions_in(place) for place in ROOT.glob(".venv-*/lib/python*/site-packages")}
        save(Record("portability", {"matrix": cells, "new_tokens": NEW_TOKENS, "versions": {
            ORIGINALS.name: versions_in(ORIGINALS), **others}}, model_sha256=folder_hash(BUNDLED)))
