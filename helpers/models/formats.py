"""The file formats of the toolkits: GPTQ (version 1 and 2), AWQ GEMM, bitsandbytes NF4 and int8.

Each knows the tensors of a linear (so the size of any model follows from its config), their packing, and the settings.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from helpers.models.fused import exactly, wholes
from helpers.models.method import Codes, Plan
from helpers.quantizers import packing
from helpers.quantizers.affine import GroupSizeError, QParams, Quantized
from helpers.quantizers.nf4 import (
    NESTED_BLOCK,
    NF4,
    DoubleQuantized,
    codebook,
    dequantize_absmax,
    dynamic_map,
)

STATE = "weight.quant_state.bitsandbytes__nf4"
ANY = -1  # a size that is not known beforehand
Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class FormatError(ValueError):
    """Something that a format cannot hold, or a tensor of a file with values that it cannot have."""


class Stored(NamedTuple):
    """What the settings of a file say of a linear."""

    bits: int = 4
    group_size: int = 128
    sym: bool = False
    desc_act: bool = True


def group_count(columns: int, group_size: int) -> int:
    """Groups in a row; raises GroupSizeError if they do not fill it."""
    width = columns if group_size == -1 else group_size
    if width < 1 or columns % width:
        raise GroupSizeError(f"group_size {group_size} does not divide {columns} inputs")
    return columns // width


def in_words(n: int, bits: int, what: str) -> int:
    """32-bit words that n codes fill; raises GroupSizeError if they do not fill whole ones."""
    if n % (period := 32 // gcd(bits, 32)):
        raise GroupSizeError(f"{n} {what} are no multiple of {period}, as codes of {bits} bits in 32-bit words need")
    return n * bits // 32


def finite(name: str, t: Tensor) -> Tensor:
    if not torch.isfinite(t).all():
        raise FormatError(f"{name} has values that are NaN or infinite")
    return t


def _read_grid(tensors: Mapping[str, Tensor], codes: Tensor, zeros: Tensor, g_idx: Tensor, method: Stored) -> Quantized:
    """Codes with their grid, when the values are such as the settings allow."""
    scale, middle = finite("scales", tensors["scales"]).T.float().contiguous(), 2 ** (method.bits - 1)
    # a symmetric grid has a step more below zero than above: AutoRound turns it to the side that needs it
    if not method.sym and (scale < 0).any():
        raise FormatError("scales has values below zero")
    if method.sym and (zeros != middle).any():
        raise FormatError(f"qzeros has zero points other than {middle}, but the settings say sym")
    in_order = torch.arange(codes.shape[1]) // (codes.shape[1] // scale.shape[1])
    if g_idx.min() < 0 or g_idx.max() >= scale.shape[1]:
        raise FormatError(f"g_idx has values outside of the {scale.shape[1]} groups")
    if not method.desc_act and not torch.equal(g_idx, in_order):
        raise FormatError("g_idx does not name neighbouring columns, but the settings say desc_act false")
    return Quantized(codes, QParams(scale, zeros.float(), 2**method.bits - 1), g_idx)


@dataclass(frozen=True)
class GptqFormat:
    """GPTQ: `qweight` and `qzeros` in 32-bit words, fp16 `scales`, and the group of each column. Version 1 stores zero - 1."""

    name: str
    v1: bool
    mixes = True  # bits and groups may differ between linears (`dynamic`: GPTQModel and vLLM read it, transformers does not)

    def specs(self, rows: int, columns: int, method: Any) -> Specs:
        groups = group_count(columns, method.group_size)
        return {"qweight": (torch.int32, (in_words(columns, method.bits, "inputs"), rows)),
                "qzeros": (torch.int32, (groups, in_words(rows, method.bits, "outputs"))),
                "scales": (torch.float16, (groups, rows)), "g_idx": (torch.int32, (columns,))}

    def pack(self, q: Codes) -> dict[str, Tensor]:
        zeros = q.grid.zero_point.to(torch.int32)
        return {"qweight": packing.pack_gptq(q.codes, q.bits), "qzeros": packing.pack_gptq_zeros(zeros, q.bits, self.v1),
                "scales": q.grid.scale.T.half().contiguous(), "g_idx": q.g_idx.to(torch.int32)}

    def unpack(self, tensors: Mapping[str, Tensor], method: Stored) -> Quantized:
        codes = packing.unpack_gptq(tensors["qweight"], method.bits)
        zeros = packing.unpack_gptq_zeros(tensors["qzeros"], method.bits, self.v1)
        return _read_grid(tensors, codes, zeros, tensors["g_idx"].long(), method)

    def reads(self, settings: Mapping) -> bool:
        return settings.get("quant_method") == "gptq" and settings.get("checkpoint_format", "gptq") == self.name

    def settings(self, plan: Plan, left: Sequence[str], quantized: Sequence[str], apart: Sequence[str] = ()) -> dict:
        main = next(m for m in plan.methods() if not m.stays)
        said = {m: {k: getattr(m, k, False) for k in ("bits", "group_size", "sym", "desc_act")} for m in plan.methods()}
        dynamic = {f"-:{exactly(n)}": {} for n in (*left, *wholes(left))}
        dynamic |= {f"+:{exactly(whole)}": said[m] for whole, (first, *others) in wholes(quantized).items()
                    if (m := plan.at(first)) != plan.at(whole) and all(plan.at(n) == m for n in others)}
        dynamic |= {f"+:.*(?:{pattern}).*": said[m] for pattern, m in plan.rules if not m.stays}
        return said[main] | {
            "quant_method": "gptq", "checkpoint_format": self.name, "damp_percent": getattr(main, "damp_percent", 0.01),
            "true_sequential": plan.inputs == "group", "lm_head": False, "static_groups": False} | (
            {"modules_in_block_to_quantize": [list(quantized)]} if left else {}) | ({"dynamic": dynamic} if dynamic else {})


@dataclass(frozen=True)
class AwqFormat:
    """AWQ GEMM: 4 bits, neighbouring outputs in a word in the order of its GPU kernel, one group size for all linears."""

    name = "awq"
    mixes = False

    def specs(self, rows: int, columns: int, method: Any) -> Specs:
        groups, words = group_count(columns, method.group_size), in_words(rows, 4, "outputs")
        return {"qweight": (torch.int32, (columns, words)), "qzeros": (torch.int32, (groups, words)),
                "scales": (torch.float16, (groups, rows))}

    def pack(self, q: Codes) -> dict[str, Tensor]:
        if q.bits != 4 or (q.g_idx.diff() < 0).any():
            raise FormatError("the AWQ format holds 4 bits and groups of neighbouring columns; write gptq or gptq_v2")
        zeros = q.grid.zero_point.to(torch.int32)
        return {"qweight": packing.pack_awq(q.codes), "qzeros": packing.pack_awq(zeros.T.contiguous().T),
                "scales": q.grid.scale.T.half().contiguous()}

    def unpack(self, tensors: Mapping[str, Tensor], method: Stored) -> Quantized:
        codes, zeros = packing.unpack_awq(tensors["qweight"]), packing.unpack_awq(tensors["qzeros"])
        g_idx = torch.arange(codes.shape[1]) // (codes.shape[1] // tensors["scales"].shape[0])
        return _read_grid(tensors, codes, zeros, g_idx, method._replace(sym=False))

    def reads(self, settings: Mapping) -> bool:
        if settings.get("quant_method") != "awq":
            return False
        if settings.get("version", "gemm").lower() != "gemm" or not settings.get("zero_point") or settings.get("bits") != 4:
            raise FormatError("quantization_config: of AWQ files only version gemm with zero points and 4 bits is known")
        return True

    def settings(self, plan: Plan, left: Sequence[str], quantized: Sequence[str], apart: Sequence[str] = ()) -> dict:
        main = next(m for m in plan.methods() if not m.stays)
        return {"bits": 4, "group_size": main.group_size, "quant_method": "awq", "version": "gemm", "zero_point": True,
                "modules_to_not_convert": [*apart, *left] or None}


@dataclass(frozen=True)
class BitsAndBytes:
    """What bitsandbytes' two formats have in common: the settings."""

    def reads(self, settings: Mapping) -> bool:
        return settings.get("quant_method") == "bitsandbytes" and all(
            settings.get(k) == v for k, v in self.own.items() if "compute" not in k)

    def settings(self, plan: Plan, left: Sequence[str], quantized: Sequence[str], apart: Sequence[str] = ()) -> dict:
        return {"quant_method": "bitsandbytes", **self.own, "llm_int8_skip_modules": ["lm_head", *apart, *left]}


