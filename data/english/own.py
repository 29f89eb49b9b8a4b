"""Texts that the small model wrote itself, to calibrate it without data: `python -m data.english.own [--device cuda]`.

As Liu et al. 2023 (LLM-QAT, arXiv 2305.17888, section 3.1) generate theirs: sampled token by token, at temperature 1, from the
start token on.
"""

import argparse
import json

import torch

from helpers.files import write_atomically
from helpers.models.source import DATA, load

COUNT, LENGTH = 64, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    model, tokenizer = load("small", device=parser.parse_args().device)
    torch.manual_seed(0)
    start = torch.full((COUNT, 1), tokenizer.bos_token_id, device=model.device)
    said = model.generate(start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, temperature=1.0,
                          max_new_tokens=LENGTH, min_new_tokens=LENGTH)
    texts = tokenizer.batch_decode(said, skip_special_tokens=True)
    write_atomically(DATA / "calibration" / "own.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in texts))


if __name__ == "__main__":
    main()
