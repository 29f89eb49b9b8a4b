"""What a library answers when it loads an artefact by its own loader on a CPU: token ids in, token ids out.

It runs in a process of its own (`ask` of helpers/toolkits/process.py), whose job's method is the library's name.
"""

import json
from collections.abc import Collection, Sequence
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from helpers.toolkits.process import Job, main


def settings(folder: Path) -> dict:
    """What config.json says of the quantization."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def in_gptqmodel(folder: Path) -> nn.Module:
    """With its kernels in plain torch, which stay nearest to exact dequantization."""
    torch.compiler.set_stance("force_eager")  # else it compiles them for each length of input
    from gptqmodel import BACKEND, GPTQModel

    own = {"gptq": BACKEND.GPTQ_TORCH, "awq": BACKEND.AWQ_TORCH}.get(settings(folder)["quant_method"], BACKEND.AUTO)
    return GPTQModel.load(str(folder), device="cpu", dtype=torch.float16, backend=own).model.float()


def in_autogptq(folder: Path) -> nn.Module:
    """With its kernel in plain torch, its mentions of a GPU pointed at the CPU. It repacks an AWQ file, in the folder."""
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
    from auto_gptq.modeling import _base

    _base.CUDA_0, torch.Tensor.cuda = torch.device("cpu"), lambda tensor, *_: tensor
    said, known = settings(folder), None
    if "bits" in said:  # by itself it reads quantize_config.json alone, and knows AWQ by GEMM in capitals
        known = BaseQuantizeConfig(**{k: said[k] for k in ("bits", "group_size", "sym", "desc_act") if k in said},
                                   awq_gemm_checkpoint=said.get("version", "").lower() == "gemm")
    plain = {"use_triton": False, "disable_exllama": True, "disable_exllamav2": True, "torch_dtype": torch.float32}
    return AutoGPTQForCausalLM.from_quantized(str(folder), device="cpu", quantize_config=known, **plain).model.float()


def in_autoawq(folder: Path) -> nn.Module:
    """Without its own kernels; on a CPU it would insist on Intel's."""
    from awq import AutoAWQForCausalLM
    from awq.models import base

    base.get_best_device = lambda: "cuda:0"
    return AutoAWQForCausalLM.from_quantized(str(folder), fuse_layers=False, device_map={"": "cpu"}, safetensors=True).model


LOADERS = {"transformers": lambda folder: import_module("helpers.toolkits.artefacts").reload(folder),
           "gptqmodel": in_gptqmodel, "auto-gptq": in_autogptq, "autoawq": in_autoawq}


@torch.inference_mode()
def greedy_answer(model: nn.Module, prompt: Sequence[int], new_tokens: int, ends: Collection[int]) -> list[int]:
    """The likeliest token, time after time: at most `new_tokens` of them, or up to one of `ends`, which is left out."""
    row, past, said = torch.tensor([prompt]), None, []
    while len(said) < new_tokens:
        out = model(input_ids=row, past_key_values=past, use_cache=True)
        past, token = out.past_key_values, int(out.logits[0, -1].argmax())
        if token in ends:
            break
        said.append(token)
        row = torch.tensor([[token]])
    return said


def answer(job: Job, out: Path) -> dict:
    """Whether it loads, the classes that compute the linears (the job's setting `linears`: their names), the answers (`ends`,
    `new_tokens`: as above), and the error where there are none."""
    found = {"loads": False, "kernel": "", "answers": [], "reason": ""}
    try:
        model, names = LOADERS[job.method](Path(job.source)), set(job.settings["linears"])
        kinds = {type(m).__name__ for name, m in model.named_modules() if name in names}
        found |= {"loads": True, "kernel": ", ".join(sorted(kinds))}
        found["answers"] = [greedy_answer(model, p, job.settings["new_tokens"], job.settings["ends"]) for p in job.tokens]
    except ModuleNotFoundError as error:
        found["reason"] = f"not installed: {error}"
    except Exception as error:  # whatever a library raises is the result here
        found["reason"] = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
    return found


if __name__ == "__main__":
    main(answer)
