"""auto-gptq 0.7.1, archived: the reference that GPTQ files in the wild come from. Runs in the originals' environment."""

import time
from pathlib import Path

from helpers.toolkits.process import Job, main


def wrap(source: str, **settings):
    """The model of folder `source` in auto-gptq's hands, on a CPU.

    `from_pretrained` insists on CUDA, so the model is loaded first and handed over, with its two mentions of a GPU
    pointed at the CPU.
    """
    import torch
    from auto_gptq import BaseQuantizeConfig
    from auto_gptq.modeling import _base
    from auto_gptq.modeling.llama import LlamaGPTQForCausalLM
    from transformers import AutoModelForCausalLM

    _base.CUDA_0 = torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    settings = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, "damp_percent": 0.01} | settings
    model = AutoModelForCausalLM.from_pretrained(source, torch_dtype=torch.float32, use_safetensors=True)
    model.seqlen = model.config.max_position_embeddings
    return LlamaGPTQForCausalLM(model, False, BaseQuantizeConfig(**settings))


def rows(tokens) -> list[dict]:
    """Token sequences in the form that its `quantize` takes."""
    import torch

    return [{"input_ids": torch.tensor([t]), "attention_mask": torch.ones(1, len(t), dtype=torch.long)} for t in tokens]


def keep_problems() -> dict:
    """From now on, what each linear's solver is given (W, H) and what it finds, to be saved at the end."""
    from auto_gptq.quantization.gptq import GPTQ

    kept, solve = {}, GPTQ.fasterquant

    def solve_and_keep(self, *args, **kwargs):
        name = f"{len(kept) // 3:03}"
        kept[f"{name}.W"], kept[f"{name}.H"] = self.layer.weight.data.float().clone(), self.H.clone()
        result = solve(self, *args, **kwargs)
        kept[f"{name}.W_hat"] = self.layer.weight.data.float().clone()
        return result

    GPTQ.fasterquant = solve_and_keep
    return kept


def quantize(job: Job, out: Path) -> dict:
    """GPTQ by auto-gptq."""
    from safetensors.torch import save_file

    settings = dict(job.settings)
    kept = keep_problems() if settings.pop("keep_problems", False) else {}
    wrapped = wrap(job.source, **settings)
    started = time.perf_counter()
    wrapped.quantize(rows(job.tokens), cache_examples_on_gpu=False)
    seconds = time.perf_counter() - started
    wrapped.model.half()  # solved in fp32; what is not quantized is stored in fp16 like the source
    wrapped.save_quantized(str(out), use_safetensors=True)
    # transformers 5 looks for this name
    [weights] = out.glob("*.safetensors")
    weights.rename(out / "model.safetensors")
    if kept:
        save_file(kept, out / "problems.safetensors")
    return {"toolkit": "auto-gptq", "quantize_seconds": seconds}


if __name__ == "__main__":
    main(quantize, "auto-gptq")
