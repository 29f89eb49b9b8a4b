"""GPTQModel: GPTQ and AWQ on today's transformers. Runs as a process of its own (helpers/toolkits/process.py)."""

import time
from pathlib import Path

from helpers.toolkits.process import Job, main

DEFAULTS = {"bits": 4, "group_size": 128}


def keep_problems() -> dict:
    """From now on, what each module's GPTQ solver is given (W, H) and what it finds, to be saved at the end."""
    from gptqmodel.quantization.gptq import GPTQ

    kept, solve = {}, GPTQ.quantize

    def quantize_and_keep(self, *args, **kwargs):
        self.finalize_hessian()
        name = f"{len(kept) // 3:03}.{self.name}"  # in the order of solving; the name alone is the same in each block
        kept[f"{name}.W"], kept[f"{name}.H"] = self.module.weight.data.float().clone(), self.H.clone()
        result = solve(self, *args, **kwargs)
        kept[f"{name}.W_hat"] = result[0].float().clone()
        return result

    GPTQ.quantize = quantize_and_keep
    return kept


def quantize(job: Job, out: Path) -> dict:
    """GPTQ (symmetric, damping 0.05) or AWQ (asymmetric, as autoawq does) by GPTQModel, in bf16, on the GPU if
    there is one.

    Its AWQ keeps only the last batch where lengths differ, so all sequences must be equally long.
    """
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.config import AWQConfig, GPTQConfig
    from safetensors.torch import save_file

    if len({len(t) for t in job.tokens}) > 1:
        raise ValueError("tokens: GPTQModel needs calibration sequences of equal length, it drops the others in silence")
    settings = DEFAULTS | job.settings
    kept = keep_problems() if settings.pop("keep_problems", False) else {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, own, on_cpu = {
        # act_group_aware reorders columns by default; off, so that the file holds plain GPTQ
        "gptq": (GPTQConfig, {"sym": True, "desc_act": False, "act_group_aware": False}, BACKEND.AUTO),
        "awq": (AWQConfig, {"sym": False}, BACKEND.AWQ_TORCH)}[job.method]  # the only AWQ kernel it has on a CPU
    config = kind(**(own | settings))
    config.offload_to_disk = False
    backend = on_cpu if device == "cpu" else BACKEND.AUTO
    model = GPTQModel.load(job.source, config, device=device, dtype=torch.bfloat16)
    rows = [{"input_ids": list(t), "attention_mask": [1] * len(t)} for t in job.tokens]
    started = time.perf_counter()
    model.quantize(rows, batch_size=1, backend=backend)
    seconds = time.perf_counter() - started
    model.save(str(out))
    if kept:
        save_file({name: tensor.contiguous() for name, tensor in kept.items()}, out / "problems.safetensors")
    return {"toolkit": "gptqmodel", "quantize_seconds": seconds}


if __name__ == "__main__":
    main(quantize)
