"""The serving engine, and every fault of a server: those by a small server here, the rest by the engine, if it is installed."""

import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from benchmarks.rollout import breaking, spoiled
from helpers import replay, rollout
from helpers.harness import load as loads
from helpers.harness import serve
from helpers.harness.load import GENERATOR, Load, gaps_ms, load
from helpers.harness.rollout import ROLLED_BACK, Manifest, Step, execute
from helpers.harness.serve import (
    EngineFailed,
    EngineMissing,
    EngineRefused,
    Server,
    answers,
    available,
    log_probabilities,
    serving,
)
from helpers.harness.served import shadow
from helpers.harness.stream import completion
from helpers.measure import quality
from helpers.measure.answers import greedy
from helpers.measure.tasks import Example, encode, examples
from helpers.methods.gptq import Gptq
from helpers.models.checkpoint import quantize_to
from helpers.models.reading import load_simulated
from helpers.models.source import BUNDLED
from helpers.toolkits.artefacts import COMMITTED
from helpers.toolkits.process import ROOT

NEW = 24
engine = pytest.mark.skipif(available() is not None, reason=str(available()))
no_kernel = not torch.cuda.is_available() and torch.backends.cpu.get_cpu_capability() != "AVX512"
four_bits = pytest.mark.skipif(available() is not None or no_kernel, reason=str(available() or "4 bits need AVX-512 there"))
generator = pytest.mark.skipif(not (GENERATOR / ".installed").is_file(), reason="no GuideLLM: run `make serving`")


class Faulty(BaseHTTPRequestHandler):
    """A server that has the fault which is asked for as the model's name."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Nothing."""

    def do_GET(self):
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self):
        fault = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["model"]
        if fault.isdigit():
            body = json.dumps({"error": {"message": "because"}}).encode()
            self.send_response(int(fault))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if fault == "silence":
            time.sleep(20)
        ids = [[5], [6], [2]] if fault != "clumps" else [[5, 6], [7], [8], [2]]
        for i, piece in enumerate(ids):
            self.say({"choices": [{"text": "x", "finish_reason": "stop" if i == len(ids) - 1 else None}
                                  | ({} if fault == "no ids" else {"token_ids": piece})]})
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.rfile.close()  # which holds the connection as well
                self.connection.close()
                self.close_connection = True
                return
            if fault == "trickle":
                time.sleep(0.4 if i < 2 else 20)
            if fault == "steady" or (fault == "clumps" and i == 1):
                time.sleep(0.02)
            if fault == "end of file" and i == 1:
                self.close_connection = True
                return
        if fault == "not json":
            self.piece(b"data: {\n\n")
        if fault == "error line":
            self.say({"error": {"message": "the engine is dead", "code": 500}})
        if fault != "no done":
            self.piece(b"data: [DONE]\n\n")
        self.piece(b"")

    def say(self, event):
        self.piece(b"data: " + json.dumps(event).encode() + b"\n\n")

    def piece(self, data):
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")


@pytest.fixture(scope="module")
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # of connections that we left
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("fault, said", [
    ("400", "HTTP 400.*because"), ("404", "HTTP 404"), ("503", "HTTP 503"), ("error line", "the engine is dead"),
    ("end of file", "the connection was cut"), ("no done", r"without \[DONE\]"), ("silence", "no whole reply in 1 s"),
    ("trickle", "no whole reply in 1 s"), ("reset", "the connection was cut"), ("not json", "no completion"),
    ("no ids", "does not return token ids")])
def test_a_fault_is_an_answer_with_an_error(address, fault, said):
    started = time.monotonic()
    [answer, _] = answers(Server(address, fault), [[1, 2]] * 2, NEW, timeout=1)
    assert time.monotonic() - started < 10
    assert answer.error and re.search(said, answer.error), answer
    assert not answer.ended


