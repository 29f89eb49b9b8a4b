"""Calibration: walk a model block by block, holding the inputs of one block at a time, and collect Gram matrices.

Peak memory is one block, its inputs for all tokens, and the Gram matrices of one block: the weights may stay on disk.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.models.layers import architecture


class _Enough(Exception):
    """Raised inside a forward pass when all that was wanted has been seen."""


@dataclass
class Batch:
    """Sequences of one length on their way through the model: what goes into the next block, and its other arguments."""

    hidden: Tensor  # [sequences, length, width]
    arguments: dict


@dataclass
class Gram:
    """What calibration keeps of the inputs X [tokens, in] of a linear."""

    H: Tensor  # X^T X, fp32 [in, in]
    absolute: Tensor  # sum of |x|, fp32 [in]
    tokens: int = 0

    @classmethod
    def of(cls, width: int) -> "Gram":
        return cls(torch.zeros(width, width), torch.zeros(width))

    def add(self, X: Tensor) -> None:
        X = X.flatten(0, -2).float()
        self.H.addmm_(X.T, X)
        self.absolute += X.abs().sum(0)
        self.tokens += len(X)

    def x_mean(self) -> Tensor:
        """Mean |x| of each channel."""
        return self.absolute / self.tokens

    def scaled(self, s: Tensor) -> "Gram":
        """That of X / s."""
        return Gram(self.H / s / s[:, None], self.absolute / s, self.tokens)


@dataclass
class AutoGptqGram(Gram):
    """2 / n X^T X over n sequences, added up as auto-gptq does: the order of operations decides the last bits."""

    sequences: int = 0

    def add(self, X: Tensor) -> None:
        self.H *= self.sequences / (self.sequences + 1)
        self.sequences += 1
        self.tokens += X.shape[-2]
        x = math.sqrt(2 / self.sequences) * X.flatten(0, -2).T.float()
        self.H += x @ x.T


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Callable]]):
    """Each function sees the inputs (args, kwargs) of its module while the context lasts."""
    with ExitStack() as stack:
        for module, see in hooks:
            handle = module.register_forward_pre_hook(lambda _, args, kwargs, see=see: see(args, kwargs), with_kwargs=True)
            stack.callback(handle.remove)
        yield


@dataclass
class Walk:
    """A model under calibration, and the hidden states on their way through it."""

    model: nn.Module
    folder: Path | None = None  # where the weights are, if the model is an empty shell
    batches: list[Batch] = field(default_factory=list)
    outside: list[str] = field(init=False)  # names of the parameters outside of the blocks, tied ones once

    def __post_init__(self):
        path = architecture(self.model).blocks
        tied = (self.model._tied_weights_keys or ()) if self.model.config.tie_word_embeddings else ()
        self.outside = [n for n, _ in self.model.named_parameters() if not n.startswith(f"{path}.") and n not in tied]

    @classmethod
    def from_folder(cls, folder: Path) -> "Walk":
        """Over a model that is never whole in memory: a shell whose weights are read block by block, as fp32."""
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
        return cls(model.eval(), Path(folder))

    @contextmanager
    def present(self, names: Sequence[str]):
        """These parameters are in memory while the context lasts."""
        if self.folder is not None:
            for name, tensor in read_tensors(self.folder, names):
                set_module_tensor_to_device(self.model, name, "cpu", tensor.float())
        yield
        if self.folder is not None:
            for name in names:
                set_module_tensor_to_device(self.model, name, "meta")

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, block) in order, each with its weights present until the next is asked for."""
        path = architecture(self.model).blocks
        for i, block in enumerate(self.model.get_submodule(path)):
            with self.present([f"{path}.{i}.{n}" for n, _ in block.named_parameters()]):
                yield f"{path}.{i}", block

    @torch.no_grad()
    def begin(self, sequences: Sequence[Sequence[int]], batch_tokens: int = 4096) -> int:
        """Send token sequences up to the first block; returns how many tokens there are.

        Raises ValueError for an empty calibration set or a sequence longer than the context.
        """
        context = self.model.config.max_position_embeddings
        if not sequences or not all(len(s) for s in sequences):
            raise ValueError("sequences: calibration needs at least one token sequence, and none may be empty")
        if (longest := max(map(len, sequences))) > context:
            raise ValueError(f"sequences: one has {longest} tokens, the model's context is {context}; cut it")
        path = architecture(self.model).blocks
        needed = [n for n in self.outside if not n.startswith("lm_head.")]

        def catch(args, kwargs):
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            self.batches.append(Batch(hidden, kwargs))
            raise _Enough

        with self.present(needed), hooked([(self.model.get_submodule(path)[0], catch)]):
            for ids in _batches(sequences, batch_tokens):
                _run(lambda ids=ids: self.model(input_ids=ids, use_cache=False))
        return sum(len(s) for s in sequences)

    @torch.no_grad()
    def see(self, block: nn.Module, hooks: Mapping[str, Callable[[Tensor], None]]) -> None:
        """Run the batches through `block` as far as the last of the named linears, showing the input of each."""
        seen: set[str] = set()

        def show(name: str) -> Callable:
            def see(args, kwargs):
                hooks[name](args[0])
                seen.add(name)
                if len(seen) == len(hooks):
                    raise _Enough
            return see

        with hooked([(block.get_submodule(name), show(name)) for name in hooks]):
            for batch in self.batches:
                seen.clear()
                _run(lambda batch=batch: block(batch.hidden, **batch.arguments))

    def grams(self, block: nn.Module, groups: Iterable[Sequence[str]], kind: type[Gram] = Gram) -> dict[str, Gram]:
        """The Gram matrix of each group's shared input, under the name of each of its linears."""
        found = {group[0]: kind.of(block.get_submodule(group[0]).in_features) for group in groups}
        self.see(block, {name: gram.add for name, gram in found.items()})
        tokens = sum(b.hidden.shape[0] * b.hidden.shape[1] for b in self.batches)
        for name, gram in found.items():
            assert gram.tokens == tokens, f"{name} saw {gram.tokens} tokens of {tokens}"
        return {name: found[group[0]] for group in groups for name in group}

    @torch.no_grad()
    def advance(self, block: nn.Module) -> None:
        """Replace the inputs of `block` by its outputs."""
        for batch in self.batches:
            out = block(batch.hidden, **batch.arguments)
            batch.hidden = out[0] if isinstance(out, tuple) else out


def _run(forward: Callable) -> None:
    """A forward pass that may be cut short."""
    with suppress(_Enough):
        forward()


def _batches(sequences: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[Tensor]:
    """Neighbouring sequences of equal length together, at most `batch_tokens` tokens or one sequence."""
    for length, same in groupby(sequences, len):
        rows = torch.tensor(list(same))
        yield from rows.split(max(1, batch_tokens // length))


def read_tensors(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of a model folder's safetensors, one at a time; raises KeyError naming what is not there."""
    wanted = set(names)
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as f:
            for name in wanted & set(f.keys()):
                yield name, f.get_tensor(name)
                wanted.remove(name)
    if wanted:
        raise KeyError(f"{folder} does not hold {sorted(wanted)}")
