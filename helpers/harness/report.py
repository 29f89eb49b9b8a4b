"""What a comparison leaves: results.json, a manifest to deploy by, and what got worse since an earlier results.json."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import yaml

from helpers.files import folder_hash, write_atomically
from helpers.harness.decide import Verdict, outcome
from helpers.harness.gates import Gate
from helpers.harness.measured import Measured
from helpers.harness.ranking import ALPHA
from helpers.harness.study import Study
from helpers.harness.variants import bits
from helpers.measure.stats import holm, mcnemar, ratio_interval, share_difference, share_interval, swap_test
from helpers.results import Record
from helpers.toolkits.artefacts import build_seconds
from helpers.toolkits.process import ROOT

SCHEMA = json.loads(Path(__file__).with_name("results.schema.json").read_text())
VERSION = SCHEMA["properties"]["schema"]["const"]
CANARY = (0.01, 0.05, 0.25, 1.0)  # shares of the traffic


class BadResults(ValueError):
    """A results.json that is missing, cut short, of another version, or not about the same."""


def results(study: Study, measured: Mapping[str, Measured], verdict: Verdict) -> dict[str, Any]:
    """A comparison as results.json has it (results.schema.json says what is in it)."""
    made, full = Record("", {}), measured[study.full.name]
    scores = full.questions
    return {
        "schema": VERSION, "command": made.command, "date": made.date, "machine": made.machine, "versions": made.versions,
        "model": {"name": study.full.model, "revision": study.full.revision, "weights_sha256": folder_hash(study.full.folder),
                  "parameters": study.full.predicted() // 2, "random_weights": study.shapes},
        "asked": {"id": [], "task": [], "tokens": []} if scores is None else {
            "id": scores.ids.tolist(), "task": scores.tasks.tolist(), "tokens": scores.answer.tokens.astype(int).tolist()},
        "gates": [str(g) for g in study.gates],
        "variants": [_variant(m, full, verdict) for m in measured.values()],
        "verdict": {"outcome": verdict.outcome, "pick": verdict.pick, "fallback": verdict.fallback}}


def _variant(m: Measured, full: Measured, verdict: Verdict) -> dict[str, Any]:
    v, folder = m.variant, getattr(m.variant, "folder", None)
    latency = {k: t.mean(-1) if t.ndim == 2 else t for k, t in (m.timed or {}).items() if k != "kernels"}
    return {
        "name": v.name, "plan": str(v.plan) if v.plan else None, "bits_a_weight": _number(bits(v)),
        "predicted_bytes": v.predicted(), "measured_bytes": v.measured(), "artefact_sha256": folder and folder_hash(folder),
        "quantize_seconds": folder and build_seconds(folder), "quality": _quality(m, full),
        "items": {} if m.questions is None else {
            "nll": _rounded(m.questions.answer.nll), "kl": _rounded(m.questions.answer.kl),
            "exact": m.questions.exact.astype(int).tolist()},
        "memory": {k: _number(x) for k, x in (m.peaks or {}).items()},
        "latency": {k: _rounded(t) for k, t in latency.items()},
        "kernels": (m.timed or {}).get("kernels", np.array([])).tolist(),
        "served": {f"{rate:g}": {k: x.tolist() for k, x in load.arrays().items()} for rate, load in m.served.items()},
        "engines": {name: asdict(x) for name, x in m.loads.items()}, "failed": dict(m.failed),
        "findings": [f._asdict() | {"interval": f.interval and _interval(f.interval)} for f in verdict.findings[v.name]],
        "outcome": outcome(verdict.findings[v.name]), "reason": verdict.reasons[v.name]}


def _quality(m: Measured, full: Measured) -> dict[str, Any]:
    """Intervals of everything that was asked; none of what was not."""
    found: dict[str, Any] = {}
    if m.questions is not None and full.questions is not None:
        q, f = m.questions, full.questions
        tasks = list(dict.fromkeys(q.tasks.tolist()))
        found |= {"kl": _interval(q.answer.kl_interval()), "delta_nll": _interval(q.answer.delta_nll(f.answer)),
                  "agreement": _interval(ratio_interval(q.answer.agree, q.answer.tokens)),
                  "exact": _interval(share_interval(q.exact.sum(), len(q.exact))),
                  "exact_by_task": {t: _interval(share_interval((e := q.select(t).exact).sum(), len(e))) for t in tasks},
                  "kl_by_task": {t: _interval(q.select(t).answer.kl_interval()) for t in tasks if (q.tasks == t).sum() > 1}}
    if m.texts is not None:
        found["perplexity_by_text"] = {t: _interval(np.exp(ratio_interval((s := m.texts.select(t).all).nll, s.tokens)))
                                       for t in dict.fromkeys(m.texts.tasks.tolist())}
        found["kl_by_text"] = {t: _interval(m.texts.select(t).all.kl_interval()) for t in dict.fromkeys(m.texts.tasks.tolist())}
    if m.form is not None:
        parts = ["right", "ends", "no_loops"] + ["json_parses", "schema"] * bool(m.form["structured"].any())
        found["form"] = {part: _interval(share_interval((h := m.form_of(part)).sum(), len(h))) for part in parts}
    return found


def _number(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def _interval(i) -> list[float | None]:
    return [_number(float(f"{x:.6g}")) for x in i]


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{x:.6g}") for x in values]


def save(found: Mapping[str, Any], path: Path) -> None:
    """Write results.json, checked against its schema, whole or not at all."""
    jsonschema.Draft202012Validator(SCHEMA).validate(found)
    write_atomically(path, json.dumps(found, indent=1, allow_nan=False) + "\n")


def read(path: Path) -> dict[str, Any]:
    """A results.json; raises BadResults naming the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        jsonschema.Draft202012Validator(SCHEMA).validate(found)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadResults(f"{path} cannot be read: {error}") from error
    except jsonschema.ValidationError as error:
        where = ".".join(map(str, error.absolute_path)) or "the file"
        raise BadResults(f"{path}: {where}: not as version {VERSION} of results.json has it: {error.message[:200]}") from error
    count = len(found["asked"]["id"])
    lists = [*found["asked"].items(), *(i for v in found["variants"] for i in v["items"].items())]
    if bad := [k for k, values in lists if len(values) != count]:
        raise BadResults(f"{path}: {bad[0]}: expected {count} values, one for each question")
    return found


