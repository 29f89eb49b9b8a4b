"""A model through a plan, block by block: codes, and the weights that they stand for in place of the original ones."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from helpers.models.layers import linears
from helpers.models.method import Format, Gram, Method, Outcome, Plan, PlanError
from helpers.models.source import Source
from helpers.models.walk import Step, walk
from helpers.quantizers.affine import GroupSizeError, ScaleError, decibel, output_error
from helpers.quantizers.gptq import HessianError


def quantize_model(model: nn.Module | Source, plan: Plan | Method, sequences: Sequence[Sequence[int]] = (),
                   done: Callable[[Step, Outcome], None] | None = None, progress: bool = False,
                   form: Format | None = None) -> Outcome:
    """Quantize the linears inside the blocks, in place: every weight becomes what a file gives back, in the model's dtype.

    `done(step, outcome)` is called after each block: of a `Source.from_folder` its weights go away then. Linears that cannot
    be quantized so, or not in the format (`form`; else the plan's first), such as those whose width the group size does not
    divide, stay as they are, and are listed. Raises PlanError for a
    plan that fits the model nowhere or not together, ValueError for calibration sequences that are missing or too long,
    HessianError if calibration leaves a linear without usable inputs.
    """
    source, plan = Source.of(model), Plan.of(plan)
    plan.check_names(name for name, _ in linears(source.model))
    outcome, aim = Outcome(), None
    for step in walk(source, *_inputs(plan, sequences), progress):
        outcome.tokens = step.stream.tokens
        if any(m.aims for m in plan.methods()):
            step.aim = aim = (aim or step.stream).through(step.block)
        if plan.inputs == "model" and step.stream.batches and not step.last:
            step.outputs = step.stream.through(step.block)
        quantize_block(step, plan, outcome, form)
        if done:
            done(step, outcome)
    if source.folder is None:
        for name in source.outside:
            p = source.model.get_parameter(name)
            p.data.copy_(in_fp16(name, p))
    return outcome


def quantized(model: nn.Module, plan: Plan | Method, sequences: Sequence[Sequence[int]] = ()) -> nn.Module:
    """A copy of a model, quantized."""
    changed = copy.deepcopy(model)
    quantize_model(changed, plan, sequences)
    return changed


def quantize_many(model: nn.Module | Source, plans: Sequence[Plan], sequences: Sequence[Sequence[int]]) -> list[Outcome]:
    """The codes of many plans from one calibration, on the unquantized model, which is left as it is.

    Raises PlanError unless all of them have inputs="model", and what `quantize_model` raises.
    """
    source, outcomes = Source.of(model), [Outcome() for _ in plans]
    for plan in plans:
        plan.check_names(name for name, _ in linears(source.model))
        if plan.inputs != "model":
            raise PlanError(f"{plan}: many plans share the inputs of the unquantized model: Plan(..., inputs='model')")
    needing = [p for p in plans if any(m.keeps for m in p.methods())]
    arguments = {_inputs(plan, sequences)[1] for plan in needing}
    if len(arguments) > 1:
        raise PlanError("these plans batch their calibration differently, and cannot share it")
    for step in walk(source, sequences if needing else (), *arguments):
        for plan, outcome in zip(plans, outcomes, strict=True):
            outcome.tokens = step.stream.tokens
            quantize_block(replace(step, block=copy.deepcopy(step.block)), plan, outcome)
    return outcomes


def _inputs(plan: Plan, sequences: Sequence[Sequence[int]]) -> tuple[Sequence[Sequence[int]], int]:
    """What a walk is given for a plan: the sequences if any of its methods looks at inputs, and how many tokens at once."""
    at_once = {m.at_once for m in plan.methods() if m.keeps}
    if len(at_once) > 1:
        raise PlanError(f"{plan}: its methods batch their calibration differently, and cannot share it")
    if at_once and not sequences:
        raise ValueError(f"sequences: {plan} needs calibration: at least one token sequence")
    return (sequences, at_once.pop()) if at_once else ((), 4096)


@torch.no_grad()
def quantize_block(step: Step, plan: Plan, outcome: Outcome, form: Format | None = None) -> None:
    """Quantize a block in place: prepare it, solve its linears, and leave the weights that a file would give back.

    Later groups and blocks are calibrated on the solver's own W_hat, with scales in fp32, as in the toolkits.
    """
    names = [n for n, m in step.block.named_modules() if isinstance(m, nn.Linear)]
    groups = [g for g in step.layout.groups if g]
    reached = {n for g in groups for n in g}
    methods = {n: m for n in names if not (m := plan.at(f"{step.name}.{n}")).stays and (n in reached or not m.keeps)}
    if form := form or next(iter(plan.formats()), None):
        methods = {n: m for n, m in methods.items() if _fits(form, f"{step.name}.{n}", step.block.get_submodule(n), m, outcome)}
    prepared, calibrated = ({g: k for g in groups if (k := _kind(step.name, g, methods, what))}
                            for what in ("prepares", "calibrated"))
    held = calibrated if plan.inputs == "group" else {}
    kept = step.keep(prepared | {g: k for g, k in calibrated.items() if g not in held})
    _prepare(step, methods, kept, outcome)
    for group in [g for g in groups if g not in held] + [(n,) for n in names if n not in reached]:
        _solve(step, group, methods, kept, outcome)
    if held:
        for group, inputs in step.held(held):
            _solve(step, group, methods, dict.fromkeys(group, inputs), outcome)
    if step.stream.batches and step.outputs is None and plan.inputs != "model" and not step.last:
        step.outputs = step.stream.through(step.block)
    outcome.left += [name for n in names if (name := f"{step.name}.{n}") not in outcome.codes]
    for name, p in step.block.named_parameters(step.name):
        linear = name.removesuffix(".weight")
        p.copy_(outcome.codes[linear].dequantize() if linear in outcome.codes else in_fp16(name, p))


def _fits(form: Format, name: str, linear: nn.Linear, method: Method, outcome: Outcome) -> bool:
    """Whether the plan's file format can hold this linear; if not it stays in 16 bits, and a note says why."""
    try:
        form.specs(linear.out_features, linear.in_features, method)
    except GroupSizeError as error:
        outcome.notes[name] = {"left": str(error)}
        return False
    return True


def _kind(prefix: str, group: Sequence[str], methods: dict[str, Method], what: str) -> type | None:
    """What is to be kept of a group's input for those of its methods that prepare, or are calibrated; None: nothing."""
    kinds = {methods[n].keeps for n in group if n in methods and getattr(methods[n], what)}
    if len(kinds) > 1:
        raise PlanError(f"{prefix}: {', '.join(group)} share their input, but their methods keep different things of it")
    return kinds.pop() if kinds else None


def _prepare(step: Step, methods: dict[str, Method], kept: dict[str, Any], outcome: Outcome) -> None:
    """Let each method that wants to change the block first; folds that it would share with another method are an error."""
    for method in dict.fromkeys(m for m in methods.values() if m.prepares):
        folds = [f for f in step.layout.folds if method.folds and any(methods.get(n) == method for n in f.linears)]
        for fold in folds:
            if others := {str(methods[n]) for n in fold.linears if n in methods and methods[n] != method}:
                raise PlanError(f"{step.name}: {', '.join(fold.linears)} read one input, which {method} scales for all, "
                                f"but the plan gives some to {', '.join(sorted(others))}: give them one method, or none")
        try:
            found = method.prepare(step, [n for n, m in methods.items() if m == method], folds, kept)
        except HessianError as error:
            raise HessianError(f"{step.name}: {error}") from error
        for n, notes in found.items():
            outcome.notes.setdefault(f"{step.name}.{n}", {}).update(notes)


def _solve(step: Step, group: Sequence[str], methods: dict[str, Method], kept: dict[str, Any], outcome: Outcome) -> None:
    """Codes for a group's linears; those of one method that share their input are stacked if it allows that."""
    sets: dict[Any, list[str]] = {}
    for n in group:
        if n in methods:
            sets.setdefault(methods[n] if methods[n].stacks else n, []).append(n)
    for same in sets.values():
        method, modules = methods[same[0]], [step.block.get_submodule(n) for n in same]
        inputs, rows = kept[same[0]] if method.calibrated else None, [m.out_features for m in modules]
        W = torch.cat([m.weight for m in modules])
        try:
            codes, notes = method.solve(W, inputs)
            parts = [codes] if len(same) == 1 else [None] * len(same) if codes is None else codes.split(rows)
            for n, m, part, before in zip(same, modules, parts, W.split(rows), strict=True):
                noted = outcome.notes.setdefault(f"{step.name}.{n}", {})
                noted |= notes
                if part is not None:
                    outcome.codes[f"{step.name}.{n}"] = part.stored()
                    if step.stream.batches:  # what comes later is calibrated on it
                        m.weight.copy_(after := part.dequantize())
                        if isinstance(inputs, Gram):
                            noted["error_db"] = decibel(output_error(before.float() - after, inputs.H),
                                                        output_error(before.float(), inputs.H))
        except GroupSizeError as error:
            outcome.notes |= {f"{step.name}.{n}": {"left": str(error)} for n in same}
        except (ScaleError, HessianError) as error:
            raise type(error)(f"{step.name}.{same[0]}: {error}") from error


def in_fp16(name: str, p: Tensor) -> Tensor:
    """A parameter as the files have it; raises ScaleError if fp16 cannot hold it."""
    half = p.half()
    if not torch.isfinite(half).all():
        raise ScaleError(f"{name} has values beyond fp16, in which files keep what is not quantized")
    return half
