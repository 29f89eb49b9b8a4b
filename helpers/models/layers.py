"""The linears of a model: which ones are quantized, in which order, by a table of architectures."""

from collections.abc import Iterator

import torch
from torch import nn

_LLAMA = (("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"), ("self_attn.o_proj",),
          ("mlp.up_proj", "mlp.gate_proj"), ("mlp.down_proj",))
_OPT = (("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"), ("self_attn.out_proj",), ("fc1",), ("fc2",))

# model_type -> (path of the blocks, groups of linears that share an input, in the order of the forward pass)
ARCHITECTURES = {
    "llama": ("model.layers", _LLAMA), "mistral": ("model.layers", _LLAMA), "qwen2": ("model.layers", _LLAMA),
    "qwen3": ("model.layers", _LLAMA), "opt": ("model.decoder.layers", _OPT),
}


class UnknownArchitecture(ValueError):
    """A model type that is not in the table."""


def architecture(model: nn.Module) -> tuple[str, tuple[tuple[str, ...], ...]]:
    """(path of the blocks, groups of linears); raises UnknownArchitecture."""
    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        raise UnknownArchitecture(f"model type {kind!r} is not one of {sorted(ARCHITECTURES)}; add its module names to "
                                  "helpers/models/layers.py")
    return ARCHITECTURES[kind]


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(name, module) of each linear inside the blocks; the embeddings and the output head are not among them."""
    path, groups = architecture(model)
    for i in range(len(model.get_submodule(path))):
        for name in (name for group in groups for name in group):
            yield f"{path}.{i}.{name}", model.get_submodule(f"{path}.{i}.{name}")


@torch.no_grad()
def add_outliers(model: nn.Module, channels: int = 4, factor: float = 32.0, seed: int = 0) -> nn.Module:
    """Give a Llama-like model outlier channels without changing what it computes; changes and returns `model`.

    In each block, the same few channels leave both norms `factor` times larger, and the columns of the linears that
    read them are as much smaller. With a power of two no bit of the output changes in fp32.
    """
    chosen = torch.randperm(model.config.hidden_size, generator=torch.Generator().manual_seed(seed))[:channels]
    path, _ = architecture(model)
    for block in model.get_submodule(path):
        for norm, readers in ((block.input_layernorm, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                              (block.post_attention_layernorm, ("mlp.gate_proj", "mlp.up_proj"))):
            norm.weight[chosen] *= factor
            for name in readers:
                block.get_submodule(name).weight[:, chosen] /= factor
    return model
