"""One change of a model at a time: each branch shares with the unchanged model all that comes before it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from helpers.models.source import Source
from helpers.models.walk import Stream, walk


@torch.no_grad()
def branches(model: nn.Module | Source, changes: Mapping[Any, Mapping[str, Tensor]],
             sequences: Sequence[Sequence[int]]) -> Iterator[tuple[Any, Stream]]:
    """(name, stream after the last block) of each change, {parameter: new value}, of a model in memory.

    The unchanged model is walked once; a branch leaves it at the first block that it changes.
    """
    source = Source.of(model)
    for step in walk(source, sequences):
        for name, change in changes.items():
            if min(int(p.removeprefix(f"{source.path}.").split(".")[0]) for p in change) == step.stream.index:
                parameters = {source.model.get_parameter(p): value for p, value in change.items()}
                own = [p.data for p in parameters]
                try:
                    for p, value in parameters.items():
                        p.data = value.to(p)
                    stream = step.stream.through(*source.blocks[step.stream.index:])
                finally:
                    for p, value in zip(parameters, own, strict=True):
                        p.data = value
                yield name, stream
