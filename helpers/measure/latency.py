"""Time: of generation, and of one side beside another."""

import statistics
import time

import pandas as pd
import torch

from helpers.measure.answers import greedy


@torch.inference_mode()
def tokens_per_second(model, new_tokens: int = 32, prompt_tokens: int = 16, repeats: int = 5) -> tuple[float, float]:
    """(median, fastest) tokens/s of greedy generation for one sequence, after a warm-up, synchronised on a GPU."""
    prompt = torch.arange(5, 5 + prompt_tokens, device=model.device)[None]
    speeds = []
    for _ in range(repeats + 1):
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        out = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt),
                             generation_config=greedy(new_tokens, min_new_tokens=new_tokens, pad_token_id=0))
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        speeds.append((out.shape[1] - prompt_tokens) / (time.perf_counter() - started))
    return statistics.median(speeds[1:]), max(speeds[1:])


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
