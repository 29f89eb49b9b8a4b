"""A model behind a real serving engine (vLLM) on this machine, and what it answers there.

`make serving` installs the engine in an environment of its own; it is started as a group of processes, asked over HTTP, and
ended with its group. Any OpenAI-compatible address that takes and returns token ids can stand in for it.
"""

import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from helpers.harness.stream import EngineFailed, completion, lines
from helpers.models.source import BUNDLED, DATA
from helpers.toolkits.process import ROOT

ENGINE, PLUGINS = ROOT / ".venv-serving", ROOT / ".venv-serving-plugins"
ENV = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_HOST_IP": "127.0.0.1",
       "VLLM_CPU_INT4_W4A8": "0"}  # else processors with AMX round the activations to 8 bits as well, and say nothing
REFUSAL = re.compile(r"(?:Value error, |ValueError: |NotImplementedError: )(.*(?:upport|quantiz|kernel).*?)(?: \[type=|$)",
                     re.MULTILINE)
DEATH = re.compile(r"Worker failed with error '(.*)', please check")


class EngineMissing(RuntimeError):
    """The engine, or what puts load on it, is not installed here."""


class EngineRefused(RuntimeError):
    """The engine says that it cannot serve this model."""


@dataclass(frozen=True)
class Server:
    """An address to ask, and the name of the model there; `log` is the engine's own, if it was started here."""

    url: str
    model: str = "m"
    log: Path | None = None
    seconds_to_ready: float | None = None

    def kernels(self) -> list[str]:
        """The kernels for quantized linears that the engine's log names (nothing else does); [] without a log, and for a
        model in 16 bits."""
        said = self.log.read_text(errors="replace") if self.log else ""
        return list(dict.fromkeys(re.findall(r"Using (\w*Kernel\w*) for", said)))

    def check(self) -> None:
        """Raises EngineFailed if nothing answers at the address, or the engine behind it is dead."""
        try:
            list(lines(f"{self.url}/health", None, 10))
        except EngineFailed as error:
            if error.status != 404:  # a server without that page
                raise


@dataclass(frozen=True)
class Answer:
    """What a server said to one prompt. With an `error` the tokens are those that came before it, and no answer."""

    tokens: list[int]
    ended: bool  # by the model itself (its end token is then the last one), not by the limit
    error: str | None
    first_ms: float | None = field(default=None, compare=False)  # from the request to its first token


def available() -> str | None:
    """None if the engine is installed, else what to do."""
    return None if (ENGINE / ".installed").is_file() else f"{ENGINE.name} is missing: run `make serving` (Linux, Python 3.11)"


@contextmanager
def group(command: Sequence[str], env: Mapping[str, str], log: Path, where: Path | None = None,
          patience: float = 5) -> Iterator[subprocess.Popen]:
    """A process that leads a group of its own; all of the group ends with this context, and with this process, however it
    ends: a shell beside it waits for the end of a pipe that we hold. What they print goes to `log`."""
    with log.open("w") as f:
        leader = subprocess.Popen(command, env=env, cwd=where, stdin=subprocess.DEVNULL, stdout=f, stderr=f,
                                  start_new_session=True)
    guard = None
    try:
        guard = subprocess.Popen(["sh", "-c", "read -r _; kill -s KILL -- -$0", str(leader.pid)], stdin=subprocess.PIPE,
                                 stderr=subprocess.DEVNULL, start_new_session=True)
        yield leader
    finally:
        try:
            leader.terminate()  # an idle engine then clears up; one with a stream open would wait for ever
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline and (leader.poll() is None or _signal(leader.pid, 0)):
                time.sleep(0.05)
        finally:
            _signal(leader.pid, signal.SIGKILL)
            leader.wait()
            if guard:
                guard.kill()
                guard.communicate()


def _signal(group: int, number: int) -> bool:
    """Whether there is anybody left to send it to."""
    with suppress(ProcessLookupError):
        os.killpg(group, number)
        return True
    return False


