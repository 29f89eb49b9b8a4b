"""Requests at random times on a server, and how long each of them took: GuideLLM, in an environment of its own.

TTFT: until the first token. ITL (inter-token latency): the mean gap between the tokens after the first; vLLM calls it TPOT.
GuideLLM's own time_per_output_token is another thing, it includes the first token, and is not used. E2E: the whole request.
"""

import json
import os
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from helpers.harness.serve import EngineMissing, Server, end_of, group
from helpers.harness.stream import EngineFailed, completion
from helpers.toolkits.process import ROOT

GENERATOR = ROOT / ".venv-load"
CLUMPED_MS, CLUMPED_SHARE, LATE_MS = 0.2, 0.05, 50
# GuideLLM 0.8.1 lets its workers go before it has set the clock that arrivals are counted from: on a busy machine all requests
# then go out at once. Here the clock is set first. One worker: several share one seed, so that their arrivals coincide.
START = """
from guidellm.__main__ import cli
from guidellm.scheduler.strategies import AsyncPoissonStrategy, SchedulingStrategy
def start(self, start_time):
    self._offset.value = start_time
    SchedulingStrategy.init_processes_start(self, start_time)
AsyncPoissonStrategy.init_processes_start = start
if __name__ == "__main__":
    cli()
"""
ENV = {"GUIDELLM__MAX_WORKER_PROCESSES": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}


@dataclass(frozen=True)
class Load:
    """One run at a rate: ms of each request that succeeded, and how many did not, by what became of them.

    `errors` counts refused (status 503), errored, incomplete (when the time was up), unsent, short (fewer tokens than were
    asked for: a server that dies may look done), and untimed (tokens that are no text, such as half a character: GuideLLM sees
    no first one). `doubt` says why TTFT and ITL are not to be believed, if so; E2E still is.
    """

    rate: float  # requests/s asked for
    ttft_ms: np.ndarray
    itl_ms: np.ndarray
    e2el_ms: np.ndarray
    errors: dict[str, int]
    tokens_per_second: float  # of the requests that succeeded, from the first's start to the last's end
    doubt: str | None

    def arrays(self) -> dict[str, np.ndarray]:
        """As named arrays: what a cell stores."""
        return {"rate": np.array(self.rate), "ttft_ms": self.ttft_ms, "itl_ms": self.itl_ms, "e2el_ms": self.e2el_ms,
                "errors": np.array(json.dumps(self.errors)), "tokens_per_second": np.array(self.tokens_per_second),
                "doubt": np.array(self.doubt or "")}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> "Load":
        """The inverse of `arrays`."""
        return cls(float(arrays["rate"]), arrays["ttft_ms"], arrays["itl_ms"], arrays["e2el_ms"],
                   json.loads(str(arrays["errors"])), float(arrays["tokens_per_second"]), str(arrays["doubt"]) or None)


def load(server: Server, tokenizer: Path, prompts: Sequence[str], rate: float, requests: int, new_tokens: int,
         seconds: float) -> Load:
    """`requests` of the prompts, in turn, at Poisson arrivals of `rate` a second (the same draw of gaps for every rate), each
    for exactly `new_tokens` tokens; what is not done after `seconds` is incomplete.

    Raises EngineMissing, and EngineFailed if the server cannot be reached or GuideLLM ends without a result; requests that
    fail are counted in `Load.errors`.
    """
    if not (GENERATOR / ".installed").is_file():
        raise EngineMissing(f"{GENERATOR.name} is missing: run `make serving` (Python 3.11)")
    server.check()
    with tempfile.TemporaryDirectory() as scratch:
        done = _guidellm(Path(scratch), server, tokenizer, prompts, rate, requests, new_tokens, seconds)
    whole = [r for r in done["requests"]["successful"] if r["output_tokens"] == new_tokens]
    found = [r for r in whole if r["inter_token_latency_ms"] is not None and r["time_to_first_token_ms"] is not None]
    errors = Counter("refused" if "503" in str(r["info"]["error"]) else "errored" for r in done["requests"]["errored"])
    errors["incomplete"] = len(done["requests"]["incomplete"])
    errors["short"] = len(done["requests"]["successful"]) - len(whole)
    errors["untimed"] = len(whole) - len(found)
    errors["unsent"] = max(0, requests - sum(len(done["requests"][k]) for k in ("successful", "errored", "incomplete")))
    ttft, itl, e2el = (np.array([r[k] for r in found], dtype=float) * unit for k, unit in (
        ("time_to_first_token_ms", 1), ("inter_token_latency_ms", 1), ("request_latency", 1000)))
    took = max((r["request_end_time"] for r in found), default=0) - min((r["request_start_time"] for r in found), default=0)
    doubt = _late(found) or _clumped(server, prompts, new_tokens, rate * e2el.mean() / 1000) if found else None
    return Load(rate, ttft, itl, e2el, {k: n for k, n in errors.items() if n}, len(found) * new_tokens / took if found else 0.0,
                doubt)


