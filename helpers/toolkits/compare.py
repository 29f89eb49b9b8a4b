"""Artefacts of the same format, code by code, and ours against a toolkit's."""

from pathlib import Path

from safetensors.torch import load_file

from helpers.models.method import Format, Outcome


def same_codes(first: Path, second: Path) -> float:
    """Share of equal 4-bit codes in the packed `qweight` tensors of two artefacts.

    Raises ValueError if they do not hold the same packed tensors.
    """
    a, b = (load_file(folder / "model.safetensors") for folder in (first, second))
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
    theirs = load_file(folder / "model.safetensors")
    pairs = [(tensor, theirs[f"{name}.{end}"]) for name, q in outcome.codes.items()
             for end, tensor in form.pack(q).items() if end != "g_idx"]
    return sum(int((a != b).sum()) for a, b in pairs), sum(a.numel() for a, _ in pairs)
