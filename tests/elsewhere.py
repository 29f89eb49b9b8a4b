"""A device that is not there: tensors that say they are elsewhere, compute on the CPU, and refuse to meet the CPU's own.

A GPU's rule, without a GPU: mixing devices raises. Values are real, so that code which looks at them runs as ever.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

ELSEWHERE = torch.device("meta")


class There(torch.Tensor):
    """A tensor elsewhere; `held` holds its values."""

    @staticmethod
    def __new__(cls, real: torch.Tensor):
        out = torch.Tensor._make_wrapper_subclass(cls, real.shape, strides=real.stride(), dtype=real.dtype, device=ELSEWHERE,
                                                  storage_offset=real.storage_offset())
        out.held = real
        return out

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def run(function, args, kwargs):
    """An operation on what the tensors hold, if all of them are in one place."""
    tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, There)]
    copies = "copy" in function.__name__  # moving from one device to the other is what these are for
    if there and not copies and (here := [t for t in tensors if not isinstance(t, There) and t.ndim]):
        raise RuntimeError(f"{function}: a tensor {tuple(here[0].shape)} of the CPU meets one elsewhere")
    asked = kwargs.get("device")
    to_cpu = asked is not None and torch.device(asked).type == "cpu"
    if asked is not None:
        kwargs = kwargs | {"device": "cpu"}
    into_here = function.__name__.startswith("copy_") and not isinstance(args[0], There)
    wraps = (there and not to_cpu and not into_here) or (asked is not None and torch.device(asked) == ELSEWHERE)
    args, kwargs = tree_map(lambda t: t.held if isinstance(t, There) else t, (args, kwargs))
    out = function(*args, **kwargs)
    known = {id(t.held): t for t in there}  # what is changed in place stays itself

    def placed(t):
        return t if not wraps or not isinstance(t, torch.Tensor) else known[id(t)] if id(t) in known else There(t)

    return tree_map(placed, out)


class Elsewhere(TorchDispatchMode):
    """While it lasts, what is made on that device is real."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})
