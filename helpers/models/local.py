"""Where a block's output is wanted at some positions alone: the modules that need not be computed at the others."""

import copy
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

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


@contextmanager
def only_at(block: nn.Module, names: Iterable[str], wanted: Tensor):
    """While the context lasts these modules compute what is `wanted` [sequences, length], and put out zeros elsewhere."""
    def forward(whole: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        values = whole(x[wanted][None])[0]
        out = values.new_zeros(*x.shape[:2], *values.shape[1:])
        out[wanted] = values
        return out

    modules = [block.get_submodule(n) for n in names]
    own = [m.__dict__.get("forward") for m in modules]
    for m in modules:
        m.forward = partial(forward, m.forward)
    try:
        yield
    finally:
        for m, earlier in zip(modules, own, strict=True):
            del m.forward
            if earlier is not None:
                m.forward = earlier
