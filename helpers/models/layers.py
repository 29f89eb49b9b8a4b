"""The linears of a model: which ones are quantized, in which order, what scales fold into; by a table of architectures."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn


class Fold(NamedTuple):
    """Linears that read one input and can share a scale for its channels, and what the scale is folded into."""

    before: str  # a norm, or a linear whose outputs become this input
    linears: tuple[str, ...]
    watched: str  # the module whose output autoawq's search looks at


class Architecture(NamedTuple):
    """Where the blocks are; groups of linears that share an input, in the order of the forward pass; scales to fold."""

    blocks: str
    groups: tuple[tuple[str, ...], ...]
    folds: tuple[Fold, ...]


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA = Architecture(
    "model.layers",
    (("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"), ("self_attn.o_proj",), ("mlp.up_proj", "mlp.gate_proj"),
     ("mlp.down_proj",)),
    (Fold("input_layernorm", _QKV, "self_attn"), Fold("self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj"),
     Fold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp"),
     Fold("mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj")))
_OPT = Architecture(
    "model.decoder.layers",
    (("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"), ("self_attn.out_proj",), ("fc1",), ("fc2",)),
    (Fold("self_attn_layer_norm", _QKV, "self_attn"), Fold("self_attn.v_proj", ("self_attn.out_proj",), "self_attn.out_proj"),
     Fold("final_layer_norm", ("fc1",), "fc1"), Fold("fc1", ("fc2",), "fc2")))

ARCHITECTURES = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "opt": _OPT}


class UnknownArchitecture(ValueError):
    """A model type that is not in the table."""


def architecture(model: nn.Module) -> Architecture:
    """The table's entry for a model; raises UnknownArchitecture."""
    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        raise UnknownArchitecture(f"model type {kind!r} is not one of {sorted(ARCHITECTURES)}; add its module names to "
                                  "helpers/models/layers.py")
    return ARCHITECTURES[kind]


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(name, module) of each linear inside the blocks; the embeddings and the output head are not among them."""
    path, groups, _ = architecture(model)
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
    path = architecture(model).blocks
    for block in model.get_submodule(path):
        for norm, readers in ((block.input_layernorm, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                              (block.post_attention_layernorm, ("mlp.gate_proj", "mlp.up_proj"))):
            norm.weight[chosen] *= factor
            for name in readers:
                block.get_submodule(name).weight[:, chosen] /= factor
    return model
