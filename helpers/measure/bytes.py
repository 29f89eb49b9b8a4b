"""Bytes of a model: of its weights, its KV cache, of serving and of quantizing it, predicted from its shapes and a plan.

Files are measured too. What a process holds is measured in `helpers/measure/memory.py`.
"""

from bisect import bisect_right
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from helpers.files import weight_files
from helpers.models.checkpoint import format_for
from helpers.models.formats import ANY
from helpers.models.layers import blocks_of, linears
from helpers.models.method import Format, Method, Plan, PlanError
from helpers.models.source import lasting_buffers
from helpers.quantizers.affine import GroupSizeError

NOT_WEIGHTS = ("quant_state", "weight_format")  # what bitsandbytes notes of a linear, some hundred bytes
CHUNK = 2048  # tokens that engines take through the model at once (vLLM's max_num_batched_tokens)
SHARD = 4 << 30  # what `checkpoint.Writer` holds before it writes


def _shell(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):  # shapes without memory
        return AutoModelForCausalLM.from_config(config)


def _linear_bytes(model: nn.Module, plan: Plan | Method | None, form: Format | None) -> dict[str, int]:
    """{linear: bytes of its weight as a file has it}: fp16 where the plan or the format leaves it. Raises PlanError."""
    found = {name: 2 * m.weight.numel() for name, m in linears(model)}
    if plan is None or all(m.stays for m in Plan.of(plan).methods()):
        return found
    form = format_for(plan := Plan.of(plan), form)
    for name, m in linears(model):
        if not (method := plan.at(name)).stays:
            with suppress(GroupSizeError):
                found[name] = weight_bytes(form, m.out_features, m.in_features, method)
    return found


def weight_bytes(form: Format, rows: int, columns: int, method: Method) -> int:
    """Bytes of a linear's weight in a file of this format. Raises GroupSizeError where it cannot hold it."""
    return sum(dtype.itemsize * prod(shape) for end, (dtype, shape) in form.specs(rows, columns, method).items()
               if ANY not in shape and end not in NOT_WEIGHTS)


def _weights(model: PreTrainedModel, plan: Plan | Method | None, form: Format | None) -> int:
    rest = model.num_parameters() - sum(m.weight.numel() for _, m in linears(model))
    buffers = sum(b.numel() * b.element_size() for b in lasting_buffers(model).values())
    return sum(_linear_bytes(model, plan, form).values()) + 2 * rest + buffers


def predicted_bytes(config: PretrainedConfig, plan: Plan | Method | None = None, form: Format | None = None) -> int:
    """Bytes of all weights of a model of this config in the format of a plan (None: fp16), the rest in fp16.

    Linears that the format cannot hold count in fp16, as they are written. Counts tensors alone: not the file's header, and
    not bitsandbytes' notes. Raises PlanError for a plan without a format.
    """
    return _weights(_shell(config), plan, form)


def bits_a_weight(config: PretrainedConfig, plan: Plan | Method, form: Format | None = None) -> float:
    """Bits for each weight of the linears inside the blocks: codes, scales, zero points and all else that the format has.

    Linears that stay are in it, with 16. Raises PlanError for a plan without a format.
    """
    model = _shell(config)
    return 8 * sum(_linear_bytes(model, plan, form).values()) / sum(m.weight.numel() for _, m in linears(model))


def weights_inside(config: PretrainedConfig) -> int:
    """How many weights the linears inside the blocks have."""
    return sum(m.weight.numel() for _, m in linears(_shell(config)))


def measured_bytes(folder: Path) -> int:
    """Bytes of the tensors in a folder's safetensors; the file headers and bitsandbytes' notes left out."""
    total = 0
    for path in weight_files(folder):
        with safe_open(path, "pt") as f:
            for name in f.keys():  # noqa: SIM118  (safe_open is no mapping)
                tensor = f.get_tensor(name)
                total += 0 if any(i in name for i in NOT_WEIGHTS) else tensor.numel() * tensor.element_size()
    return total


