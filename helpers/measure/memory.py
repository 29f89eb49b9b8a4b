"""Memory: the most that loading, prefill and decode of a model hold, measured in a process of its own."""

import math
import os
import pickle
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from helpers.measure.child import enter
from helpers.measure.latency import greedy_tokens, synchronise
from helpers.measure.quality import vocabulary

T = TypeVar("T")


class Died(RuntimeError):
    """A process that did not finish: killed, out of memory, or ended by an error."""


def alone(work: Callable[..., T], *args) -> T:
    """work(*args) in a process of its own, which imported torch and, on a machine without a GPU, transformers before. All must
    be picklable: what a notebook defines is not.

    Raises Died naming the work and the signal, or the error, that ended it.
    """
    context = get_context("forkserver")  # fork alone would take our memory along, and our OpenMP threads would be missing
    # Seconds that each child is spared; not where there is a GPU: what asks for it here would keep the children from using it
    context.set_forkserver_preload(["torch"] if torch.cuda.is_available() else ["torch", "helpers.measure.warm"])
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=enter, args=(pickle.dumps((work, args)), theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        result, error = ours.recv()
    except EOFError:
        result, error = None, ""
    except BaseException:  # the reader interrupts
        child.kill()
        raise
    finally:
        ours.close()
        child.join()
    if error is not None:
        name = getattr(getattr(work, "func", work), "__qualname__", repr(work))
        why = f"signal {signal.Signals(-child.exitcode).name}" if child.exitcode < 0 else error or f"exit {child.exitcode}"
        raise Died(f"{name} in a process of its own was ended by {why}")
    return result


def _status(key: str) -> float:
    """A size of this process in bytes, from Linux; elsewhere NaN."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return math.nan
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), math.nan)


def held(device: torch.device | str = "cpu") -> float:
    """Bytes held now: of this process (resident, mapped files included), or of tensors on a GPU. NaN where it is not known."""
    return float(torch.cuda.memory_allocated(device)) if torch.device(device).type == "cuda" else _status("VmRSS")


def most_held(device: torch.device | str = "cpu") -> float:
    """The most bytes held since `forget_most`, or since the start if that could not forget."""
    return float(torch.cuda.max_memory_allocated(device)) if torch.device(device).type == "cuda" else _status("VmHWM")


def forget_most(device: torch.device | str = "cpu") -> bool:
    """Let `most_held` count from now; False where the system does not offer that (all but Linux, and some containers)."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return os.path.exists("/proc/self/status")


def peaks(load: Callable[[], nn.Module], prompt_tokens: int, new_tokens: int, device: str = "cpu") -> dict[str, float]:
    """{load_s; loaded, peak_load, peak_prefill, peak_decode in bytes} of the model that `load` brings to `device`.

    `loaded` is what is held after loading, the peaks the most during each phase; all less what was held before, by when a
    model of another size had answered: some MB of libraries may still count; on a GPU only tensors do. NaN where the system
    cannot say. Prompts are one sequence, greedy. Raises Died.
    """
    return alone(_peaks, load, prompt_tokens, new_tokens, device)


def _peaks(load: Callable[[], nn.Module], prompt_tokens: int, new_tokens: int, device: str) -> dict[str, float]:
    from helpers.measure.warm import answered

    answered(device)  # what the libraries take at their first call is not the model's
    before, known = held(device), forget_most(device)

    def most() -> float:
        peak = most_held(device) - before if known else math.nan
        forget_most(device)
        return peak

    started = time.perf_counter()
    model = load()
    synchronise(torch.device(device))
    found = {"load_s": time.perf_counter() - started, "loaded": held(device) - before, "peak_load": most()}
    ids = (torch.arange(prompt_tokens, device=device) % vocabulary(model))[None]
    steps = greedy_tokens(model, ids, new_tokens + 1)
    next(steps)
    found["peak_prefill"] = most()
    for _ in steps:
        pass
    return found | {"peak_decode": most()}