def _guidellm(scratch: Path, server: Server, tokenizer: Path, prompts: Sequence[str], rate: float, requests: int,
              new_tokens: int, seconds: float) -> dict:
    """The one benchmark in GuideLLM's report."""
    rows = [{"prompt": prompts[i % len(prompts)], "output_tokens_count": new_tokens} for i in range(requests)]
    (scratch / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (scratch / "start.py").write_text(START)
    backend = {"kind": "openai_http", "target": server.url, "model": server.model, "http2": False,
               "request_format": "/v1/completions", "extras": {"body": {"temperature": 0, "ignore_eos": True}}}
    command = [str(GENERATOR / "bin/python"), "start.py", "run", "--backend", json.dumps(backend),
               "--profile", f"kind=poisson,rate={rate}", "--constraint", f"kind=max_requests,count={requests}",
               "--constraint", f"kind=max_duration,seconds={seconds}",
               "--tokenizer", f"kind=huggingface_auto,model={Path(tokenizer).resolve()}",
               "--data", "kind=json_file,path=prompts.jsonl", "--output", "kind=json,path=out.json", "--disable-progress"]
    with group(command, os.environ | ENV, scratch / "log", scratch) as process:
        try:
            ended = f"ended with exit status {process.wait(seconds + 120)}"
        except subprocess.TimeoutExpired:
            ended = f"did not end in {seconds + 120:.0f} s"
    if not (scratch / "out.json").is_file():
        raise EngineFailed(f"GuideLLM {ended}; {end_of((scratch / 'log').read_text(errors='replace'))}")
    return json.loads((scratch / "out.json").read_text())["benchmarks"][0]


def _late(found: Sequence[dict]) -> str | None:
    """Whether the requests went out when they should have."""
    late = np.array([t["request_start"] - t["targeted_start"] for t in (r["info"]["timings"] for r in found)]) * 1000
    share = float((late > LATE_MS).mean())
    return f"{share:.0%} of the requests went out over {LATE_MS} ms late: arrivals are not Poisson" if share > 0.05 else None


def _clumped(server: Server, prompts: Sequence[str], new_tokens: int, in_flight: float) -> str | None:
    """Whether tokens arrive together, so that no client can time them. GuideLLM keeps the first and the last token's time
    alone, so some requests are sent again, as many at once as were in flight on the average (1 to 8)."""
    at_once = min(8, max(1, round(in_flight)))
    try:
        with ThreadPoolExecutor(at_once) as pool:
            gaps = np.concatenate(list(pool.map(lambda p: gaps_ms(server, p, new_tokens), prompts[:max(4, at_once)])))
    except EngineFailed as error:
        return f"the gaps between tokens could not be seen: {error}"
    share = float((gaps < CLUMPED_MS).mean()) if len(gaps) else 1.0
    return (f"{share:.0%} of the gaps between tokens are under {CLUMPED_MS} ms: they arrive in clumps"
            if share > CLUMPED_SHARE else None)


def gaps_ms(server: Server, prompt: str, new_tokens: int, seconds: float = 120) -> np.ndarray:
    """ms between the tokens of one request; tokens of one piece have a gap of 0. Raises EngineFailed."""
    at: list[float] = []
    for piece in completion(server.url, server.model, prompt, new_tokens, seconds, ignore_eos=True):
        tokens = piece.get("token_ids")  # of a server without them, each piece that says something is a token
        at += [time.perf_counter()] * (len(tokens) if tokens is not None else bool(piece.get("text")))
    return np.diff(at) * 1000
