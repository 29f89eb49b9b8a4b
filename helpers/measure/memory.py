"""Bytes of a model's weights: predicted from its shapes, and measured in its files."""

import math
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PretrainedConfig

from helpers.models.layers import linears

NF4_BLOCK, NESTED_BLOCK = 64, 256


def _linear_bytes(rows: int, columns: int, method: str, group_size: int) -> int:
    """Bytes that one linear [rows, columns] takes on disk in the format of a method."""
    weights, groups = rows * columns, math.ceil(columns / group_size)
    packed, scales, zeros = weights // 2, 2 * groups * rows, groups * rows // 2
    if method == "gptq":
        return packed + scales + zeros + 4 * columns  # g_idx: the group of each column, int32
    if method == "awq":
        return packed + scales + zeros
    if method == "nf4":  # double quantization: one byte per block of 64, one fp32 per 256 of those, and two maps
        blocks = math.ceil(weights / NF4_BLOCK)
        return math.ceil(weights / 2) + blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + 4 * (16 + 256)
    if method == "int8":
        return weights + 4 * rows
    raise ValueError(f"method: expected fp16, int8, nf4, gptq or awq, got {method!r}")


def predicted_bytes(config: PretrainedConfig, method: str, group_size: int = 128) -> int:
    """Bytes of all weights of a model of this config, its block linears in `method`, the rest in fp16.

    Counts tensors alone: not the file's header, and not the few hundred bytes of bitsandbytes' settings per linear.
    """
    with torch.device("meta"):  # shapes without memory
        model = AutoModelForCausalLM.from_config(config)
    total = 2 * model.num_parameters()
    if method == "fp16":
        return total
    return total + sum(_linear_bytes(*m.weight.shape, method, group_size) - 2 * m.weight.numel() for _, m in linears(model))


def measured_bytes(folder: Path, ignore: tuple[str, ...] = ("quant_state", "weight_format")) -> int:
    """Bytes of the tensors in a folder's safetensors, the file headers left out."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as f:
            for name in f.keys():  # noqa: SIM118  (safe_open is no mapping)
                tensor = f.get_tensor(name)
                total += 0 if any(i in name for i in ignore) else tensor.numel() * tensor.element_size()
    return total
