"""A switch to another model, executed: traffic moves by the steps of a manifest, and back when a limit is broken.

A request that the pick fails on is asked again of the fallback, so every request has one whole answer in the end.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml
from scipy.stats import binomtest
from tqdm import tqdm

from helpers.harness.serve import Answer
from helpers.harness.strict import Strict
from helpers.measure.answers import Said, form
from helpers.measure.tasks import Example

Ask = Callable[[Sequence[Example]], list[Answer]]  # a server, or a model in this process
PROMOTED, ROLLED_BACK, TOO_SHORT = "promoted", "rolled back", "undecided: the log is too short"
PARTS = ("answered", "right", "json_parses", "schema", "ends", "no_loops")
ALARM = 0.05  # how often a sound pick may be rolled back


class BadManifest(ValueError):
    """A manifest that cannot be read, or has nothing to deploy."""


class Step(NamedTuple):
    """A share of the traffic, and how many requests see it at least."""

    share: float
    requests: int


class Manifest(NamedTuple):
    """`keep`: {what of PARTS: the least share of the pick's answers}."""

    steps: tuple[Step, ...]
    keep: dict[str, float]


def read_manifest(path: Path) -> Manifest:
    """Steps and limits of a manifest.yml. Raises BadManifest naming file and field."""
    try:
        told = yaml.load(path.read_text(encoding="utf-8"), Strict)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadManifest(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    return parsed(told, str(path))


def parsed(told: Any, where: str = "manifest") -> Manifest:
    """The same of what the file holds."""
    if not isinstance(told, Mapping) or not told.get("deploy"):
        raise BadManifest(f"{where}: deploy: expected a variant; there is nothing to switch to")
    try:
        steps = tuple(Step(float(s["share_of_traffic"]), int(s["requests_at_least"])) for s in told["canary"])
        keep = {str(k): float(v) for k, v in told["roll_back_unless"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadManifest(f"{where}: canary and roll_back_unless: expected steps with share_of_traffic and requests_at_least, "
                          f"and shares by name: {error!r}") from error
    shares = [s.share for s in steps]
    if not steps or shares != sorted(shares) or not 0 < shares[0] <= shares[-1] == 1 or min(s.requests for s in steps) < 1:
        raise BadManifest(f"{where}: canary: expected shares that rise to 1, each for at least one request")
    if bad := [k for k, v in keep.items() if k not in PARTS or not 0 <= v <= 1] or ["none"] * (not keep):
        raise BadManifest(f"{where}: roll_back_unless: {bad[0]}: expected a share from 0 to 1 of {', '.join(PARTS)}")
    return Manifest(steps, keep)


@dataclass
class Switch:
    """How it went: `outcome`, the reason, who gave each answer (by the request's place in the log), and a row a batch."""

    outcome: str = TOO_SHORT
    reason: str = ""
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
        judged += [_parts(asked[n], a, decode) for n, a in there.items()]
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
        if switch.outcome == TOO_SHORT and in_step >= manifest.steps[step].requests:
            if step == len(manifest.steps) - 1:
                switch.outcome, switch.reason = PROMOTED, f"every limit kept over {len(judged)} answers of the pick"
            step, in_step = min(step + 1, len(manifest.steps) - 1), 0
    return switch


def _place(request: Example) -> float:
    """Where a request stands between 0 and 1, from its id alone."""
    return int(hashlib.sha256(request.id.encode()).hexdigest()[:8], 16) / 2**32


def _parts(request: Example, answer: Answer, decode: Callable[[Sequence[int]], str]) -> dict[str, bool]:
    """What can be said of one answer of the pick; of a failed one that it failed."""
    if answer.error is not None:
        return {"answered": False}
    tokens = answer.tokens[:-1] if answer.ended else answer.tokens  # without the end token, as `form` has them
    said = Said(decode(tokens).strip(), tuple(tokens), answer.ended)
    found = {k: bool(np.asarray(v)[0]) for k, v in form([said], [request]).items() if k in PARTS or k == "structured"}
    wants_json = found.pop("structured")
    return {"answered": True} | {k: v for k, v in found.items() if (wants_json or k not in ("json_parses", "schema")) and (
        k != "right" or request.answer)}