def kv_bytes(config: PretrainedConfig, context: int, batch: int = 1, bytes_each: int = 2) -> int:
    """Bytes of the keys and values of `batch` sequences of `context` tokens, in every layer.

    An upper bound where layers keep less: those with a sliding window and those with linear attention are counted as if they
    kept every token. Multi-head latent attention (`kv_lora_rank`) keeps one latent vector and one rotary key a token.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    latent = getattr(text, "kv_lora_rank", None)
    width = latent + text.qk_rope_head_dim if latent else 2 * heads * head_dim
    return text.num_hidden_layers * width * context * batch * bytes_each


@dataclass(frozen=True)
class Fit:
    """Whether a model and its cache fit a GPU: bytes of each part, and the longest context that would fit."""

    weights: int
    kv: int
    activations: int
    limit: int
    most_context: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.activations

    @property
    def fits(self) -> bool:
        return self.total <= self.limit

    @property
    def share(self) -> float:
        """Of what there is."""
        return self.total / self.limit

    def __str__(self) -> str:
        weights, kv, activations, total, limit = (f"{n / 2**30:.2f}" for n in (
            self.weights, self.kv, self.activations, self.total, self.limit))
        return (f"{weights} of weights + {kv} of KV cache + {activations} of activations = {total} GiB, which "
                f"{'fits' if self.fits else 'does not fit'} {limit}; longest context {self.most_context:,} tokens")


def fits(config: PretrainedConfig, plan: Plan | Method | int | None, gpu_gb: float, context: int, batch: int = 1,
         form: Format | None = None, reserve: float = 0.1) -> Fit:
    """Whether a plan's file (None: fp16; a number: weights of so many bytes) can be served on a GPU of `gpu_gb` x 2^30 bytes.

    A share `reserve` is left to the CUDA context, workspaces and fragmentation (vLLM's gpu_memory_utilization is 1 - reserve).

    Activations, in fp16, are those of one chunk of prefill, t = min(2048, batch x context) tokens: 2 t (2 hidden + 3 widest)
    for the residual stream, a norm's output, and gate, up and their product; and logits of each last position, 6 batch x
    vocabulary, with their copy in fp32. `most_context` goes by memory alone: what the model was trained for may be less.
    Raises PlanError for a plan without a format.
    """
    model, text = _shell(config), config.get_text_config()
    weights, limit = plan if isinstance(plan, int) else _weights(model, plan, form), int(gpu_gb * 2**30 * (1 - reserve))
    a_token = 2 * (2 * text.hidden_size + 3 * max(m.out_features for _, m in linears(model)))

    def parts(tokens: int) -> tuple[int, int, int]:
        return (weights, kv_bytes(config, tokens, batch),
                a_token * min(CHUNK, batch * tokens) + 6 * batch * text.vocab_size)

    beyond = max(1, limit // kv_bytes(config, 1, batch) + 2)
    longest = bisect_right(range(beyond), limit, key=lambda tokens: sum(parts(tokens))) - 1
    return Fit(*parts(context), limit, max(0, longest))


def quantizing_bytes(config: PretrainedConfig, plan: Plan | Method, tokens: int) -> dict[str, int]:
    """{term: bytes} of what `quantize_to` holds in fp32 at its peak, with this many tokens of calibration; their sum is it.

    Counts tensors, at whichever moment of whichever block is the fullest, but for the grids' own (a few percent, more where
    blocks are narrow). A bound for methods whose codes take less than 32 bits (nf4, int8). Raises PlanError for a plan
    without a format, or with another library's arithmetic.
    """
    plan, model, moments, written = Plan.of(plan), _shell(config), [], 0
    if foreign := [str(m) for m in plan.methods() if m.reference]:
        raise PlanError(f"{', '.join(foreign)}: what the toolkits' own arithmetic holds is not known")
    (path, blocks), packed = blocks_of(model), _linear_bytes(model, plan, None)
    for i, block in enumerate(blocks):
        moments += [{"block": 4 * _size(block)} | m | {"artefact so far": written}
                    for m in _moments(f"{path}.{i}", block, plan, tokens, config.get_text_config().hidden_size)]
        own = {n: m.weight.numel() for n, m in linears(model) if n.startswith(f"{path}.{i}.")}
        written += sum(packed[n] for n in own) + 2 * (_size(block) - sum(own.values()))
        written = 0 if written > SHARD else written
    outside = model.num_parameters() - _size(blocks)
    moments.append({"embeddings and head, in fp32 and fp16": 6 * outside, "artefact so far": written})
    return {term: n for term, n in max(moments, key=lambda m: sum(m.values())).items() if n}


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _moments(name: str, block: nn.Module, plan: Plan, tokens: int, width: int) -> list[dict[str, int]]:
    """What is held beside the block when each of its linears is quantized, and when its tokens go on to the next one."""
    groups: dict[tuple, list[int]] = defaultdict(list)  # outputs of linears that may go through `solve` as one
    for n, m in block.named_modules():
        if isinstance(m, nn.Linear) and not (method := plan.at(f"{name}.{n}")).stays:
            together = n.rpartition(".")[0] if method.stacks or method.prepares else n
            groups[together, m.in_features, method].append(m.out_features)
    if not any(method.keeps for *_, method in groups):
        tokens = 0
    held = plan.inputs == "group" and any(method.calibrated for *_, method in groups)
    through = 4 * 2 * tokens * width
    kept = sum(4 * n * n * (2 if method.prepares else 1) for _, n, method in groups  # what was scaled is a copy
               if method.prepares or (method.calibrated and not held))
    moments, codes = [], 0
    for (_, n, method), outputs in groups.items():
        W, largest = 4 * n * sum(outputs), 4 * n * max(outputs)
        state = {"its inputs": 4 * tokens * width, "held before a linear": 4 * tokens * (2 * width + n)
                 } if held else {"its inputs and outputs": through}
        if method.prepares:
            moments.append({"its inputs": 4 * tokens * width, "Gram matrices": kept,
                            "scales and thresholds tried": max(4 * W, 6 * largest)})
        if method.calibrated:
            gram = {"Gram matrices": kept + (4 * n * n if held else 0), "codes of linears before": codes}
            moments += [state | gram | {"damped, its factor, and a test of it": 15 * n * n, "weights at work": W},
                        state | gram | {"its factor": 4 * n * n, "weights, errors, codes at work": 6 * W}]
        else:
            moments.append(state | {"Gram matrices": kept, "codes": codes + W, "weight at work": 3 * largest})
        codes += W
    widest = max((max(outputs) for outputs in groups.values()), default=0)
    at_once = min(tokens, max((m.at_once for *_, m in groups), default=0))
    return moments + ([] if held else [{"its inputs and outputs": through, "Gram matrices": kept, "codes": codes,
                                        "activations of a batch": 4 * at_once * (2 * width + 3 * widest)}])
