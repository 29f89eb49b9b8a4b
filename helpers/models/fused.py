"""Linears that engines fuse into one matrix, whose settings they then look up by the name of the whole."""

from collections.abc import Iterable

# vLLM's packed_modules_mapping, of its models with names as Llama's and DeepSeek's
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj"),
         "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa")}


def wholes(names: Iterable[str]) -> dict[str, list[str]]:
    """{name of the whole: its parts} of these linears, where all parts are among them."""
    known = dict.fromkeys(names)
    each = {f"{module}.{whole}": [f"{module}.{part}" for part in parts]
            for module in dict.fromkeys(n.rpartition(".")[0] for n in known) for whole, parts in FUSED.items()}
    return {whole: parts for whole, parts in each.items() if known.keys() >= set(parts)}


def exactly(name: str) -> str:
    """A rule of the engines for this linear, and no other."""
    return f"{name.replace('.', '[.]')}$"
