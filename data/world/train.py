"""Train the bundled model: `python -m data.world.train` (over an hour on two cores; resumes where it was stopped).

Llama, 4 layers of width 256. Muon (Jordan 2024) for the matrices of the layers, AdamW for the rest. Stages lengthen the
rows: copying from context is learned first, on short random rows; long contexts come last.
"""

import argparse
import json
import os
import random
import time
from bisect import bisect
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.files import write_atomically
from helpers.models.source import DATA

from . import corpus, tasks, tokenizer

CONFIG = dict(vocab_size=tokenizer.VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
              num_attention_heads=8, num_key_value_heads=4, head_dim=32, max_position_embeddings=1024,
              tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)
STAGES = [  # (what, row length, rows, steps)
    ("lookback", 64, 96, 900), ("mixture", 128, 64, 1700), ("mixture", 256, 32, 1700), ("mixture", 1024, 8, 700)]
LR, WARMUP = 3e-3, 100


def batch(tok, step: int):
    """(ids, weights) of one step, [rows, length]; depends on nothing but the step, so a resumed run sees the same."""
    ends = list(accumulate(stage[-1] for stage in STAGES))
    what, length, rows, _ = STAGES[bisect(ends, step)]
    if what == "lookback":
        ids, weights = corpus.lookback_rows(np.random.default_rng(step), rows, length, tokenizer.VOCABULARY, step)
    else:
        drawn = corpus.rows(tok, length, seed=step)
        ids, weights = map(np.stack, zip(*(next(drawn) for _ in range(rows)), strict=True))
    return torch.from_numpy(ids), torch.from_numpy(weights)


def loss_of(model, ids, weights):
    """Weighted cross-entropy of the next token, nats."""
    logits = model.lm_head(model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]).float()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (nll * weights).sum() / weights.sum()


@torch.no_grad()
def probe(model, tok, task: str, count: int = 64) -> float:
    """Share of one-turn conversations whose whole answer is the most likely one, token by token."""
    rng, right = random.Random(99), 0
    held_out = {"held_out": True} if task in tasks.ARITHMETIC else {}
    for _ in range(count):
        *prompt, answer = (s for s, _ in corpus.conversation(tasks.TASKS[task](rng, **held_out)))
        p, a = (tok.encode(s, add_special_tokens=False).ids for s in ("".join(prompt), answer))
        guess = model(input_ids=torch.tensor([p + a])).logits[0, len(p) - 1:-1].argmax(-1)
        right += guess.tolist() == a
    return right / count


def optimizers(model):
    """Muon for the matrices inside the layers, AdamW for embeddings, head and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers" not in n]
    return [torch.optim.Muon(matrices, lr=LR, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=LR, betas=(0.9, 0.98), weight_decay=0.0)]


def rate(step: int, total: int) -> float:
    """Learning rate: a short rise, flat for two fifths of the steps, then linear to nothing."""
    return LR * min(1.0, (step + 1) / WARMUP, (1 - step / total) / 0.6)


def save_atomically(state: dict, path: Path) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def run(work: Path, out: Path) -> None:
    """Train through all stages, keeping a checkpoint and the curve in `work`; write the finished model to `out`."""
    torch.manual_seed(0)
    work.mkdir(parents=True, exist_ok=True)
    checkpoint, curve = work / "checkpoint.pt", work / "curve.jsonl"
    tok = tokenizer.build()
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    opts = optimizers(model)
    first, total, started = 0, sum(s[-1] for s in STAGES), time.time()
    if checkpoint.exists():
        state = torch.load(checkpoint)
        first = state["step"]
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["opts"], strict=True):
            opt.load_state_dict(saved)
        started -= state["seconds"]
    tokens = state["tokens"] if first else 0
    compiled = torch.compile(loss_of)  # one graph for each row length
    for step in tqdm(range(first, total), initial=first, total=total, unit="step"):
        ids, weights = batch(tok, step)
        # fused attention pays only for long rows on a CPU
        model.set_attn_implementation("sdpa" if ids.shape[1] > 512 else "eager")
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(model, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = rate(step, total)
            opt.step()
            opt.zero_grad()
        tokens += ids.numel()
        if (step + 1) % 200 == 0 or step + 1 == total:
            spent = {"step": step + 1, "tokens": tokens, "seconds": round(time.time() - started)}
            save_atomically(spent | {"model": model.state_dict(), "opts": [o.state_dict() for o in opts]}, checkpoint)
            row = spent | {"loss": loss.item()}
            row |= {t: probe(model, tok, t) for t in tasks.TASKS if t != "recall_far" or ids.shape[1] > 512}
            with curve.open("a") as f:
                f.write(json.dumps(row) + "\n")
    write_atomically(DATA / "results" / "training_curve.jsonl", curve.read_text())
    model.config.dtype = torch.float16
    model.set_attn_implementation("sdpa")
    model.half().save_pretrained(out)
    tokenizer.save(tok, out, CONFIG["max_position_embeddings"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("_build/train"))
    parser.add_argument("--out", type=Path, default=Path("data/model"))
    run(**vars(parser.parse_args()))