@pytest.mark.flaky(reruns=2)  # a busy machine lengthens times
def test_answers_and_gaps(address):
    [answer] = answers(Server(address, "steady"), [[1, 2]], NEW)
    assert answer == serve.Answer([5, 6, 2], True, None)
    assert (gaps_ms(Server(address, "steady"), "a", NEW) > 10).all()
    clumps = gaps_ms(Server(address, "clumps"), "a", NEW)
    assert len(clumps) == 4 and (clumps < 10).sum() == 3 and clumps[0] == 0
    assert "arrive in clumps" in loads._clumped(Server(address, "clumps"), ["a"] * 4, NEW, 1.0)
    assert loads._clumped(Server(address, "steady"), ["a"] * 4, NEW, 2.0) is None
    assert "could not be seen" in loads._clumped(Server(address, "503"), ["a"] * 4, NEW, 1.0)


def test_two_servers_that_fail_alike_do_not_agree(bundled):
    asked, failed = [Example("own", "Why?", "")], serve.Answer([], False, "no token ids")
    said = serve.Answer([5, 6], True, None)
    assert len(shadow(asked, [failed], [failed], bundled.tokenizer)) == 1
    assert len(shadow(asked, [said], [failed], bundled.tokenizer)) == 1 and not len(shadow(asked, [said], [said], None))


@pytest.mark.parametrize("rate", ["0", "-1", "nan"])
def test_rates_are_above_zero(rate, capsys):
    with pytest.raises(SystemExit, match="2"):
        replay.parse(["log.jsonl", "a", "b", "--rates", rate])
    assert f"expected requests a second, above 0, got {rate}" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://", "http://127.0.0.1:80a0", "ftp://127.0.0.1"])
def test_what_is_no_address_is_one_error(url):
    with pytest.raises(EngineFailed):
        Server(url).check()


def test_an_address_where_nothing_is(address):
    Server(address).check()  # without a page for its health, but there
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        nowhere = Server(f"http://127.0.0.1:{s.getsockname()[1]}")
        with pytest.raises(EngineFailed, match="cannot be reached"):
            nowhere.check()
        with pytest.raises(EngineFailed, match="cannot be reached"):
            log_probabilities(nowhere, [1, 2])
        assert "cannot be reached" in answers(nowhere, [[1]], NEW)[0].error
    assert nowhere.kernels() == []


@pytest.mark.parametrize("line, said", [
    ("  Value error, Unsupported quantization config: bits=3, sym=True [type=value_error, input_value=", "bits=3, sym=True"),
    ("ERROR [multiproc_executor.py:953] ValueError: Marlin does not support weight_bits = uint8b128. Only", "uint8b128. Only"),
    ("ValueError: Detected some but not all shards of model.layers.2.self_attn.qkv_proj are quantized. All", "quantized. All")])
def test_a_refusal_is_found_in_the_engines_log(line, said):
    [reason] = serve.REFUSAL.findall(f"INFO starting\n{line}\nRuntimeError: Engine core initialization failed.")
    assert reason.endswith(said) and reason[0] in "UMD"


def test_what_is_not_installed_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "ENGINE", tmp_path / "none")
    monkeypatch.setattr(loads, "GENERATOR", tmp_path / "none")
    with pytest.raises(EngineMissing, match="make serving"), serving(BUNDLED):
        pass
    with pytest.raises(EngineMissing, match="make serving"):
        load(Server("http://127.0.0.1:9"), BUNDLED, ["a"], 1, 1, 1, 1)


def test_load_as_arrays_and_back():
    one = Load(2.0, np.array([1.0]), np.array([2.0]), np.array([3.0]), {"errored": 1}, 4.0, None)
    assert vars(Load.of(one.arrays())) == vars(one)
    assert Load.of(Load(2.0, *[np.array([])] * 3, {}, 0.0, "why").arrays()).doubt == "why"


def children(process: psutil.Process) -> list[psutil.Process]:
    return [p for p in [process, *process.children(recursive=True)] if p.status() != psutil.STATUS_ZOMBIE]


def gone(processes, seconds=20):
    """Whether they all end soon; one that nobody collected is gone as well."""
    def alive(p):
        try:
            return p.is_running() and p.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
    until = time.monotonic() + seconds
    while (left := [p for p in processes if alive(p)]) and time.monotonic() < until:
        time.sleep(0.1)
    return not left


SLEEPER = [sys.executable, "-c", "import subprocess, sys, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
           "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\nprint('up', flush=True); time.sleep(60)"]


