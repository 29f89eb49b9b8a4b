"""AWQ in a block: find scales for the inputs of its linears, fold them into what comes before, clip.

Two objectives: the error of each linear's output, through its Gram matrix, and the error of the attention's and the MLP's
output, by forward passes, exactly as autoawq does it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from helpers.models.calibration import Gram, Walk
from helpers.models.layers import Fold
from helpers.models.scheme import Outcome, Scheme
from helpers.quantizers import awq


@torch.no_grad()
def awq_block(block: nn.Module, prefix: str, grams: dict[str, Gram], folds: Sequence[Fold], scheme: Scheme,
              outcome: Outcome) -> None:
    """Scale, fold and clip the linears of a block by the error of each linear's output; `grams` follow the scales."""
    for fold in folds:
        if not scheme.scale or not (settings := foldable(block, prefix, fold, scheme)):
            continue
        gram = grams[fold.linears[0]]
        W = torch.cat([block.get_submodule(n).weight for n in fold.linears]).float()
        candidates = awq.candidate_scales(gram.x_mean(), awq.weight_saliency(W, settings.group_size))
        best = awq.search_scale(candidates, awq.gram_loss(W, gram.H, settings.bits, settings.group_size))
        outcome.ratios[f"{prefix}.{fold.linears[0]}"] = best.ratio
        fold_scale(block, fold, best.scale)
        grams |= dict.fromkeys(fold.linears, gram.scaled(best.scale))
    for n in clippable(folds):
        if scheme.clip and scheme.method == "awq" and (s := fitting(block, prefix, n, scheme)):
            weight = block.get_submodule(n).weight
            weight.copy_(awq.clip(weight, awq.clip_by_gram(weight.float(), grams[n].H, s.bits, s.group_size)))


def fitting(block: nn.Module, prefix: str, name: str, scheme: Scheme) -> Scheme | None:
    """The settings of a linear, or None if it is left in 16 bits."""
    s, width = scheme.at(f"{prefix}.{name}"), block.get_submodule(name).in_features
    return s if s and width % (width if s.group_size == -1 else s.group_size) == 0 else None


def foldable(block: nn.Module, prefix: str, fold: Fold, scheme: Scheme) -> Scheme | None:
    """The settings that the fold's first quantized linear has, or None where there is nothing to fold.

    With grouped-query attention the outputs of v are fewer than the inputs of o, and autoawq leaves that pair out.
    """
    if fold.before == "self_attn_layer_norm" and not block.do_layer_norm_before:
        raise ValueError(f"{prefix}: norms after the linears, as in OPT-350m, cannot take the scales of what comes before them")
    before, first = block.get_submodule(fold.before), block.get_submodule(fold.linears[0])
    if isinstance(before, nn.Linear) and before.out_features != first.in_features:
        return None
    return next((s for n in fold.linears if (s := fitting(block, prefix, n, scheme))), None)


@torch.no_grad()
def fold_scale(block: nn.Module, fold: Fold, s: Tensor) -> None:
    """Multiply the input channels of the linears by s and divide what makes these inputs: the output does not change."""
    before = block.get_submodule(fold.before)
    before.weight.div_(s[:, None] if isinstance(before, nn.Linear) else s)
    if getattr(before, "bias", None) is not None:
        before.bias.div_(s)
    for n in fold.linears:
        block.get_submodule(n).weight.mul_(s)


def clippable(folds: Sequence[Fold]) -> list[str]:
    """All linears but queries and keys: their product is hard to clip for (autoawq)."""
    return [n for fold in folds for n in fold.linears if "q_proj" not in n and "k_proj" not in n]


@torch.no_grad()
def awq_as_autoawq(walk: Walk, block: nn.Module, prefix: str, folds: Sequence[Fold], scheme: Scheme, outcome: Outcome) -> None:
    """The same by autoawq's objective, the output of the attention or of the MLP, in the model's dtype: one forward pass for
    each of 20 candidates. All sequences must be equally long, and go through at once, as they do there."""
    [batch] = walk.batches
    inputs = {n: [] for fold in folds for n in fold.linears}
    handles = [block.get_submodule(n).register_forward_hook(lambda _, args, out, n=n: inputs[n].append(args[0]))
               for n in inputs]
    walk.advance(block)
    for handle in handles:
        handle.remove()
    inputs = {n: x for n, [x] in inputs.items()}
    for fold in folds:
        if not (settings := foldable(block, prefix, fold, scheme)):
            continue
        linears, x, watched = [block.get_submodule(n) for n in fold.linears], inputs[fold.linears[0]], fold.watched
        arguments = batch.arguments if watched == "self_attn" else {}
        W = torch.cat([m.weight for m in linears])
        x_mean = (x.abs().view(-1, x.shape[-1]).float().sum(0) / (x.numel() // x.shape[-1])).to(x.dtype)

        def output(watched=watched, x=x, arguments=arguments) -> Tensor:
            out = block.get_submodule(watched)(x, **arguments)
            out = out[0] if isinstance(out, tuple) else out
            return out.clip(torch.finfo(out.dtype).min, torch.finfo(out.dtype).max)

        before, saved = output(), [m.weight.clone() for m in linears]

        def loss(s: Tensor, linears=linears, saved=saved, before=before, output=output, settings=settings) -> float:
            for m, w in zip(linears, saved, strict=True):
                m.weight.copy_(awq.fake_quantize(w * s, settings.bits, settings.group_size) / s)
            return (before.view(-1) - output().view(-1)).float().pow(2).sum().item() / before.numel()

        best = awq.search_scale(awq.candidate_scales(x_mean, awq.weight_saliency(W, settings.group_size)), loss)
        for m, w in zip(linears, saved, strict=True):
            m.weight.copy_(w)
        outcome.ratios[f"{prefix}.{fold.linears[0]}"] = best.ratio
        fold_scale(block, fold, best.scale)
        inputs |= {n: inputs[n].div(best.scale) for n in fold.linears}
    for n in clippable(folds):
        if scheme.clip and (s := fitting(block, prefix, n, scheme)):
            m = block.get_submodule(n)
            m.weight.copy_(awq.clip(m.weight, awq.clip_by_inputs(m.weight, inputs[n].flatten(0, -2), s.bits, s.group_size)))
