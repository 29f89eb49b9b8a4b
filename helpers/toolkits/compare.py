"""Artefacts of the same format, code by code, and ours against a toolkit's."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from helpers.models.method import Format, Outcome


def all_tensors(folder: Path) -> dict[str, Tensor]:
    """Of all files of an artefact."""
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def same_codes(first: Path, second: Path) -> float:
    """Share of equal 4-bit codes in the packed `qweight` tensors of two artefacts.

    Raises ValueError if they do not hold the same packed tensors.
    """
    a, b = all_tensors(first), all_tensors(second)
    packed = sorted(k for k in a if k.endswith(".qweight"))
    if not packed or packed != sorted(k for k in b if k.endswith(".qweight")):
        raise ValueError(f"{first} and {second} do not hold the same packed linears")
    same = total = 0
    for name in packed:
        difference = a[name] ^ b[name]  # int32 words of eight codes
        for nibble in range(8):
            equal = (difference >> (4 * nibble)) & 0xF == 0
            same, total = same + int(equal.sum()), total + equal.numel()
    return same / total


def differing_words(outcome: Outcome, folder: Path, form: Format) -> tuple[int, int]:
    """(words that differ, words) of the packed codes, zeros and scales of an outcome and of a toolkit's artefact."""
    theirs = all_tensors(folder)
    pairs = [(tensor, theirs[f"{name}.{end}"]) for name, q in outcome.codes.items()
             for end, tensor in form.pack(q).items() if end != "g_idx"]
    return sum(int((a != b).sum()) for a, b in pairs), sum(a.numel() for a, _ in pairs)