def until(condition, seconds=180):  # a first import beside two other streams of tests takes long
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_group_ends_with_its_context(tmp_path, error):
    with pytest.raises(error), serve.group(SLEEPER, os.environ, tmp_path / "log", patience=0.2) as leader:
        until((tmp_path / "log").read_text)
        inside = children(psutil.Process(leader.pid))
        assert len(inside) == 2
        raise error
    assert gone(inside)


def test_a_group_ends_with_a_process_that_is_killed(tmp_path):
    code = (f"import os, time, pathlib; from helpers.harness.serve import group\n"
            f"with group({SLEEPER!r}, os.environ, pathlib.Path({str(tmp_path / 'log')!r})) as leader:\n    time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    until(lambda: (tmp_path / "log").is_file() and (tmp_path / "log").read_text())
    inside = [p for p in psutil.Process(process.pid).children(recursive=True) if "time.sleep" in " ".join(p.cmdline())]
    assert len(inside) == 2
    process.kill()
    process.wait()
    assert gone(inside)


@contextmanager
def mock(tmp_path: Path, ttft_ms: float, itl_ms: float, *options: str):
    """GuideLLM's own stand-in for an engine, which takes the time it is told."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [str(GENERATOR / "bin/guidellm"), "mock-server", "--host", "127.0.0.1", "--port", str(port), "--model", "m",
               "--ttft-ms", str(ttft_ms), "--itl-ms", str(itl_ms), *options]
    with serve.group(command, os.environ | loads.ENV, tmp_path / "mock.log"):
        server = Server(f"http://127.0.0.1:{port}")

        def up():
            try:
                server.check()
            except EngineFailed:
                return False
            return True
        until(up, 60)
        yield server


@pytest.mark.flaky(reruns=2)  # a busy machine lengthens times
@generator
def test_load_measures_what_is_set(tmp_path):
    with mock(tmp_path, 100, 20) as server:
        found = load(server, BUNDLED, [f"What is {n} + 30?" for n in range(8)], 5, 16, 12, 60)
    assert len(found.ttft_ms) == len(found.itl_ms) == len(found.e2el_ms) == 16 and found.errors == {}
    assert found.doubt is None or "late" in found.doubt  # a busy machine sends requests late, and says so
    assert 100 <= found.ttft_ms.min() < 130 and 20 <= found.itl_ms.min() < 24
    assert np.allclose(found.e2el_ms, found.ttft_ms + 11 * found.itl_ms, atol=20)
    assert 5 < found.tokens_per_second < 12 * 16


@generator
def test_load_counts_what_fails(tmp_path):
    with mock(tmp_path, 50, 5, "--fail-after-requests", "6") as server:
        found = load(server, BUNDLED, ["What is 12 + 30?"], 10, 12, 8, 60)
    assert found.errors["errored"] + len(found.ttft_ms) == 12 and found.errors["errored"] >= 6
    assert "could not be seen" in found.doubt


@pytest.fixture(scope="module")
def asked(bundled):
    """Questions of every task, as tokens, without their answers."""
    items = [encode(bundled.tokenizer, e) for e in examples("judge", limit=2)][:20]
    return [i.ids[:i.start] for i in items], items


def in_process(model, prompts):
    """Greedy answers one by one."""
    with torch.inference_mode():
        return [model.generate(input_ids=torch.tensor([p]), attention_mask=torch.ones(1, len(p), dtype=torch.long),
                               generation_config=greedy(NEW, pad_token_id=0))[0, len(p):].tolist() for p in prompts]


def kl(server, model, ids) -> float:
    """KL(in process || served), nats/token."""
    with torch.inference_mode():
        p = torch.cat(list(quality.log_probabilities(model, torch.tensor([ids]))), 1)[0]
    q = log_probabilities(server, ids)
    assert q.shape == p.shape and torch.allclose(q.exp().sum(-1), torch.ones(len(q)), atol=1e-3)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def server():
    """The bundled model in 16 bits behind the engine."""
    with serving(BUNDLED) as started:
        yield started


@engine
def test_the_model_in_16_bits_is_served_as_it_is(server, asked, bundled):
    prompts, items = asked
    said = answers(server, prompts, NEW)
    assert not any(a.error for a in said) and all(a.ended for a in said)
    assert [a.tokens for a in said] == in_process(bundled.model, prompts)
    assert abs(kl(server, bundled.model, items[0].ids)) < 1e-4
    assert server.kernels() == [] and server.seconds_to_ready > 1
    [unknown] = answers(Server(server.url, "another"), prompts[:1], NEW)
    [long] = answers(server, prompts[:1], 4000)
    assert "HTTP 404" in unknown.error and "HTTP 400" in long.error


@engine
def test_a_switch_between_two_servers(server, bundled, tmp_path):
    """A pick with a spoiled head is rolled back, then a sound one is killed in the middle; nothing is lost."""
    wanted = [e for e in examples("judge", ["tool", "json", "facts"], 20) if e.answer]
    random.Random(0).shuffle(wanted)
    plan = Manifest((Step(0.5, 20), Step(1.0, 40)), {"answered": 0.95, "json_parses": 0.9})
    tokenizer, fallback = bundled.tokenizer, rollout.side(server, bundled.tokenizer, 40)

    def switch(pick):
        return execute(plan, wanted, fallback, pick, lambda ids: tokenizer.decode(ids, skip_special_tokens=True), batch=10)

    with ExitStack() as bad:
        second = rollout.side(bad.enter_context(serving(spoiled(BUNDLED, tmp_path / "spoiled"))), tokenizer, 40)
        fault = switch(second)
        death = switch(breaking(fallback, second, 5, bad.close))
    for found, limit in ((fault, "json_parses"), (death, "answered")):
        assert found.outcome == ROLLED_BACK and found.reason.startswith(limit) and not found.lost
        assert sorted(found.served) == list(range(len(wanted))) and found.served[len(wanted) - 1][0] == "fallback"


@four_bits
def test_an_artefact_is_served_as_exact_dequantization_and_the_engine_dies(asked):
    prompts, items = asked
    model = load_simulated(COMMITTED / "gptqmodel-gptq")
    before = psutil.Process().children()  # of other tests, such as the one that processes of their own are forked from
    with serving(COMMITTED / "gptqmodel-gptq") as server:
        started = time.monotonic()
        said = answers(server, prompts, NEW)
        once = time.monotonic() - started  # busy or not: by then the first of many are answered, and the last ones are not
        assert [a.tokens for a in said] == in_process(model, prompts)
        assert len(server.kernels()) == 1 and (torch.cuda.is_available() or server.kernels() == ["CPUWNA16LinearKernel"])
        assert abs(kl(server, model, items[0].ids)) < 1e-3
        inside = [p for child in psutil.Process().children() if child not in before for p in children(child)]
        under_way = threading.Event()
        broken = ThreadPoolExecutor(1).submit(one_after_another, server, under_way)
        assert under_way.wait(60)
        threading.Timer(once, next(p for p in inside if "Worker" in p.name()).kill).start()
        many = answers(server, prompts * 20, NEW, timeout=60)
        assert many[0].error is None and all(a.error for a in many[-20:])
        with pytest.raises(EngineFailed, match=r"error line|without \[DONE\]|cannot be reached|HTTP 5"):
            broken.result(60)
    assert gone(inside)


def one_after_another(server, under_way):
    """Streams until one breaks off: whenever the engine is killed, one is on its way."""
    while True:
        for _ in completion(server.url, server.model, [1], 1000, 600, ignore_eos=True):
            under_way.set()


@pytest.mark.skipif(available() is not None or not no_kernel, reason=str(available() or "there is a kernel here"))
def test_a_processor_without_a_kernel_for_4_bits():
    with pytest.raises(EngineRefused, match="dies at its first token: .*cpu_gemm_wna16"), serving(COMMITTED / "gptqmodel-gptq"):
        pass


@engine
def test_a_model_that_the_engine_refuses(tmp_path):
    """The columns of a group must be neighbours: the README says so, and what reads the file instead."""
    quantize_to(tmp_path / "ordered", BUNDLED, Gptq(desc_act=True), [range(5, 200)])
    before = {p.pid for p in psutil.process_iter()}
    with pytest.raises(EngineRefused, match=r"desc_act=True\) is no longer supported"), serving(tmp_path / "ordered"):
        pass
    assert gone([p for p in psutil.process_iter() if p.pid not in before and "VLLM" in p.name()])
