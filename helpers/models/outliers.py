"""Outlier channels, as large models have them, put into a model that has none."""

import torch
from torch import nn

from helpers.models.layers import fold_scale
from helpers.models.walk import walk


@torch.no_grad()
def add_outliers(model: nn.Module, channels: int = 4, factor: float = 32.0, seed: int = 0) -> nn.Module:
    """Outlier channels without a change of what the model computes; changes and returns `model`.

    In each block, the same few channels leave the norms `factor` times larger, and the columns of the linears that read
    them are as much smaller: a fold (`layers.py`). With a power of two no bit of the output changes in fp32.
    """
    width = model.config.get_text_config().hidden_size
    chosen = torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:channels]
    s = torch.ones(width, device=model.device)
    s[chosen] = 1 / factor
    for step in walk(model, [range(8)]):
        for fold in step.layout.folds:
            if not isinstance(step.block.get_submodule(fold.before), nn.Linear):
                fold_scale(step.block, fold, s)
    return model
