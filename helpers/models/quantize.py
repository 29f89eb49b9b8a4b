"""A whole model through one method, simulated: weights are replaced by their reconstruction, in the model's dtype."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from helpers.models.layers import linears
from helpers.quantizers.affine import GroupSizeError, round_to_nearest


@torch.no_grad()
def with_weights(model: nn.Module, transform: Callable[[Tensor], Tensor]) -> tuple[nn.Module, list[str]]:
    """A copy of `model` whose linears hold transform(W), and the names of those left alone (no group size fits)."""
    changed, skipped = copy.deepcopy(model), []
    for name, linear in linears(changed):
        try:
            linear.weight.copy_(transform(linear.weight))
        except GroupSizeError:
            skipped.append(name)
    return changed, skipped


def rtn(model: nn.Module, bits: int, group_size: int = 128, sym: bool = False) -> tuple[nn.Module, list[str]]:
    """`with_weights` by rounding to nearest; embeddings and output head stay as they are."""
    return with_weights(model, lambda W: round_to_nearest(W, bits, group_size, sym))
