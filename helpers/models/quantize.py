"""A whole model through one method, block by block; the weights end up simulated (W_hat in place of W) and as codes."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from helpers.models.calibration import AutoGptqGram, Gram, Walk
from helpers.models.layers import architecture, linears
from helpers.models.scaling import awq_as_autoawq, awq_block
from helpers.models.scheme import Outcome, Scheme
from helpers.quantizers.affine import GroupSizeError, Quantized, decibel, fit_qparams, on_grid, output_error, round_to_nearest
from helpers.quantizers.awq import quantize_awq
from helpers.quantizers.gptq import gptq, gptq_columns
from helpers.quantizers.nf4 import NF4, dequantize_absmax, dequantize_nf4, quantize_absmax, quantize_nf4


def quantize_model(model: nn.Module | Walk, scheme: Scheme, sequences: Sequence[Sequence[int]] = (),
                   done: Callable[[str, nn.Module, Outcome], None] | None = None, progress: bool = False) -> Outcome:
    """Quantize the linears inside the blocks, in place: each weight becomes its W_hat, norms take AWQ's scales.

    Later blocks, and later groups inside a block (true_sequential), are calibrated on the outputs of those already
    quantized. `done(name, block, outcome)` is called after each block: with a `Walk.from_folder` its weights go away then.
    Linears whose width the group does not divide stay as they are, and are listed. Raises ValueError for calibration
    sequences that are missing or too long and for an override that matches nothing, HessianError if calibration leaves a
    linear without usable inputs.
    """
    walk = model if isinstance(model, Walk) else Walk(model)
    outcome, (_, groups, folds) = Outcome(), architecture(walk.model)
    scheme.check_names(name for name, _ in linears(walk.model))
    kind = AutoGptqGram if scheme.reference else Gram
    calibrated = scheme.method not in ("rtn", "nf4")
    if calibrated:
        # auto-gptq adds up sequence by sequence, autoawq sends all through at once
        at_once = {"gptq": 1, "awq": 2**62}[scheme.method] if scheme.reference else 4096
        outcome.tokens = walk.begin(sequences, at_once)
    count = walk.model.config.num_hidden_layers
    for n, (name, block) in enumerate(tqdm(walk.blocks(), total=count, disable=not progress, desc="blocks"), 1):
        if scheme.method.startswith("awq"):
            if scheme.reference:
                awq_as_autoawq(walk, block, name, folds, scheme, outcome)
            else:
                awq_block(block, name, walk.grams(block, groups), folds, scheme, outcome)
        if not calibrated or scheme.method == "awq" or not scheme.true_sequential:
            grams = walk.grams(block, groups) if scheme.method.endswith("gptq") else None
            quantize_linears(block, name, [n for g in groups for n in g], grams, scheme, outcome)
        else:
            for group in groups:
                quantize_linears(block, name, group, walk.grams(block, [group], kind), scheme, outcome)
        if calibrated and n < count and not (scheme.reference and scheme.method == "awq"):  # autoawq has done so before
            walk.advance(block)
        if done:
            done(name, block, outcome)
    return outcome


def quantize_many(model: nn.Module, schemes: Sequence[Scheme], sequences: Sequence[Sequence[int]]) -> list[Outcome]:
    """One model by many schemes, from Gram matrices collected once, on the unquantized model, which is left as it is."""
    walk, (_, groups, folds) = Walk(model), architecture(model)
    outcomes = [Outcome(tokens=tokens) for tokens in [walk.begin(sequences)] for _ in schemes]
    for n, (name, block) in enumerate(walk.blocks(), 1):
        grams = walk.grams(block, groups)
        for scheme, outcome in zip(schemes, outcomes, strict=True):
            changed, own = copy.deepcopy(block), dict(grams)
            if scheme.method.startswith("awq"):
                awq_block(changed, name, own, folds, scheme, outcome)
            quantize_linears(changed, name, [n for g in groups for n in g], own, scheme, outcome)
        if n < model.config.num_hidden_layers:
            walk.advance(block)
    return outcomes


@torch.no_grad()
def quantize_linears(block: nn.Module, prefix: str, names: Sequence[str], grams: Mapping[str, Gram] | None, scheme: Scheme,
                     outcome: Outcome) -> None:
    """Quantize these linears of a block, given what calibration kept of their inputs; those that share it are stacked."""
    for settings, same in _alike(prefix, names, grams, scheme, outcome):
        stacked = torch.cat([block.get_submodule(n).weight for n in same])
        gram = grams[same[0]] if grams else None
        try:
            found, damping = _solve(stacked, gram, settings)
        except GroupSizeError:
            outcome.skipped += [f"{prefix}.{n}" for n in same]
            continue
        W_hat = _as_in_files(found)
        rows = [block.get_submodule(n).out_features for n in same]
        for n, part, before, after in zip(same, _rows(found, rows), stacked.split(rows), W_hat.split(rows), strict=True):
            outcome.codes[f"{prefix}.{n}"] = part
            block.get_submodule(n).weight.copy_(after)
            if damping is not None:
                outcome.damp_percent[f"{prefix}.{n}"] = damping
            if gram is not None and settings.method != "awq":  # AWQ has clipped `before` already
                signal = output_error(before.float(), gram.H)
                outcome.error_db[f"{prefix}.{n}"] = decibel(output_error(before.float() - after, gram.H), signal)


def _alike(prefix: str, names: Sequence[str], grams, scheme: Scheme, outcome: Outcome) -> Iterator[tuple[Scheme, list[str]]]:
    """Linears that share their input and their settings, together; those to be left alone go on the list."""
    sets: dict[tuple, tuple[Scheme, list[str]]] = {}
    for n in names:
        settings = scheme.at(f"{prefix}.{n}")
        if settings is None:
            outcome.skipped.append(f"{prefix}.{n}")
            continue
        shared = id(grams[n]) if grams else n
        key = (n if scheme.reference or settings.method == "nf4" else shared, repr(replace(settings, overrides={})))
        sets.setdefault(key, (settings, []))[1].append(n)
    yield from sets.values()


def _solve(W: Tensor, gram: Gram | None, s: Scheme) -> tuple[Quantized | NF4, float | None]:
    """One (stacked) weight by the scheme's method: its codes, and the damping if there was any."""
    if s.method == "nf4":
        return quantize_nf4(W), None
    if s.method.endswith("gptq"):
        if s.reference:
            return gptq_columns(W, gram.H, s.bits, s.group_size, s.sym, s.desc_act, s.damp_percent)
        return gptq(W, gram.H, s.bits, s.group_size, s.sym, s.desc_act, s.damp_percent, s.search)
    if s.method == "awq":
        return quantize_awq(W, s.bits, s.group_size), None
    return on_grid(W, fit_qparams(W, s.bits, s.group_size, s.sym)), None


def _as_in_files(found: Quantized | NF4) -> Tensor:
    """W_hat; that of NF4 with double quantization, which the files have."""
    if isinstance(found, NF4):
        return dequantize_nf4(found._replace(absmax=dequantize_absmax(quantize_absmax(found.absmax))))
    return found.dequantize()


def _rows(found: Quantized | NF4, rows: Sequence[int]) -> Iterator[Quantized | NF4]:
    """The parts of a stacked result."""
    if isinstance(found, NF4):  # never stacked: its blocks run on from row to row
        yield found
        return
    scale, zero = found.grid.scale.split(rows), found.grid.zero_point.split(rows)
    for codes, s, z in zip(found.codes.split(rows), scale, zero, strict=True):
        yield Quantized(codes, replace(found.grid, scale=s, zero_point=z), found.g_idx)


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
