"""The linears of a model, found by looking: which share an input, and what a scale of that input can be folded into.

No table of architectures: a block is run once, and a fold is whatever leaves its output as it was.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

UNDONE = 1e-3  # a fold leaves less than this share of what scaling the linears alone does to the output


class UnknownStructure(ValueError):
    """A model without what the book looks for: blocks in a row, with linears in them."""


class Fold(NamedTuple):
    """Linears that read one input, and the module before whose output the inverse of their scale is folded into."""

    before: str  # a norm, or a linear whose outputs become this input
    linears: tuple[str, ...]
    plus_one: bool = False  # a norm that multiplies by 1 + weight, as Gemma's does


class Layout(NamedTuple):
    """Groups of linears of a block that share an input, in the order of the forward pass, and the folds."""

    groups: tuple[tuple[str, ...], ...]
    folds: tuple[Fold, ...]


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of a model's blocks: of the lists with one module a hidden layer, the largest.

    Raises UnknownStructure naming what was looked for, if there is none or no linear is in it.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise UnknownStructure(f"{type(model).__name__}: looked for a ModuleList of {count} blocks (num_hidden_layers), "
                               "found none")
    name, blocks = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    if not any(isinstance(m, nn.Linear) for m in blocks.modules()):
        raise UnknownStructure(f"{type(model).__name__}: {name} is {count} x {type(blocks[0]).__name__} without a single "
                               "nn.Linear, and nothing else is quantized here (no convolutions as in GPT-2)")
    return name, blocks


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(name, module) of each linear inside the blocks; the embeddings and the output head are not among them."""
    path, blocks = blocks_of(model)
    return ((f"{path}.{n}", m) for n, m in blocks.named_modules() if isinstance(m, nn.Linear))


def linears_apart(model: nn.Module) -> list[str]:
    """Names of the linears outside of the blocks, such as projections of embeddings, without the output head."""
    path, head = blocks_of(model)[0], model.get_output_embeddings()
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head and not n.startswith(f"{path}.")]


def left_alone(model: nn.Module) -> list[str]:
    """Names of the matrices inside the blocks that are in no linear, such as fused experts: they stay in 16 bits."""
    path, blocks = blocks_of(model)
    inside = {id(m.weight) for m in blocks.modules() if isinstance(m, nn.Linear)}
    return [f"{path}.{n}" for n, p in blocks.named_parameters() if p.ndim > 1 and id(p) not in inside]


def common_group(model: nn.Module, sizes: Iterable[int] = (128, 64, 32)) -> int:
    """The largest of these group sizes that divides the inputs of every linear; the smallest if none does."""
    widths = {m.in_features for _, m in linears(model)}
    return next((g for g in sizes if all(w % g == 0 for w in widths)), min(sizes))


@contextmanager
def instead(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """While the context lasts these modules run other forward functions."""
    own = {m: m.__dict__.get("forward") for m in forwards}  # what accelerate puts there, on models loaded to a GPU
    for m, forward in forwards.items():
        m.forward = forward
    try:
        yield
    finally:
        for m, earlier in own.items():
            del m.forward
            if earlier is not None:
                m.forward = earlier


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Callable]], after: bool = False):
    """Each function sees (args, kwargs) of its module, or with `after` (args, output), while the context lasts."""
    with ExitStack() as stack:
        for module, see in hooks:
            handle = (module.register_forward_hook(lambda _, args, out, see=see: see(args, out)) if after else
                      module.register_forward_pre_hook(lambda _, args, kwargs, see=see: see(args, kwargs), with_kwargs=True))
            stack.callback(handle.remove)
        yield


@torch.no_grad()
def look(block: nn.Module, width: int, run: Callable[[nn.Module, Tensor], Tensor]) -> Layout:
    """Groups and folds of a block, by running it in fp32 on normal inputs [1, 8, width]; `run(block, hidden)` does so.

    Linears whose input is the same tensor are a group. For each group the candidates are what made that tensor and, where
    that has no weight, all that came before with as many outputs; the first whose scale undoes the group's is the fold.
    """
    trial = copy.deepcopy(block).float()
    generator = torch.Generator().manual_seed(0)
    device = next(trial.parameters()).device
    X = torch.randn(1, 8, width, generator=generator).to(device)
    readers: dict[int, tuple[Tensor, list[str]]] = {}  # by the identity of their input, which is kept alive
    made: dict[int, str] = {}
    called: list[str] = []
    alive: list[Tensor] = []

    def see(name: str, args, out) -> None:
        if isinstance(trial.get_submodule(name), nn.Linear):
            readers.setdefault(id(args[0]), (args[0], []))[1].append(name)
        if isinstance(out, Tensor):
            made[id(out)] = name
            called.append(name)
            alive.append(out)

    leaves = [(n, m) for n, m in trial.named_modules() if not any(m.children())]
    with hooked([(m, partial(see, n)) for n, m in leaves], after=True):
        before = run(trial, X)
    folds = []
    for x, group in readers.values():
        n = x.shape[-1]
        maker = made.get(id(x))
        first = called.index(group[0])
        candidates = [maker] if maker and _outputs(trial.get_submodule(maker)) == n else [
            c for c in reversed(called[:first]) if _outputs(trial.get_submodule(c)) == n]
        s = (torch.rand(n, generator=generator) + 0.5).to(device)
        found = (fold for c in dict.fromkeys(candidates) for plus_one in (False, True)
                 if not (plus_one and isinstance(trial.get_submodule(c), nn.Linear))
                 if _undoes(trial, fold := Fold(c, tuple(group), plus_one), s, before, lambda: run(trial, X)))
        if (fold := next(found, None)) is not None:
            folds.append(fold)
    return Layout(tuple(tuple(g) for _, g in readers.values()), tuple(folds))


def _outputs(module: nn.Module) -> int:
    """How many channels a weight makes: the rows of a linear's, the length of a norm's; 0 for anything else."""
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear) or (weight is not None and weight.ndim == 1):
        return len(weight)
    return 0


def _undoes(block: nn.Module, fold: Fold, s: Tensor, before: Tensor, run: Callable[[], Tensor]) -> bool:
    """Whether folding s leaves the block's output as it was, measured by what scaling the linears alone does to it."""
    saved = {n: block.get_submodule(n).weight.clone() for n in fold.linears}
    maker = block.get_submodule(fold.before)
    made = {k: p.clone() for k, p in maker.named_parameters()}
    fold_scale(block, fold, s)
    folded = (run() - before).norm()
    for k, p in maker.named_parameters():
        p.copy_(made[k])
    alone = (run() - before).norm()
    for n, weight in saved.items():
        block.get_submodule(n).weight.copy_(weight)
    return bool(folded < UNDONE * alone)


@torch.no_grad()
def fold_scale(block: nn.Module, fold: Fold, s: Tensor) -> None:
    """Multiply the input channels of the linears by s and divide what makes these inputs: the output does not change."""
    before = block.get_submodule(fold.before)
    if isinstance(before, nn.Linear):
        before.weight.div_(s[:, None])
    elif fold.plus_one:
        before.weight.add_(1).div_(s).sub_(1)
    else:
        before.weight.div_(s)
    if getattr(before, "bias", None) is not None:
        before.bias.div_(s)
    for n in fold.linears:
        block.get_submodule(n).weight.mul_(s)
