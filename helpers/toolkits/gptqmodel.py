"""GPTQModel: GPTQ and AWQ on today's transformers. Runs as a process of its own (helpers/toolkits/process.py)."""

from pathlib import Path

from helpers.toolkits.process import Job, main

DEFAULTS = {"bits": 4, "group_size": 128}


def quantize(job: Job, out: Path) -> dict:
    """GPTQ (symmetric, damping 0.05) or AWQ (asymmetric, as autoawq does) by GPTQModel, in bf16, on the GPU if
    there is one.

    Its AWQ keeps only the last batch where lengths differ, so all sequences must be equally long.
    """
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.config import AWQConfig, GPTQConfig

    if len({len(t) for t in job.tokens}) > 1:
        raise ValueError("tokens: GPTQModel needs calibration sequences of equal length, it drops the others in silence")
    settings = DEFAULTS | job.settings
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = BACKEND.AUTO
    if job.method == "gptq":
        # act_group_aware reorders columns by default; off, so that the file holds plain GPTQ
        config = GPTQConfig(**({"sym": True, "desc_act": False, "act_group_aware": False} | settings))
    else:
        config = AWQConfig(**({"sym": False} | settings))
        if device == "cpu":
            backend = BACKEND.AWQ_TORCH  # the only AWQ kernel it has there
    config.offload_to_disk = False
    model = GPTQModel.load(job.source, config, device=device, dtype=torch.bfloat16)
    rows = [{"input_ids": list(t), "attention_mask": [1] * len(t)} for t in job.tokens]
    model.quantize(rows, batch_size=1, backend=backend)
    model.save(str(out))
    return {"toolkit": "gptqmodel"}


if __name__ == "__main__":
    main(quantize)
