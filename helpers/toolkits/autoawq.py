"""autoawq 0.2.9, archived: the reference that AWQ files in the wild come from. Runs in the originals' environment."""

import time
from pathlib import Path

from helpers.toolkits.process import Job, main

SETTINGS = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}


def load(source: str):
    """The model of folder `source` in autoawq's hands on a CPU: in fp16, as on a GPU, but over 100 MB in fp32, which is 4.5
    times as fast there. With its aliasing bug worked around: its search keeps a backup of the weights as {name: weight.cpu()}.
    On a GPU that copies; on a CPU it is the very same tensor, so the "backup" is scaled along with the weights and each
    candidate starts from the one before. Here the backup is a real copy: `Tensor.cpu` clones while the search runs.
    """
    import torch
    from awq import AutoAWQForCausalLM
    from awq.quantize.quantizer import AwqQuantizer

    search = AwqQuantizer._compute_best_scale

    def search_on_copies(self, *args, **kwargs):
        plain = torch.Tensor.cpu
        torch.Tensor.cpu = lambda tensor, *a, **k: plain(tensor, *a, **k).clone()
        try:
            return search(self, *args, **kwargs)
        finally:
            torch.Tensor.cpu = plain

    AwqQuantizer._compute_best_scale = search_on_copies
    dtype = torch.float16 if sum(p.stat().st_size for p in Path(source).glob("*.safetensors")) < 100e6 else torch.float32
    return AutoAWQForCausalLM.from_pretrained(source, device_map="cpu", torch_dtype=dtype, safetensors=True)


def quantize(job: Job, out: Path) -> dict:
    """AWQ by autoawq."""
    model = load(job.source)
    settings = {"q_group_size" if k == "group_size" else k: v for k, v in job.settings.items()}  # its own name for it
    started = time.perf_counter()
    # token lists go through untouched, without a tokenizer; one longer than max_calib_seq_len would be dropped without a word
    model.quantize(None, quant_config=SETTINGS | settings, calib_data=[list(t) for t in job.tokens],
                   max_calib_samples=len(job.tokens), max_calib_seq_len=max(map(len, job.tokens)))
    seconds = time.perf_counter() - started
    model.save_quantized(str(out), safetensors=True)
    return {"toolkit": "autoawq", "quantize_seconds": seconds}


if __name__ == "__main__":
    main(quantize, "autoawq")
