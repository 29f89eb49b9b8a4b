"""What of a block need not be computed: positions whose output is not wanted, and all before the linear that is changed."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from helpers.models.layers import hooked, instead

POSITIONS, AT = 8, 3


@torch.no_grad()
def local_modules(block: nn.Module, width: int, run: Callable[[nn.Module, Tensor], Tensor]) -> list[str]:
    """Modules that work on each position by itself, and whose output at one reaches the block's output at that one alone: of
    Llama's blocks queries, the attention's output, the norm behind it and the MLP; not keys and values.

    Found by running the block in fp32 on normal inputs [1, 8, width] (`run(block, hidden)` does so), and changing one output.
    Of modules inside one another the outermost.
    """
    trial, generator = copy.deepcopy(block).float(), torch.Generator().manual_seed(0)
    X = torch.randn(1, POSITIONS, width, generator=generator).to(next(trial.parameters()).device)
    here = (torch.arange(POSITIONS) == AT).to(X.device)
    before, found = run(trial, X), []
    for name, module in trial.named_modules():
        if not name or any(name.startswith(f"{outer}.") for outer in found):
            continue
        alone: list[bool] = []

        def nudge(module: nn.Module, args: tuple, kwargs: dict, out, alone=alone):
            whole = [t.shape[:2] == X.shape[:2] if isinstance(t, Tensor) else False for t in (*args, *kwargs.values(), out)]
            if alone or whole != [True, True] or kwargs:
                alone.append(False)
                return out
            alone.append(torch.allclose(module.forward(args[0][:, here]), out[:, here], rtol=1e-4, atol=1e-5))
            return torch.where(here[:, None], out + out.abs().mean() + 1, out) if out.ndim == 3 else out

        handle = module.register_forward_hook(nudge, with_kwargs=True)
        try:
            after = run(trial, X)
        finally:
            handle.remove()
        if alone == [True] and torch.equal(after[:, ~here], before[:, ~here]) and not torch.equal(after, before):
            found.append(name)
    return found


def only_at(block: nn.Module, names: Iterable[str], wanted: Tensor) -> AbstractContextManager:
    """While the context lasts these modules compute what is `wanted` [sequences, length], and put out zeros elsewhere."""
    def forward(whole: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        values = whole(x[wanted][None])[0]
        out = values.new_zeros(*x.shape[:2], *values.shape[1:])
        out[wanted] = values
        return out

    return instead({m: partial(forward, m.forward) for m in map(block.get_submodule, names)})


def put_out(block: nn.Module, outputs: Mapping[str, Any]) -> AbstractContextManager:
    """While the context lasts these modules do nothing but put out what they are given here."""
    return instead({block.get_submodule(n): lambda *_, out=out, **__: out for n, out in outputs.items()})


def finished_before(block: nn.Module, run: Callable[[], Tensor]) -> dict[str, list[str]]:
    """{linear: the modules that have finished when it begins}, those inside others left out, from one pass of the block.

    A change of the linear leaves their outputs as they were. Modules that are called more than once are not among them.
    """
    begun: dict[str, int] = {}
    ended: dict[str, int] = {}
    calls: Counter[str] = Counter()

    def begins(name: str, *_) -> None:
        calls[name] += 1
        begun[name] = len(begun) + len(ended)

    def ends(name: str, *_) -> None:
        ended[name] = len(begun) + len(ended)

    modules = [(n, m) for n, m in block.named_modules() if n]
    with hooked([(m, partial(begins, n)) for n, m in modules]), hooked([(m, partial(ends, n)) for n, m in modules], after=True):
        run()
    found = {}
    for name in (n for n, m in modules if isinstance(m, nn.Linear) and calls[n] == 1):
        done = [n for n in ended if calls[n] == 1 and ended[n] < begun[name]]
        found[name] = [n for n in done if not any(n.startswith(f"{outer}.") for outer in done)]
    return found