def manifest(study: Study, verdict: Verdict, measured: Mapping[str, Measured]) -> str:
    """How to put the pick to work, as YAML: what to deploy, in which steps, when to roll back, and onto what. The limits of
    `roll_back_unless` are read off single answers, and `helpers.rollout` executes them; those of `roll_back_when` are a
    monitor's."""
    if verdict.pick is None:
        return yaml.safe_dump({"deploy": None, "because": f"verdict: {verdict.outcome}"}, sort_keys=False)

    def artefact(name: str | None) -> dict | None:
        folder = name and getattr(measured[name].variant, "folder", None)
        hashed = folder_hash(folder) if folder else None
        where = folder and str(folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder)
        return name and {"variant": name, "folder": where, "weights_sha256": hashed, "bytes": measured[name].bytes}

    return yaml.safe_dump({
        "deploy": artefact(verdict.pick), "fallback": artefact(verdict.fallback) or artefact(study.full.name),
        "canary": [{"share_of_traffic": share, "requests_at_least": 300} for share in CANARY],
        **limits(study.gates, None if (full := measured[study.full.name].questions) is None else float(full.exact.mean())),
        "roll_back_when": [f"not ({gate})" for gate in study.gates if not gate.field.startswith(("memory", "fits", "portab"))],
        "model_sha256": folder_hash(study.full.folder)}, sort_keys=False)


def limits(gates: Sequence[Gate], right: float | None) -> dict[str, Any]:
    """`roll_back_unless`, the least shares of answers, as far as gates are about single answers, and `first_token_ms` if one is
    about that; `right` is full precision's share."""
    found, rest = {"answered": 0.98}, {}
    for g in gates:
        if g.field.startswith("form."):
            found[g.field.removeprefix("form.")] = round(g.limit, 6)
        elif (field := g.field.removesuffix(".overall")) == "exact" or (field == "recovery" and right):
            found["right"] = round(max(found.get("right", 0), g.limit * (1 if field == "exact" else right)), 4)
        elif g.field.startswith("served errors") and g.below:
            found["answered"] = round(1 - g.limit, 6)
        elif (late := re.fullmatch(r"served at .*, ttft_ms p\((\d+)\)", g.field)) and g.below:
            found["in_time"], rest["first_token_ms"] = int(late[1]) / 100, g.limit
    return {"roll_back_unless": found, **rest}


def worse(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What got measurably worse between two results, variant by variant, paired by question and corrected for the number of
    comparisons (Holm); a variant that had scores and has none now did, too.

    Raises BadResults if fewer than 2 questions or no variant's scores are in both, or a question has another answer now.
    """
    before, found, gone = {v["name"]: v for v in old["variants"] if v["items"]}, [], []
    shared, a, b = np.intersect1d(old["asked"]["id"], new["asked"]["id"], return_indices=True)
    if len(shared) < 2:
        raise BadResults(f"{len(shared)} questions are in both results: expected at least 2")
    tokens = np.array(new["asked"]["tokens"])[b]
    if other := (np.array(old["asked"]["tokens"])[a] != tokens).sum():
        raise BadResults(f"{other} of {len(shared)} questions have another answer now: expected the same model and questions")
    for v in new["variants"]:
        if (earlier := before.get(v["name"])) and not v["items"]:
            why = v["failed"].get("questions", "none were asked")
            gone.append(f"{v['name']}: had scores before, now: {why}")
        elif earlier:
            then, now = ({k: np.array(x["items"][k], dtype=float)[at] for k in x["items"]} for x, at in ((earlier, a), (v, b)))
            for what in ("nll", "kl"):
                apart = now[what] - then[what]
                found.append((swap_test(apart), apart.sum() > 0, f"{v['name']}: {what} on answers",
                              ratio_interval(apart, tokens)))
            found.append((mcnemar(then["exact"], now["exact"]).p_value, now["exact"].sum() < then["exact"].sum(),
                          f"{v['name']}: right answers", share_difference(now["exact"], then["exact"])))
    if not found and not gone:
        raise BadResults("no variant has scores in both results: there is nothing to compare")
    corrected = holm([p for p, *_ in found])
    return gone + [f"{what} changed by {interval}" for (_, bad, what, interval), p in zip(found, corrected, strict=True)
            if bad and p < ALPHA]
