"""A switch to another model, executed: traffic moves by the steps of a manifest, and back when a limit is broken.

A request that the pick fails on is asked again of the fallback, so every request has one whole answer in the end.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml
from scipy.stats import binomtest
from torch import nn
from tqdm import tqdm

from helpers.harness.serve import Answer
from helpers.harness.strict import Strict, wrong
from helpers.measure.answers import Said, form, prompt_ids, said
from helpers.measure.tasks import Example

Ask = Callable[[Sequence[Example]], list[Answer]]  # a server, or a model in this process
SCHEMA = json.loads(Path(__file__).with_name("manifest.schema.json").read_text())
PROMOTED, ROLLED_BACK, UNDECIDED = "promoted", "rolled back", "undecided"
ALARM = 0.05  # how often a sound pick may be rolled back


class BadManifest(ValueError):
    """A manifest that cannot be read, or has nothing to deploy."""


class Step(NamedTuple):
    """A share of the traffic, and how many requests see it at least."""

    share: float
    requests: int


class Manifest(NamedTuple):
    """`keep`: {part of an answer: the least share of the pick's that has it}; a first token after `first_token_ms` is late."""

    steps: tuple[Step, ...]
    keep: dict[str, float]
    first_token_ms: float | None = None


def read_manifest(path: Path) -> Manifest:
    """Steps and limits of a manifest.yml. Raises BadManifest naming file and field."""
    try:
        told = yaml.load(path.read_text(encoding="utf-8"), Strict)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadManifest(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    return parsed(told, str(path))


def parsed(told: Any, where: str = "manifest") -> Manifest:
    """The same of what the file holds (manifest.schema.json)."""
    if fault := wrong(told, SCHEMA):
        raise BadManifest(f"{where}: {fault}")
    steps = tuple(Step(s["share_of_traffic"], s["requests_at_least"]) for s in told["canary"])
    shares = [s.share for s in steps]
    if shares != sorted(shares) or shares[-1] != 1:
        raise BadManifest(f"{where}: canary: expected shares that rise to 1")
    if "in_time" in told["roll_back_unless"] and "first_token_ms" not in told:
        raise BadManifest(f"{where}: roll_back_unless.in_time: expected first_token_ms too, which says what is in time")
    return Manifest(steps, told["roll_back_unless"], told.get("first_token_ms"))


@dataclass
class Switch:
    """How it went: `outcome`, the reason, who gave each answer (by the request's place in the log), and a row a batch."""

    outcome: str = UNDECIDED
    reason: str = "the log is too short"
    served: dict[int, tuple[str, Answer]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def lost(self) -> list[int]:
        """Requests without a whole answer: the fallback failed too."""
        return [n for n, (_, answer) in self.served.items() if answer.error is not None]

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.history)


def execute(manifest: Manifest, asked: Sequence[Example], fallback: Ask, pick: Ask, decode: Callable[[Sequence[int]], str],
            batch: int = 20, progress: bool = False) -> Switch:
    """The log through the steps. After each batch every limit is checked on all that the pick has answered so far: it is one
    model at every step, and evidence adds up. A limit is broken where so few good answers would be seen, were it kept, with a
    probability below ALARM divided by the number of looks, batches times limits (exact binomial test, Bonferroni).

    Which requests go to the pick follows from a hash of their ids: the same log, the same way.
    """
    switch, judged, step, in_step = Switch(), [], 0, 0
    looks = len(manifest.keep) * -(-len(asked) // batch)
    for start in tqdm(range(0, len(asked), batch), disable=not progress, desc="requests"):
        rows = range(start, min(start + batch, len(asked)))
        over, share = switch.outcome == ROLLED_BACK, manifest.steps[step].share
        mine = [n for n in rows if not over and _place(asked[n]) < share]
        there = dict(zip(mine, pick([asked[n] for n in mine]), strict=True)) if mine else {}
        judged += [_parts(asked[n], a, decode, manifest.first_token_ms) for n, a in there.items()]
        again = [n for n in rows if n not in there or there[n].error is not None]
        back = dict(zip(again, fallback([asked[n] for n in again]), strict=True)) if again else {}
        switch.served |= {n: ("fallback", back[n]) if n in back else ("pick", there[n]) for n in rows}
        found = {k: values for k in manifest.keep if (values := [p[k] for p in judged if k in p])}
        switch.history.append({"requests": rows[-1] + 1, "share": 0.0 if over else share, "by the pick": len(there) - sum(
            a.error is not None for a in there.values()), "by the fallback": len(back), "failed and asked again": len(
            back) - len(rows) + len(there), **{k: round(sum(v) / len(v), 3) for k, v in found.items()}})
        broken = [k for k, v in found.items() if binomtest(sum(v), len(v), manifest.keep[k], "less").pvalue < ALARM / looks]
        if broken and not over:
            switch.outcome, k = ROLLED_BACK, broken[0]
            switch.reason = (f"{k}: {sum(found[k])} of {len(found[k])}, at least {manifest.keep[k]:g} was to be kept; after "
                             f"{rows[-1] + 1} requests")
        in_step += len(rows)
        if switch.outcome == UNDECIDED and in_step >= manifest.steps[step].requests:
            if step == len(manifest.steps) - 1:
                unseen = [k for k in manifest.keep if k not in found]
                switch.outcome, switch.reason = (UNDECIDED, f"{unseen[0]}: no answer can be judged by it") if unseen else (
                    PROMOTED, f"every limit kept over {len(judged)} answers of the pick")
            step, in_step = min(step + 1, len(manifest.steps) - 1), 0
    return switch


def in_process(model_after: Callable[[int], nn.Module], tokenizer, new_tokens: int) -> Ask:
    """Models of this process as one side of a switch; `model_after(n)` gives the answers once n requests have been asked."""
    had = 0

    def ask(asked: Sequence[Example]) -> list[Answer]:
        nonlocal had
        had += len(asked)
        told = said(model_after(had), tokenizer, [prompt_ids(tokenizer, e) for e in asked], max_new_tokens=new_tokens)
        return [Answer([*t.tokens, *[tokenizer.eos_token_id] * t.ended], t.ended, None) for t in told]

    return ask


def _place(request: Example) -> float:
    """Where a request stands between 0 and 1, from its id alone."""
    return int(hashlib.sha256(request.id.encode()).hexdigest()[:8], 16) / 2**32


def _parts(request: Example, answer: Answer, decode: Callable[[Sequence[int]], str], in_ms: float | None) -> dict[str, bool]:
    """What can be said of one answer of the pick; of a failed one that it failed."""
    if answer.error is not None:
        return {"answered": False}
    tokens = answer.tokens[:-1] if answer.ended else answer.tokens  # without the end token, as `form` has them
    whole = Said(decode(tokens).strip(), tuple(tokens), answer.ended)
    of = {k: v.item() for k, v in form([whole], [request]).items()}
    found = {"answered": True, "ends": of["ends"], "no_loops": of["no_loops"]}
    if request.answer:
        found["right"] = of["right"]
    if of["structured"]:
        found |= {k: of[k] for k in ("json_parses", "schema")}
    if in_ms is not None and answer.first_ms is not None:
        found["in_time"] = answer.first_ms <= in_ms
    return found
