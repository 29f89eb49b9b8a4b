"""Time of generation."""

import statistics
import time

import torch


@torch.inference_mode()
def tokens_per_second(model, new_tokens: int = 32, prompt_tokens: int = 16, repeats: int = 5) -> tuple[float, float]:
    """(median, fastest) tokens/s of greedy generation for one sequence, after a warm-up, synchronised on a GPU."""
    prompt = torch.arange(5, 5 + prompt_tokens, device=model.device)[None]
    speeds = []
    for _ in range(repeats + 1):
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        out = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0,
                             min_new_tokens=new_tokens, max_new_tokens=new_tokens)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        speeds.append((out.shape[1] - prompt_tokens) / (time.perf_counter() - started))
    return statistics.median(speeds[1:]), max(speeds[1:])
