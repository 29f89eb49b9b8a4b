"""Bytes of a model's weights: predicted from its shapes and a plan, and measured in its files."""

from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PretrainedConfig

from helpers.models.checkpoint import format_for
from helpers.models.formats import ANY
from helpers.models.layers import linears
from helpers.models.method import Format, Method, Plan
from helpers.models.source import lasting_buffers
from helpers.quantizers.affine import GroupSizeError

NOT_WEIGHTS = ("quant_state", "weight_format")  # what bitsandbytes notes of a linear, some hundred bytes


def predicted_bytes(config: PretrainedConfig, plan: Plan | Method | None = None, form: Format | None = None) -> int:
    """Bytes of all weights of a model of this config in the format of a plan (None: fp16), the rest in fp16.

    Linears that the format cannot hold count in fp16, as they are written. Counts tensors alone: not the file's header, and
    not bitsandbytes' notes. Raises PlanError for a plan without a format.
    """
    with torch.device("meta"):  # shapes without memory
        model = AutoModelForCausalLM.from_config(config)
    total = 2 * model.num_parameters() + sum(b.numel() * b.element_size() for b in lasting_buffers(model).values())
    if plan is None:
        return total
    plan = Plan.of(plan)
    if all(m.stays for m in plan.methods()):
        return total
    form = format_for(plan, form)
    for name, m in linears(model):
        if not (method := plan.at(name)).stays:
            try:
                specs = form.specs(m.out_features, m.in_features, method)
            except GroupSizeError:
                continue
            total += sum(dtype.itemsize * prod(shape) for end, (dtype, shape) in specs.items()
                         if ANY not in shape and end not in NOT_WEIGHTS) - 2 * m.weight.numel()
    return total


def measured_bytes(folder: Path) -> int:
    """Bytes of the tensors in a folder's safetensors; the file headers and bitsandbytes' notes left out."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as f:
            for name in f.keys():  # noqa: SIM118  (safe_open is no mapping)
                tensor = f.get_tensor(name)
                total += 0 if any(i in name for i in NOT_WEIGHTS) else tensor.numel() * tensor.element_size()
    return total
