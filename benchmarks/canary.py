"""Three canaries between two real engines (`make serving`), some ten minutes on two cores: `python -m benchmarks.canary`.

One log of questions; the fallback is the bundled model in fp16. The pick: the same weights in bf16; the same with the last
block's down_proj set to zero; and the first again, its engine killed (SIGKILL) during a batch. Writes data/results/canary.json.
"""

import os
import random
import shutil
import signal
import tempfile
import threading
from collections import Counter
from pathlib import Path

import psutil
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from benchmarks.served import engines
from helpers.canary import side
from helpers.files import folder_hash
from helpers.harness.canary import Ask, Canary, run_canary
from helpers.harness.gates import FAIL
from helpers.harness.rollout import Manifest, Step
from helpers.harness.serve import Server, serving
from helpers.measure.tasks import Example, examples
from helpers.models.source import BUNDLED
from helpers.results import Record, save, versions

PLAN = Manifest((Step(0.25, 40), Step(0.5, 40), Step(1.0, 80)),
                {"answered": 0.95, "right": 0.93, "json_parses": 0.9, "ends": 0.9})
TOKENS, KILL_AT = 48, 40  # the pick's so many-th request


def questions(limit: int = 40) -> list[Example]:
    found = examples("judge", ("facts", "arithmetic", "recall_4", "json", "tool"), limit)
    return random.Random(0).sample(found, len(found))


def spoiled(folder: Path) -> Path:
    """A copy of the bundled model without what its last block's MLP adds."""
    shutil.copytree(BUNDLED, folder)
    tensors = load_file(path := folder / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"].zero_()
    save_file(tensors, path, {"format": "pt"})
    return folder


def kill(server: Server) -> None:
    """All processes of an engine that this one started."""
    port = server.url.rsplit(":", 1)[1]
    os.killpg(next(p.pid for p in psutil.Process().children() if port in p.cmdline()), signal.SIGKILL)


def watched(ask: Ask, whole: Counter, at: int = 0, victim: Server | None = None) -> Ask:
    """The side; `whole` counts its whole answers to each prompt. The victim dies amid the batch with request number `at`."""
    had = 0

    def asked(prompts):
        nonlocal had
        half = len(prompts) // 2 if had < at <= had + len(prompts) else 0
        had, found = had + len(prompts), ask(prompts[:half]) if half else []
        if half:
            threading.Timer(0.1, kill, [victim]).start()  # the others are then in flight
        found += ask(prompts[half:])
        whole.update(tuple(p) for p, a in zip(prompts, found, strict=True) if a.error is None)
        return found

    return asked


def summary(canary: Canary, whole: Counter) -> dict:
    fired = [b.requests for b in canary.history if any(f.outcome == FAIL for f in b.findings.values())]
    return {"outcome": canary.outcome, "reason": canary.reason, "requests": len(canary.served), "lost": len(canary.lost),
            "requests_until_rollback": fired[0] if fired else None, "answered_twice": sum(n > 1 for n in whole.values()),
            "history": [b._asdict() | {"findings": {k: f._asdict() for k, f in b.findings.items()}} for b in canary.history]}


def main() -> None:
    log, tokenizer, data = questions(), AutoTokenizer.from_pretrained(BUNDLED), {"plan": PLAN._asdict()}
    with tempfile.TemporaryDirectory() as scratch, serving(BUNDLED) as fallback:
        bad = spoiled(Path(scratch) / "spoiled")
        for name, folder in (("healthy", BUNDLED), ("spoiled", bad), ("killed", BUNDLED)):
            with serving(folder, dtype="float16" if folder == bad else "bfloat16") as pick:
                at, whole = KILL_AT if name == "killed" else 0, Counter()
                sides = watched(side(fallback, TOKENS), whole), watched(side(pick, TOKENS), whole, at, pick)
                data[name] = summary(run_canary(PLAN, log, *sides, tokenizer, progress=True), whole)
            fallback.check()  # one that something else ended would make a record of another experiment
    about = {"model_sha256": folder_hash(BUNDLED), "versions": versions() | engines()}
    print(save(Record("canary", data, "python -m benchmarks.canary", **about)))


if __name__ == "__main__":
    main()
