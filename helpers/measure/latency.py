"""Time: to the first token (TTFT), between tokens (ITL), to the last (E2E), and of one side beside another.

vLLM calls ITL "TPOT"; GuideLLM's TPOT includes the first token. Everything here is greedy, in this process, without an engine.
"""

import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from helpers.measure.answers import greedy
from helpers.measure.quality import vocabulary


def synchronise(device: torch.device) -> None:
    """Wait for a GPU, which works on after the call has returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def tokens_per_second(model, new_tokens: int = 32, prompt_tokens: int = 16, repeats: int = 5) -> tuple[float, float]:
    """(median, fastest) tokens/s of greedy generation for one sequence, after a warm-up, synchronised on a GPU."""
    prompt = torch.arange(5, 5 + prompt_tokens, device=model.device)[None]
    speeds = []
    for _ in range(repeats + 1):
        synchronise(model.device)
        started = time.perf_counter()
        out = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt),
                             generation_config=greedy(new_tokens, min_new_tokens=new_tokens, pad_token_id=0))
        synchronise(model.device)
        speeds.append((out.shape[1] - prompt_tokens) / (time.perf_counter() - started))
    return statistics.median(speeds[1:]), max(speeds[1:])


@torch.inference_mode()
def greedy_tokens(model: nn.Module, ids: Tensor, new_tokens: int) -> Iterator[Tensor]:
    """The likeliest next tokens [batch, 1], one after another, of prompts of one length [batch, prompt].

    The prompt goes through at once (prefill), then each token alone with a KV cache (decode); no end token stops it.
    """
    cache = None
    for _ in range(new_tokens):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        yield ids


def generate_timed(model: nn.Module, ids: Tensor, new_tokens: int) -> np.ndarray:
    """Seconds after the start at which each new token of prompts [batch, prompt] was there: [new_tokens]."""
    synchronise(ids.device)
    started, there = time.perf_counter(), []
    for token in greedy_tokens(model, ids, new_tokens):
        synchronise(token.device)
        there.append(time.perf_counter() - started)
    return np.array(there)


def interleaved(models: Mapping[str, nn.Module], prompts: Sequence[Sequence[int]], new_tokens: int, warm_up: int = 2,
                progress: bool = False, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """{model: ttft_ms [n], itl_ms [n, new_tokens - 1], e2el_ms [n]} for n prompts, one sequence at a time.

    A round is one prompt through every model, in an order drawn anew, so that what the machine does meanwhile meets all
    alike and the n-th values of any two models are a pair. `warm_up` rounds go before and are dropped. Raises ValueError
    without prompts, or for an empty one.
    """
    if not prompts or not all(len(p) for p in prompts):
        raise ValueError("prompts: expected at least one, and none empty")
    rng, names = np.random.default_rng(seed), list(models)
    times: dict[str, list[np.ndarray]] = {name: [] for name in names}
    rounds = [prompts[i % len(prompts)] for i in range(warm_up)] + list(prompts)
    for prompt in tqdm(rounds, disable=not progress, desc="latency", leave=False):
        for i in rng.permutation(len(names)):
            ids = torch.tensor([list(prompt)], device=models[names[i]].device)
            times[names[i]].append(1000 * generate_timed(models[names[i]], ids, new_tokens))
    found = {name: np.stack(t[warm_up:]) for name, t in times.items()}
    return {name: {"ttft_ms": t[:, 0], "itl_ms": np.diff(t, axis=1), "e2el_ms": t[:, -1]} for name, t in found.items()}


def throughput(model: nn.Module, batches: Sequence[int], contexts: Sequence[int], new_tokens: int, repeats: int = 3
               ) -> dict[tuple[int, int], float]:
    """{(batch, context): tokens/s of decode}, the median of `repeats` after a warm-up.

    The sum over the batch; the first token, which is prefill's, is not in it. Raises ValueError for fewer than 2 new tokens.
    """
    if new_tokens < 2:
        raise ValueError(f"new_tokens: the first is prefill's, so expected at least 2, got {new_tokens}")
    found = {}
    for batch in batches:
        for context in contexts:
            ids = (torch.arange(batch * context, device=model.device) % vocabulary(model)).view(batch, context)
            times = [generate_timed(model, ids, new_tokens) for _ in range(repeats + 1)][1:]
            found[batch, context] = batch * (new_tokens - 1) / statistics.median(t[-1] - t[0] for t in times)
    return found


def kernels(model: nn.Module) -> dict[str, int]:
    """{what computes a linear: how many}, the output head left out: the kernel by the name of its module's class.

    torch's own is a plain product in the dtype of its weight ("Linear, float32"). A toolkit may still choose inside of its
    class: bitsandbytes does on the first forward pass.
    """
    head = model.get_output_embeddings()
    found = [m for m in model.modules() if hasattr(m, "in_features") and hasattr(m, "out_features") and m is not head]
    return dict(Counter(f"Linear, {str(m.weight.dtype).removeprefix('torch.')}" if type(m) is nn.Linear else type(m).__name__
                        for m in found))


def beside(part: dict[str, dict]) -> pd.DataFrame:
    """A table of a part of data/results/bench.json: seconds of each side, and how many times ours goes into the other's.

    That is the ratio of the medians; its range sets the fastest run of one side against the slowest of the other.
    """
    rows = {}
    for what, sides in part.items():
        sides = {name: s for name, s in sides.items() if isinstance(s, dict)}
        for name, s in sides.items():
            if name != "ours":
                ours = sides["ours"]
                rows[what, name] = {
                    "ours (s)": f"{ours['median']:.3g}", "theirs (s)": f"{s['median']:.3g}",
                    "theirs / ours": f"{s['median'] / ours['median']:.3g}",
                    "range": (f"{s['least'] / ours['most']:.3g} to {s['most'] / ours['least']:.3g}" if s["runs"] > 1
                              else "one run")}
    return pd.DataFrame(rows).T
