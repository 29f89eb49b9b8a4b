"""One change of a model at a time: each branch shares with the unchanged model all that comes before it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from helpers.models.source import Source
from helpers.models.walk import Stream, walk


@contextmanager
def changed(model: nn.Module, change: Mapping[str, Tensor]):
    """The model with {parameter: new value} while the context lasts."""
    parameters = {model.get_parameter(p): value for p, value in change.items()}
    own = [p.data for p in parameters]
    try:
        for p, value in parameters.items():
            p.data = value.to(p)
        yield
    finally:
        for p, value in zip(parameters, own, strict=True):
            p.data = value


def first_block(source: Source, change: Mapping[str, Tensor]) -> int:
    """The index of the first block that it changes. Raises ValueError for a parameter that is in no block."""
    if outside := [p for p in change if not p.startswith(f"{source.path}.")]:
        raise ValueError(f"change: {outside[0]} is in none of the blocks {source.path}")
    return min(int(p.removeprefix(f"{source.path}.").split(".")[0]) for p in change)


def branch(source: Source, stream: Stream, change: Mapping[str, Tensor], end: Callable[[Stream], Stream] | None = None
           ) -> Stream:
    """The stream after the last block of the changed model, from that of the unchanged one before the first changed block;
    `end` runs the blocks from there on, if not all of each is wanted."""
    with changed(source.model, change):
        return end(stream) if end else stream.through(*source.blocks[stream.index:])


def branches(model: nn.Module | Source, changes: Mapping[Any, Mapping[str, Tensor]],
             sequences: Sequence[Sequence[int]] | Stream, end: Callable[[Stream], Stream] | None = None
             ) -> Iterator[tuple[Any, Stream]]:
    """(name, stream after the last block) of each change, {parameter: new value}, of a model in memory.

    The unchanged model is walked once; a branch leaves it at the first block that it changes.
    """
    source = Source.of(model)
    at: dict[int, list[Any]] = {}
    for name, change in changes.items():
        at.setdefault(first_block(source, change), []).append(name)
    for step in walk(source, sequences):
        for name in at.get(step.stream.index, ()):
            yield name, branch(source, step.stream, changes[name], end)