@dataclass(frozen=True)
class Nf4Format(BitsAndBytes):
    """bitsandbytes NF4 with double quantization: two codes a byte, absmax in 8 bits, two maps and a JSON of settings."""

    name = "nf4"
    mixes = False
    own = {"load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",  # noqa: RUF012
           "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "uint8", "bnb_4bit_compute_dtype": "bfloat16"}

    def specs(self, rows: int, columns: int, method: Any) -> Specs:
        blocks = ceil(rows * columns / 64)
        return {"weight": (torch.uint8, (ceil(rows * columns / 2), 1)), "weight.absmax": (torch.uint8, (blocks,)),
                "weight.nested_absmax": (torch.float32, (ceil(blocks / NESTED_BLOCK),)),
                "weight.quant_map": (torch.float32, (16,)), "weight.nested_quant_map": (torch.float32, (256,)),
                STATE: (torch.uint8, (ANY,))}

    def pack(self, q: Codes) -> dict[str, Tensor]:
        state = {"quant_type": "nf4", "blocksize": q.block_size, "dtype": "float16", "shape": list(q.shape),
                 "nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": q.double.offset.item()}
        return {"weight": q.packed[:, None], "weight.absmax": q.double.codes, "weight.nested_absmax": q.double.absmax,
                "weight.quant_map": codebook().clone(), "weight.nested_quant_map": dynamic_map().clone(),
                STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}

    def unpack(self, tensors: Mapping[str, Tensor], method: Stored) -> NF4:
        if not torch.equal(tensors["weight.quant_map"], codebook()):
            raise FormatError("weight.quant_map is not NF4's")
        if not torch.equal(tensors["weight.nested_quant_map"], dynamic_map()):
            raise FormatError("weight.nested_quant_map is not bitsandbytes' dynamic map")
        try:
            state = json.loads(bytes(tensors[STATE].tolist()))
            offset, shape = torch.tensor(float(state["nested_offset"])), tuple(state["shape"])
            if (state["blocksize"], state["nested_blocksize"], state["quant_type"]) != (64, NESTED_BLOCK, "nf4"):
                raise FormatError(f"{STATE} has other blocks or another type than 64, {NESTED_BLOCK} and nf4")
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{STATE} cannot be read: {error}") from error
        double = DoubleQuantized(tensors["weight.absmax"], finite("weight.nested_absmax", tensors["weight.nested_absmax"]),
                                 finite(STATE, offset))
        return NF4(tensors["weight"].flatten(), dequantize_absmax(double), shape, 64, double)


class Int8(NamedTuple):
    """Signed codes and the largest magnitude of each row: w_hat = code * absmax / 127."""

    codes: Tensor
    absmax: Tensor

    def dequantize(self) -> Tensor:
        return self.codes * (self.absmax / 127)[:, None]

    def stored(self) -> "Int8":
        return self


@dataclass(frozen=True)
class Int8Format(BitsAndBytes):
    """bitsandbytes LLM.int8(): codes and `SCB`, the largest magnitude of each row."""

    name = "int8"
    mixes = False
    own = {"load_in_8bit": True, "load_in_4bit": False}  # noqa: RUF012

    def specs(self, rows: int, columns: int, method: Any) -> Specs:
        return {"weight": (torch.int8, (rows, columns)), "SCB": (torch.float32, (rows,)), "weight_format": (torch.uint8, ())}

    def pack(self, q: Codes) -> dict[str, Tensor]:
        return {"weight": q.codes, "SCB": q.absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}

    def unpack(self, tensors: Mapping[str, Tensor], method: Stored) -> Int8:
        if tensors["weight_format"].item():
            raise FormatError("weight_format is not 0, row by row")
        return Int8(tensors["weight"], finite("SCB", tensors["SCB"]))


GPTQ, GPTQ_V2 = GptqFormat("gptq", v1=True), GptqFormat("gptq_v2", v1=False)
AWQ, NF4_FORMAT, INT8 = AwqFormat(), Nf4Format(), Int8Format()
FORMATS = (GPTQ, GPTQ_V2, AWQ, NF4_FORMAT, INT8)
