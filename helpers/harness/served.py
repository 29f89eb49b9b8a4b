"""Variants behind a serving engine: latency at several rates and the answers there; and the record of such a run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from transformers import AutoTokenizer

from helpers.files import key_hash
from helpers.harness.compare import circumstances
from helpers.harness.load import Load, load
from helpers.harness.serve import Answer, Server, answers, serving
from helpers.harness.variants import Original, Variant
from helpers.measure.answers import prompt_ids, said
from helpers.measure.tasks import Example, render
from helpers.results import BadRecord, read


@dataclass(frozen=True)
class Served:
    """One variant on a server that is started for it: `rates` in requests/s, and whether it answers as its file says."""

    asked: Sequence[Example] = field(repr=False)
    reference: Original
    rates: tuple[float, ...]
    requests: int = 64
    new_tokens: int = 16
    name: str = "served"

    @property
    def key(self) -> dict:
        return {"measure": self.name, "asked": key_hash([vars(e) for e in self.asked]), "wording": self.reference.wording,
                "rates": self.rates, "requests": self.requests, "new_tokens": self.new_tokens, **circumstances()}

    def of(self, variant: Variant) -> dict[str, np.ndarray]:
        """Raises EngineMissing, EngineRefused, EngineFailed."""
        tokenizer = AutoTokenizer.from_pretrained(self.reference.folder)
        prompts = [prompt_ids(tokenizer, e) for e in self.asked]
        here = said(variant.load(), tokenizer, prompts, max_new_tokens=self.new_tokens)
        with serving(variant.folder, self.reference.folder) as server:
            there = answers(server, prompts, self.new_tokens)
            same = [a.error is None and tuple(a.tokens[:-1] if a.ended else a.tokens) == h.tokens
                    for a, h in zip(there, here, strict=True)]
            return self.loads(server) | {"same": np.array(same), "kernels": np.array(server.kernels() or ["none named"])}

    def loads(self, server: Server) -> dict[str, np.ndarray]:
        """The runs at every rate, on a server that is there. Raises EngineMissing and EngineFailed."""
        tokenizer = AutoTokenizer.from_pretrained(self.reference.folder)
        texts = [render(tokenizer, e)[0] for e in self.asked]
        arrays = {}
        for rate in self.rates:
            run = load(server, self.reference.folder, texts, rate, self.requests, self.new_tokens,
                       3 * self.requests / rate + 60)
            arrays |= {f"{rate:g} {k}": v for k, v in run.arrays().items()}
        return arrays

    @staticmethod
    def by_rate(arrays: Mapping[str, np.ndarray]) -> dict[float, Load]:
        """{requests/s: Load} of what `of` gave."""
        rates = [k.split(" ")[0] for k in arrays if k.endswith(" rate")]
        return {float(r): Load.of({k.split(" ", 1)[1]: v for k, v in arrays.items() if k.startswith(f"{r} ")}) for r in rates}


def shadow(asked: Sequence[Example], first: Sequence[Answer], second: Sequence[Answer], tokenizer) -> pd.DataFrame:
    """A prompt log replayed through two servers: the prompts that they answer differently, or that one of them failed on."""
    return pd.DataFrame([{"prompt": e.prompt, "first": a.error or tokenizer.decode(a.tokens, skip_special_tokens=True),
                          "second": b.error or tokenizer.decode(b.tokens, skip_special_tokens=True)}
                         for e, a, b in zip(asked, first, second, strict=True) if a.error or b.error or a.tokens != b.tokens],
                        columns=["prompt", "first", "second"])


def _record(part: str) -> Mapping | None:
    try:
        return read("served").data[part]
    except BadRecord:
        return None


def served_table() -> pd.DataFrame | str:
    """Latency of data/results/served.json: ms at each rate; refused and failed requests are counted."""
    if (record := _record("load")) is None:
        return "nothing was served yet: make serving, then make served"
    rows = {}
    for name, runs in record.items():
        for r in runs.values():
            times = {f"{what} {p}": f"{found[p]:.0f}" for what in ("TTFT", "ITL", "E2EL") for p in ("p50", "p95")
                     if p in (found := r[f"{what.lower()}_ms"] or {})}
            rows[name, f"{r['rate']:g}/s"] = times | {
                "tokens/s": f"{r['tokens_per_second']:.0f}", "requests": str(r["succeeded"]),
                "failed": json.dumps(r["errors"]) if r["errors"] else "0", "kernel": ", ".join(r["kernels"]) or "none named",
                "doubt": r["doubt"] or ""}
    return pd.DataFrame(rows).T.fillna("")


def slower() -> pd.DataFrame | str:
    """Median ITL and TTFT of data/results/served.json at each rate, as multiples of 16 bits'."""
    if (record := _record("load")) is None:
        return "nothing was served yet: make serving, then make served"
    rows = {name: {f"{what} at {r['rate']:g}/s": r[of]["p50"] / record["16 bits"][key][of]["p50"]
                   for what, of in (("ITL", "itl_ms"), ("TTFT", "ttft_ms")) for key, r in runs.items()}
            for name, runs in record.items()}
    return pd.DataFrame(rows).T.map("{:.2f} times".format)


def answers_table() -> pd.DataFrame | str:
    """Answers of data/results/served.json: those that are the ones of exact dequantization, and KL of the served model."""
    if (found := _record("answers")) is None:
        return "nothing was served yet: make serving, then make served"
    return pd.DataFrame({name: {"refused": a["refused"]} if "refused" in a else {
        "same answers": f"{a['same']} of {a['questions']}", "right": str(a["right"]), "in process": str(a["right_in_process"]),
        "KL (nats/token)": f"{a['kl'][0]:.1e}", "kernel": ", ".join(a["kernels"]) or "none named",
        "ready (s)": f"{a['seconds_to_ready']:.0f}"} for name, a in found.items()}).T.fillna("")
