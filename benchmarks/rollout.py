"""The switch of chapter 10 on real servers: the manifest of the chatbot's case, executed on its requests three times, with a
sound pick, with one whose output head is spoiled after FAULT requests, and with one whose server then dies.

`python -m benchmarks.rollout`, after `make cases`, a few minutes on two cores. Writes data/results/rollout.json.
"""

import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from benchmarks import cases
from helpers.files import folder_hash
from helpers.harness.cases import CASES
from helpers.harness.named import named
from helpers.harness.rollout import Ask, BadManifest, execute, read_manifest
from helpers.harness.serve import serving
from helpers.harness.study import material
from helpers.harness.variants import Original
from helpers.measure.tasks import read_prompts
from helpers.models.source import BUNDLED
from helpers.results import Record, save
from helpers.rollout import side

CASE, FAULT, ROUNDS, TOKENS = CASES["chatbot"], 120, 6, 48  # requests before the fault; how often the log is sent; an answer's


def spoiled(folder: Path, out: Path) -> Path:
    """A copy of a model whose output head holds but -1, 0 and 1 times the largest of its row."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    head = "lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"
    scale = tensors[head].float().abs().amax(1, keepdim=True)
    tensors[head] = ((tensors[head].float() / scale).round() * scale).half()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def breaking(sound: Ask, broken: Ask, after: int, happens: Callable[[], None] = lambda: None) -> Ask:
    """`sound` until it has had `after` requests; then `happens` is called and `broken` answers."""
    had = 0

    def ask(asked):
        nonlocal had
        if had <= after < had + len(asked):
            happens()
        had += len(asked)
        return (sound if had <= after else broken)(asked)

    return ask


def main() -> None:
    path = cases.folder(CASE, "bundled") / "manifest.yml"
    manifest, told, full = read_manifest(path), yaml.safe_load(path.read_text()), Original()
    names = [told[role]["variant"] for role in ("deploy", "fallback")]
    made = named([n for n in names if n != full.name], full, material(prompts=CASE.prompts()).tokens)
    variants = {v.name: v for v in (full, *made)}
    for role, name in zip(("deploy", "fallback"), names, strict=True):
        if folder_hash(variants[name].folder) != told[role]["weights_sha256"]:
            raise BadManifest(f"{path}: {name} has other weights now: make cases")
    log = [replace(e, id=f"{e.id}-{n}") for n in range(ROUNDS) for e in read_prompts(CASE.prompts())]
    tokenizer, found = AutoTokenizer.from_pretrained(BUNDLED), {}

    def switch(name: str, ask: Ask) -> None:
        went = execute(manifest, log, side(fallback, tokenizer, TOKENS), ask, lambda ids: tokenizer.decode(
            ids, skip_special_tokens=True), progress=True)
        found[name] = {"outcome": went.outcome, "reason": went.reason, "answered": len(went.served) - len(went.lost),
                       "lost": len(went.lost), "history": went.history}

    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack, ExitStack() as mortal:
        fallback = stack.enter_context(serving(variants[names[1]].folder, BUNDLED))
        pick = mortal.enter_context(serving(variants[names[0]].folder, BUNDLED))
        sound = side(pick, tokenizer, TOKENS)
        switch("sound", sound)
        with serving(spoiled(variants[names[0]].folder, Path(scratch) / "spoiled"), BUNDLED) as other:
            switch("its head is spoiled", breaking(sound, side(other, tokenizer, TOKENS), FAULT))
        switch("its server dies", breaking(sound, sound, FAULT, mortal.close))
    data = {"manifest": told, "case": CASE.name, "requests": len(log), "fault_after": FAULT, "switches": found}
    print(save(Record("rollout", data, model_sha256=folder_hash(BUNDLED))))


if __name__ == "__main__":
    main()
