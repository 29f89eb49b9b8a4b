"""The one loop over a model's blocks: inputs arrive, the caller has its turn, and what leaves goes on to the next.

Peak memory is one block, its inputs and outputs for all tokens, and what is kept of one block's inputs; a pass that is held
at each group of linears also keeps the widest of its intermediate results.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from tqdm import tqdm

from helpers.models.layers import Layout, UnknownStructure, hooked, instead, look
from helpers.models.source import Source


class _Enough(Exception):
    """Raised inside a forward pass when all that was wanted has been seen."""


@dataclass(frozen=True)
class Batch:
    """Token sequences of one length on their way: their states, and for each block its other arguments."""

    ids: Tensor  # [sequences, length]
    hidden: Tensor  # [sequences, length, width]
    arguments: tuple[tuple[tuple, dict], ...]
    wrap: Callable[[Tensor], Any]  # a block's output as the model wants it, which may be in a tuple

    @torch.no_grad()
    def logits(self, source: Source, hidden: Tensor) -> Tensor:
        """The model's logits [..., vocabulary] of states [sequences, positions, width] after the last block, which need not
        be all: what comes there works on each position by itself."""
        with _bypassed(source.blocks, lambda *_: self.wrap(hidden)):
            return source.model(input_ids=self.ids, use_cache=False).logits


@dataclass(frozen=True)
class Stream:
    """Batches at the entrance of block `index`. Never changed: what a branch shares with its parent costs nothing."""

    batches: tuple[Batch, ...]
    index: int = 0

    @property
    def tokens(self) -> int:
        return sum(b.ids.numel() for b in self.batches)

    @classmethod
    @torch.no_grad()
    def start(cls, source: Source, sequences: Sequence[Sequence[int]], at_once: int = 4096) -> "Stream":
        """Send token sequences up to the first block, neighbours of equal length together, at most `at_once` tokens or one
        sequence. Raises ValueError for an empty set or a sequence longer than the model's context."""
        context = getattr(source.model.config.get_text_config(), "max_position_embeddings", None)
        if not sequences or not all(len(s) for s in sequences):
            raise ValueError("sequences: calibration needs at least one token sequence, and none may be empty")
        if context and (longest := max(map(len, sequences))) > context:
            raise ValueError(f"sequences: one has {longest} tokens, the model's context is {context}; cut it")
        return cls.enter(source, (ids for length, same in groupby(sequences, len)
                                  for ids in torch.tensor(list(same)).split(max(1, at_once // length))))

    @classmethod
    @torch.no_grad()
    def enter(cls, source: Source, batches: Iterable[Tensor]) -> "Stream":
        """Send batches of tokens [sequences, length] up to the first block."""
        with source.present([n for n in source.outside if not n.startswith("lm_head.")]):
            return cls(tuple(_enter(source, ids.to(source.device)) for ids in batches))

    def run(self, block: nn.Module, batch: Batch, hidden: Tensor | None = None) -> Tensor:
        args, kwargs = batch.arguments[self.index]
        out = block(batch.hidden if hidden is None else hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def through(self, *blocks: nn.Module) -> "Stream":
        """The same after these blocks, the first of which is the one it stands before."""
        stream = self
        for block in blocks:
            stream = stream.after([stream.run(block, b) for b in stream.batches])
        return stream

    def after(self, outputs: Sequence[Tensor]) -> "Stream":
        return Stream(tuple(replace(b, hidden=h) for b, h in zip(self.batches, outputs, strict=True)), self.index + 1)

    @torch.no_grad()
    def logits(self, source: Source) -> Iterator[Tensor]:
        """After the last block: the model's logits [sequences, length, vocabulary] of each batch."""
        for batch in self.batches:
            yield batch.logits(source, batch.hidden)


def _bypassed(blocks: nn.ModuleList, does: Callable) -> AbstractContextManager:
    """While the context lasts a block does nothing but `does(index, hidden, args, kwargs) -> hidden`."""
    def forward(i: int, hidden: Tensor | None = None, *args, **kwargs) -> Tensor:
        return does(i, kwargs.pop("hidden_states", hidden), args, kwargs)

    return instead({block: partial(forward, i) for i, block in enumerate(blocks)})


def _enter(source: Source, ids: Tensor) -> Batch:
    """One batch at the first block, with the arguments of all blocks, which may differ: masks, rotary embeddings."""
    for wrap in (lambda hidden: hidden, lambda hidden: (hidden,)):  # some models take a block's output out of a tuple
        seen: list[tuple[tuple, dict]] = []
        entered: list[Tensor] = []

        def see(_, hidden, args, kwargs, wrap=wrap, seen=seen, entered=entered):
            if entered and hidden is not entered[0]:
                raise _Enough
            entered.append(hidden)
            seen.append((args, kwargs))
            if len(seen) == len(source.blocks):
                raise _Enough
            return wrap(hidden)

        try:
            with _bypassed(source.blocks, see):
                source.model(input_ids=ids, use_cache=False)
        except _Enough:
            if len(seen) == len(source.blocks):
                return Batch(ids, entered[0], tuple(seen), wrap)
    raise UnknownStructure(f"{type(source.model).__name__}: the blocks {source.path} do not hand their output to one another")


@dataclass
class Step:
    """The caller's turn at a block: its weights are there, its inputs at hand."""

    name: str
    block: nn.Module
    stream: Stream
    layout: Layout
    last: bool = False
    outputs: Stream | None = None  # set where something has run the batches through already
    aim: Stream | None = None  # where a method aims at it: what the unquantized model has after this block, a third copy
    seen: dict[tuple[str, ...], dict[type, Any]] = field(default_factory=dict)
    folded: dict[str, Tensor] = field(default_factory=dict)  # {linear: s} where its inputs were divided by s

    @torch.no_grad()
    def keep(self, kinds: Mapping[tuple[str, ...], type]) -> dict[str, Any]:
        """{linear: what is kept of its input} for these groups, from one forward pass as far as the last of them.

        Collected once for all who ask, so a step whose block was changed since is to be asked no more.
        """
        missing = {g: kind for g, kind in kinds.items() if kind not in self.seen.setdefault(g, {})}
        if missing:
            found = {g: self.empty(g, missing[g]) for g in self.layout.groups if g in missing}
            last = next(reversed(found))

            def see(group, args, _):
                found[group].add(args[0])
                if group == last:
                    raise _Enough

            with hooked([(self.block.get_submodule(g[0]), partial(see, g)) for g in found]):
                for batch in self.stream.batches:
                    with suppress(_Enough):
                        self.stream.run(self.block, batch)
            for group, kept in found.items():
                self.check(group, kept)
                self.seen[group][missing[group]] = kept
        return {n: self.seen[g][kind] for g, kind in kinds.items() for n in g}

    def empty(self, group: Sequence[str], kind: type) -> Any:
        first = self.block.get_submodule(group[0])
        return kind.of(first.in_features, first.weight.device)

    def check(self, group: Sequence[str], kept: Any) -> None:
        """Raises UnknownStructure if not every token went through a group, so that its inputs are not what they seem."""
        if kept.tokens != self.stream.tokens:
            raise UnknownStructure(f"{self.name}.{group[0]} saw {kept.tokens} tokens of {self.stream.tokens}")

    def grams(self, kind: type) -> dict[str, Any]:
        """`keep` for all linears of the block."""
        return self.keep(dict.fromkeys(self.layout.groups, kind))

    @torch.no_grad()
    def held(self, kinds: Mapping[tuple[str, ...], type]) -> Iterator[tuple[tuple[str, ...], Any]]:
        """(group, what is kept of its input) for these groups, in the order of the forward pass, from a single one.

        Each batch is held in front of the group's first linear until the caller has had its turn (Frantar et al. 2022 and
        the toolkits run the block again for each group). With the last group done, the outputs are those of the block as it
        is by then.
        """
        def stop(args, _):
            getcurrent().parent.switch(args[0])

        with hooked([(self.block.get_submodule(g[0]), stop) for g in kinds]):
            runs = [greenlet(partial(self.stream.run, self.block, b)) for b in self.stream.batches]
            arrived = [run.switch() for run in runs]
            for group, kind in kinds.items():
                kept = self.empty(group, kind)
                for X in (x for x, run in zip(arrived, runs, strict=True) if not run.dead):
                    kept.add(X)
                self.check(group, kept)
                yield group, kept
                arrived = [run.switch() for run in runs]
        self.outputs = self.stream.after(arrived)


def walk(model: nn.Module | Source, sequences: Sequence[Sequence[int]] | Stream = (), at_once: int = 4096,
         progress: bool = False) -> Iterator[Step]:
    """A step for each block. What the caller leaves of the block makes the inputs of the next one, unless the step has
    `outputs` already. Without sequences the blocks go by with nothing at their entrance; a stream has entered already.

    Raises what `Stream.start` does.
    """
    source = Source.of(model)
    if not isinstance(stream := sequences, Stream):
        stream = Stream.start(source, sequences, at_once) if sequences else Stream(())
    probe = Stream.start(source, [range(8)]) if stream.batches else None
    layouts: dict[str, Layout] = {}
    count = len(source.blocks)
    for n, (name, block) in enumerate(tqdm(source, total=count, disable=not progress, desc="blocks")):
        layout = Layout((), ())
        if probe:
            kind = repr(block) + str({k: p.shape for k, p in block.named_parameters()})
            if kind not in layouts:
                at = Stream(probe.batches, n)
                layouts[kind] = look(block, probe.batches[0].hidden.shape[-1], lambda b, x, at=at: at.run(b, at.batches[0], x))
            layout = layouts[kind]
        step = Step(name, block, stream, layout, last=n + 1 == count)
        yield step
        if not step.last:
            stream = step.outputs or stream.through(block)


def first_step(model: nn.Module | Source, sequences: Sequence[Sequence[int]]) -> Step:
    """The step at the first block, to look at it and its inputs."""
    return next(walk(model, sequences))