@contextmanager
def serving(folder: Path, tokenizer: Path | None = None, dtype: str = "float16", context: int = 1024,
            kv_bytes: int = 134217728, queue: int | None = None, timeout: float = 600) -> Iterator[Server]:
    """The model in `folder`, served while the context lasts; its log stays in the temporary folder of the system.

    `context` in tokens; `kv_bytes` for the KV cache; at most `queue` requests wait, the next are refused (None: no limit);
    `timeout` seconds to get ready. The committed artefacts are served with the bundled model's tokenizer, which they lack.
    Prompts are not remembered between requests: the same prompt costs the same each time. With bfloat16 the kernel for 4 bits
    kills the engine at the first request on processors with AMX (vllm-cpu 0.32.0), and there is none without AVX-512.
    Raises EngineMissing, EngineRefused with the engine's reason (a model that loads but kills it at its first token too),
    EngineFailed with the end of its log, ValueError for a folder without a tokenizer.
    """
    if missing := available():
        raise EngineMissing(missing)
    folder = Path(folder).resolve()
    if tokenizer is None:
        tokenizer = BUNDLED if folder.parent == DATA / "artefacts" else folder
    if not (Path(tokenizer) / "tokenizer_config.json").is_file():
        raise ValueError(f"{tokenizer} has no tokenizer_config.json: say tokenizer=")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [ENGINE / "bin/python", "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", port,
               "--model", folder, "--tokenizer", Path(tokenizer).resolve(), "--served-model-name", "m", "--dtype", dtype,
               "--max-model-len", context, "--max-logprobs", -1, "--kv-cache-memory-bytes", kv_bytes,
               "--no-enable-prefix-caching"]
    command += [] if torch.cuda.is_available() else ["--enforce-eager"]  # compiling takes minutes, and wins little on a CPU
    command += [] if queue is None else ["--max-num-queued-reqs", queue]
    env = os.environ | ENV | {"PYTHONPATH": str(PLUGINS) if PLUGINS.is_dir() else ""}
    handle, log = tempfile.mkstemp(prefix="serving-", suffix=".log")
    os.close(handle)
    started, server = time.monotonic(), Server(f"http://127.0.0.1:{port}", log=Path(log))
    with group([str(c) for c in command], env, Path(log)) as leader:
        _until_ready(leader, server, timeout)
        ready = time.monotonic() - started
        _first_token(server)
        yield Server(server.url, server.model, server.log, ready)


def _first_token(server: Server) -> None:
    """An engine may look for its kernels only when it computes, and die of not finding them."""
    if _answer(server, [0], 1, 120).error:
        log = server.log.read_text(errors="replace")
        if reasons := DEATH.findall(log):
            raise EngineRefused(f"the engine loads this model and dies at its first token: {reasons[-1]}")
        raise EngineFailed(f"the engine gives no first token; {end_of(log)}")


def _until_ready(leader: subprocess.Popen, server: Server, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if leader.poll() is not None:
            log = server.log.read_text(errors="replace")
            if reasons := REFUSAL.findall(log):
                raise EngineRefused(f"the engine cannot serve this model: {reasons[-1]}")
            raise EngineFailed(f"the engine died with exit status {leader.returncode} before it was ready; {end_of(log)}")
        with suppress(EngineFailed):
            return server.check()
        time.sleep(0.2)
    raise EngineFailed(f"the engine was not ready in {timeout:.0f} s; {end_of(server.log.read_text(errors='replace'))}")


def end_of(log: str, count: int = 15) -> str:
    return "the end of its log:\n" + "\n".join(log.splitlines()[-count:])


def _answer(server: Server, prompt: Sequence[int], new_tokens: int, seconds: float) -> Answer:
    tokens, finish, started, first = [], None, time.monotonic(), None
    try:
        # a model's own settings may bring a penalty, which would apply even at temperature 0
        for chunk in completion(server.url, server.model, prompt, new_tokens, seconds, repetition_penalty=1.0):
            if chunk.get("token_ids") is None:
                raise EngineFailed("the server does not return token ids")
            tokens += chunk["token_ids"]
            first = first or 1000 * (time.monotonic() - started)
            finish = chunk.get("finish_reason") or finish
        if finish != "stop" and not (finish == "length" and len(tokens) == new_tokens):
            raise EngineFailed(f"the answer ended after {len(tokens)} of {new_tokens} tokens, because: {finish}")
    except EngineFailed as error:
        return Answer(tokens, False, str(error))
    return Answer(tokens, finish == "stop", None, first)


def answers(server: Server, prompts: Sequence[Sequence[int]], new_tokens: int, at_once: int = 8,
            timeout: float = 120) -> list[Answer]:
    """The likeliest continuation of each prompt, token ids to token ids, at most `new_tokens`, `at_once` prompts in flight.

    A fault is an answer with its `error`, never an exception: a status other than 200, an error line, a stream cut off or
    without [DONE], or no whole answer `timeout` seconds after it was asked for. Servers that do not return token ids, or send
    no [DONE] (`transformers serve`), give errors alone.
    """
    pool = ThreadPoolExecutor(at_once)
    try:
        return list(pool.map(lambda p: _answer(server, p, new_tokens, timeout), prompts))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def log_probabilities(server: Server, ids: Sequence[int], timeout: float = 300) -> torch.Tensor:
    """Those of the tokens after the first, fp32 [positions, vocabulary]: the distribution of the model as it is served.

    All of it goes through JSON, some 80 bytes a value. Raises EngineFailed.
    """
    body = {"model": server.model, "prompt": list(ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": -1}
    reply = b"".join(lines(f"{server.url}/v1/completions", body, timeout))
    try:
        rows = json.loads(reply)["choices"][0]["prompt_logprobs"][1:]
        return torch.tensor([[row[str(i)]["logprob"] for i in range(len(row))] for row in rows])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise EngineFailed(f"{server.url} gives no log-probabilities of a prompt: {error!r}") from error
