"""AutoRound: roundings and clippings learned by signed gradient descent, a block at a time. Runs as a process of its own."""

import os
import time
from pathlib import Path

from helpers.toolkits.process import Job, main

DEFAULTS = {"bits": 4, "group_size": 128, "sym": True, "iters": 200}


def quantize(job: Job, out: Path) -> dict:
    """AutoRound in auto-gptq's file format, which transformers, GPTQModel and vLLM read; on the GPU if there is one.

    It leaves out calibration sequences shorter than `seqlen`, so all must be equally long. Embeddings, head and norms are
    written in bf16.
    """
    os.environ |= {"HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # before the import that reads them
    import torch
    from auto_round import AutoRound

    if len({len(t) for t in job.tokens}) > 1:
        raise ValueError("tokens: AutoRound needs calibration sequences of equal length, it drops the others in silence")
    # compiling its blocks takes longer than rounding a small model
    rounder = AutoRound(job.source, tokenizer=None, scheme="W4A16", dataset=[torch.tensor([t]) for t in job.tokens],
                        nsamples=len(job.tokens), seqlen=len(job.tokens[0]), batch_size=8, enable_torch_compile=False,
                        device_map="cuda" if torch.cuda.is_available() else "cpu", **(DEFAULTS | job.settings))
    started = time.perf_counter()
    _, folder = rounder.quantize_and_save(str(out), format="auto_gptq")
    seconds = time.perf_counter() - started
    for path in Path(folder).iterdir():  # it makes a folder of its own inside
        path.rename(out / path.name)
    Path(folder).rmdir()
    return {"toolkit": "auto-round", "quantize_seconds": seconds}


if __name__ == "__main__":
    main(quantize, "auto-round")
