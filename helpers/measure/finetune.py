"""Fine-tuning through a frozen base: what memory it takes, and what is lost if the base is in NF4 (QLoRA) and not in 16 bits.

Low-rank adapters: Hu et al. 2021 (LoRA, arXiv 2106.09685), section 4.1. On a 4-bit base: Dettmers et al. 2023 (QLoRA, arXiv
2305.14314), section 3, equation 5. LoRA is written here, as it is a dozen lines and what there is to learn.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from helpers.measure.bytes import predicted_bytes
from helpers.methods.keep import Keep
from helpers.methods.nf4 import Nf4
from helpers.models.layers import blocks_of, linears
from helpers.models.method import Method, Plan

BASES: Mapping[str, Method] = {"16 bits": Keep(), "NF4": Nf4()}
AT_WORK = ("activations at work", "weight dequantized")  # what every GPU needs for itself, however the rest is divided


def finetuning_bytes(config: PretrainedConfig, base: Plan | Method | None, rank: int | None, tokens: int, *,
                     adapter_bytes: int = 2) -> dict[str, int]:
    """{part: bytes} of a training step with Adam on `tokens` tokens at once, gradient checkpointing at each block.

    `rank` None trains every weight in mixed precision, 2 + 2 + 4 + 4 + 4 bytes each (ZeRO, arXiv 1910.02054, section 3.1).
    Else the base is frozen, in the format of `base` (None: 16 bits), and each linear inside the blocks has an adapter of rank
    x (inputs + outputs) numbers: they and their gradients in `adapter_bytes` each, Adam's two moments in fp32, as
    `paged_adamw_32bit` in QLoRA's qlora.py has them. Exact integers so far. Two parts are an upper bound from
    shapes, not measured: 2 bytes for each block's input (the "full recomputation" of arXiv 2205.05198);
    and, at work at one time, either one block, inputs and outputs of its linears in 16 bits and their gradients, twice over for
    norms, activation function and rotation, or logits, a 16-bit copy, two fp32 ones and a gradient of each.
    Not in it: the CUDA context, fragmentation. Raises ValueError for a quantized base that is to be trained.
    """
    if rank is None and base is not None:
        raise ValueError(f"{base}: codes have no gradient; full fine-tuning (rank None) is of 16-bit weights")
    with torch.device("meta"):  # shapes without memory
        model = AutoModelForCausalLM.from_config(config)
    text, inside = config.get_text_config(), [m for _, m in linears(model)]
    widest = max(sum(m.in_features + m.out_features for m in block.modules() if isinstance(m, nn.Linear))
                 for block in blocks_of(model)[1])
    if rank is None:
        n = model.num_parameters()
        held = {"weights": 2 * n, "gradients": 2 * n, "weights in fp32": 4 * n, "Adam's moments": 8 * n}
    else:
        n = sum(rank * (m.in_features + m.out_features) for m in inside)
        held = {"weights": predicted_bytes(config, base), "adapters": adapter_bytes * n, "gradients": adapter_bytes * n,
                "Adam's moments": 8 * n}
    return held | {"block inputs": 2 * tokens * text.hidden_size * text.num_hidden_layers,
                   "activations at work": tokens * max(8 * widest, 20 * text.vocab_size),
                   "weight dequantized": 0 if base is None else 2 * max(m.weight.numel() for m in inside)}


def fits_gpus(parts: Mapping[str, int], gpu_gb: float, gpus: int = 1, reserve: float = 0.1) -> bool:
    """Whether the parts of `finetuning_bytes` fit `gpus` GPUs of `gpu_gb` x 2^30 bytes, of each of which a share `reserve` is
    left to the CUDA context and fragmentation. Blocks are divided evenly; what is at work is on each GPU."""
    alone = sum(parts.get(name, 0) for name in AT_WORK)
    return (sum(parts.values()) - alone) / gpus + alone <= gpu_gb * 2**30 * (1 - reserve)


class LoRA(nn.Module):
    """y = x W^T + (x A^T) B^T alpha / rank: W (and a bias) frozen, A [rank, in] random, B [out, rank] zero, both fp32.

    W may be anything that maps inputs to outputs: 16 bits, W_hat of NF4, bitsandbytes' Linear4bit. A is uniform within
    1 / sqrt(in), as in peft; the paper says Gaussian. No dropout.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.base, self.scale, device = base.requires_grad_(False), alpha / rank, base.weight.device
        A = (2 * torch.rand(rank, base.in_features, generator=generator) - 1) / base.in_features**0.5
        self.A = nn.Parameter(A.to(device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x.to(self.A.dtype) @ self.A.T @ self.B.T * self.scale).to(x.dtype)


def with_adapters(model: PreTrainedModel, rank: int = 8, alpha: float = 16.0, seed: int = 0) -> PreTrainedModel:
    """A copy of a model with every linear inside the blocks wrapped, and nothing but the adapters trainable."""
    model, generator = copy.deepcopy(model).requires_grad_(False), torch.Generator().manual_seed(seed)
    for name, linear in list(linears(model)):
        model.set_submodule(name, LoRA(linear, rank, alpha, generator))
    return model


def losses(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The mean loss of each window, nats/token: [windows, tokens] to [windows]."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


class Run(NamedTuple):
    """`losses` [steps]: of each batch, before its step. `held_out` [points, windows]: after `at` [points] steps."""

    losses: np.ndarray
    at: np.ndarray
    held_out: np.ndarray


def train(model: PreTrainedModel, windows: Sequence[Sequence[int]], steps: int, seed: int, held_out: Sequence = (), *,
          batch: int = 4, rate: float = 5e-3, every: int = 10) -> Run:
    """Train what is trainable, in place: Adam, a constant rate, gradients clipped to 0.3 as in QLoRA (qlora.py).

    Windows are of one length; `seed` draws their order, anew when all were seen. Losses in nats/token. The held-out windows are
    judged before the first step, after each `every`, and after the last. Raises ValueError for less than one batch of windows.
    """
    if len(windows) < batch:
        raise ValueError(f"windows: expected at least a batch of {batch}, got {len(windows)}")
    ids, judged = (torch.tensor(w, dtype=torch.long, device=model.device) for w in (windows, held_out))
    generator, epoch = torch.Generator().manual_seed(seed), len(ids) // batch
    drawn = torch.cat([torch.randperm(len(ids), generator=generator)[:epoch * batch] for _ in range(-(-steps // epoch))])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, found, at, seen = torch.optim.Adam(trained, lr=rate), [], [], []
    for step, rows in enumerate([*drawn.view(-1, batch)[:steps], None]):
        if len(judged) and (step % every == 0 or rows is None):
            with torch.no_grad():
                seen.append(torch.cat([losses(model, part) for part in judged.split(2 * batch)]).cpu().numpy())
            at.append(step)
        if rows is not None:
            loss = losses(model, ids[rows.to(ids.device)]).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 0.3)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    return Run(np.array(found), np.array(at), np.array(seen))
