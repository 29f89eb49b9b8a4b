"""What one quantized layer does: to its own output, and to the answers of the whole model that is otherwise unchanged.

A layer's turn costs the blocks from its own on: all before them is shared (`helpers/models/branches.py`). Its codes come from
the Gram matrices of one walk, on the inputs of the unquantized model.
"""

import copy
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from helpers.measure.quality import PIECE, REMEMBERED, batched, compared, padded, vocabulary
from helpers.measure.tasks import Item
from helpers.methods.keep import Keep
from helpers.models.branches import branch, branches, changed
from helpers.models.layers import Fold, Layout, hooked
from helpers.models.method import Gram, Method, Outcome, Plan
from helpers.models.quantize import quantize_block
from helpers.models.source import Source
from helpers.models.walk import Step, Stream, walk
from helpers.quantizers.affine import output_error

HEAD, EMBEDDING = "output head", "embedding"  # beside the linears inside the blocks, which have their own names
Arrays = dict[str, np.ndarray]


class Panel:
    """Questions at the entrance of a model in memory, judged by their answers wherever a branch leaves it.

    KL is that from `reference`, another panel of the same items; without one, from this model as it is.
    """

    def __init__(self, model: nn.Module | Source, items: Sequence[Item], reference: "Panel | None" = None,
                 batch_tokens: int = 2048):
        self.source, self.items, self.own = Source.of(model), items, reference is None
        self.batches = list(batched(items, batch_tokens))
        ids, _, self.answers = zip(*(padded([items[i] for i in batch]) for batch in self.batches), strict=True)
        self.targets = [t[:, 1:][mask] for t, mask in zip(ids, self.answers, strict=True)]
        self.entrance = Stream.enter(self.source, ids)
        self.end = self.entrance.through(*self.source.blocks)
        self.reference = reference or self
        size = sum(map(len, self.targets)) * vocabulary(self.source.model)
        self.remembered = list(self._log_probabilities(self.end)) if self.own and size <= REMEMBERED else None

    def log_probabilities(self) -> Iterator[Tensor]:
        """Those of the model as it is."""
        return iter(self.remembered) if self.remembered is not None else self._log_probabilities(self.end)

    @torch.no_grad()
    def _log_probabilities(self, stream: Stream) -> Iterator[Tensor]:
        """[answer tokens, vocabulary], some at a time, after the last block."""
        for batch, mask in zip(stream.batches, self.answers, strict=True):
            for part in batch.hidden[:, :-1][mask.to(batch.hidden.device)].split(PIECE // vocabulary(self.source.model)):
                yield batch.logits(self.source, part[None])[0].float().log_softmax(-1)

    def score(self, stream: Stream | None = None) -> Arrays:
        """The answers after the last block of a branch (none: of the model as it is): sums a question, as in a cell."""
        parts, done = [], 0
        for log_q, log_p in zip(self._log_probabilities(stream or self.end), self.reference.log_probabilities(), strict=True):
            targets = torch.cat(self.targets)[done:(done := done + len(log_q))].to(log_q.device)
            values, right = compared(log_q, log_p, targets)
            parts.append(torch.cat([values, (~right).float()[None], torch.ones_like(values[:1])]).cpu())
        where = torch.cat([torch.tensor(batch)[mask.nonzero()[:, 0]] for batch, mask in zip(
            self.batches, self.answers, strict=True)])
        sums = torch.zeros(5, len(self.items), dtype=torch.float64).index_add_(1, where, torch.cat(parts, 1).double()).numpy()
        if not np.isfinite(sums).all():
            raise ValueError("the model's logits are not finite: its weights are damaged or overflow in this dtype")
        ids, tasks = (np.array([getattr(i, what) for i in self.items]) for what in ("id", "task"))
        return {"id": ids, "task": tasks, "exact": sums[3] == 0, "answer_tokens": sums[4],
                "answer_nll": sums[0], "answer_kl": sums[1], "answer_agree": sums[2]}


    def branches_off(self, stream: Stream, linear: str, W_hat: Tensor) -> Arrays:
        """With this weight in a linear inside a block; `stream` stands before the block."""
        return self.score(branch(self.source, stream, {f"{linear}.weight": W_hat}))

    def enters(self, W_hat: Tensor) -> Arrays:
        """With this embedding. An output head that is the same parameter stays as it is, and so in `leaves`."""
        with changed(self.source.model, {self._name(self.source.model.get_input_embeddings()): W_hat}):
            entrance = Stream.enter(self.source, [b.ids for b in self.entrance.batches])
        return self.score(entrance.through(*self.source.blocks))

    def leaves(self, W_hat: Tensor) -> Arrays:
        """With this output head."""
        with changed(self.source.model, {self._name(self.source.model.get_output_embeddings()): W_hat}):
            return self.score()

    def _name(self, module: nn.Module) -> str:
        return next(n for n, p in self.source.model.named_parameters() if p is module.weight)


class Layer(NamedTuple):
    """A quantized layer: W_hat as it stands in for W, whatever scales were folded, and what is lost of its own output."""

    W_hat: Tensor
    weight_error: float  # ||dW||^2 / ||W||^2
    output_error: float  # ||dW X||^2 / ||W X||^2


@torch.no_grad()
def alone(step: Step, n: str, method: Method) -> Layer | None:
    """Linear `n` of a block, quantized while the others stay; None where the method leaves it in 16 bits."""
    name = f"{step.name}.{n}"
    trial, outcome = replace(step, block=copy.deepcopy(step.block), folded={}), Outcome()
    quantize_block(trial, Plan(Keep(), ((f"^{re.escape(name)}$", method),), inputs="model"), outcome)
    if name not in outcome.codes:
        return None
    s = trial.folded.get(n)
    W, W_hat = step.block.get_submodule(n).weight.float(), outcome.codes[name].dequantize()
    return _layer(W, W_hat if s is None else W_hat / s, step.grams(Gram)[n].H)


def _layer(W: Tensor, W_hat: Tensor, H: Tensor | None) -> Layer:
    own = ((W - W_hat).square().sum() / W.square().sum()).item()
    return Layer(W_hat, own, own if H is None else output_error(W - W_hat, H) / output_error(W, H))


@torch.no_grad()
def _embedding(source: Source, method: Method) -> Layer | None:
    """The embedding, by a method that looks at no input: with one token a row H is diagonal, and GPTQ is rounding."""
    W = source.model.get_input_embeddings().weight.detach()
    return None if method.keeps else _layer(W.float(), method.solve(W, None)[0].stored().dequantize(), None)


class _Tail(nn.Module):
    """The output head as a block: behind a norm of ones, which a scale of its inputs can be folded into."""

    def __init__(self, head: nn.Linear):
        super().__init__()
        self.norm = nn.RMSNorm(head.in_features, device=head.weight.device)
        self.head = nn.Linear(*reversed(head.weight.shape), bias=False, device="meta")
        self.head.weight = nn.Parameter(head.weight.detach().float().clone(), requires_grad=False)


@torch.no_grad()
def head_step(source: Source, last: Stream) -> Step:
    """The output head's turn, its inputs those that the stream after the last block sends it."""
    head = source.model.get_output_embeddings()
    gram = Gram.of(head.in_features, head.weight.device)
    with hooked([(head, lambda args, _: gram.add(args[0]))]):
        for _ in last.logits(source):
            pass
    return Step(HEAD, _Tail(head), last, Layout((("head",),), (Fold("norm", ("head",)),)), True,
                seen={("head",): {Gram: gram}})


class Place(NamedTuple):
    """A layer's turn: how it is quantized, and what the panel says of the model with W_hat in its place."""

    name: str
    quantize: Callable[[Method], Layer | None]
    judge: Callable[[Tensor], Arrays]


def places(panel: Panel, tokens: Sequence[Sequence[int]]) -> Iterator[Place]:
    """The embedding, each linear inside the blocks, the output head; each is to be used before the next is asked for."""
    source, stream, step = panel.source, panel.entrance, None
    yield Place(EMBEDDING, partial(_embedding, source), panel.enters)
    for step in walk(source, tokens):
        for n in [n for group in step.layout.groups for n in group]:
            yield Place(f"{step.name}.{n}", partial(alone, step, n), partial(panel.branches_off, stream, f"{step.name}.{n}"))
        stream, last = stream.through(step.block), step.stream
    yield Place(HEAD, partial(alone, head_step(source, last.through(step.block)), "head"), panel.leaves)


def downwards(panel: Panel, methods: Sequence[Method], tokens: Sequence[Sequence[int]],
              wanted: Callable[[str, Method], bool] = lambda *_: True) -> Iterator[tuple[str, Method, Arrays]]:
    """(layer, method, its cell): each layer quantized alone in the panel's model, by each method that can.

    A cell has the scores of `Panel.score`; `weight_error` and `output_error`, as shares; `quantize_s` and `forward_s`, seconds.
    """
    for place in places(panel, tokens):
        for method in methods:
            if not wanted(place.name, method):
                continue
            started = time.perf_counter()
            if layer := place.quantize(method):
                between = time.perf_counter()
                scores = place.judge(layer.W_hat)
                yield place.name, method, scores | {k: np.array(v) for k, v in {
                    "weight_error": layer.weight_error, "output_error": layer.output_error,
                    "quantize_s": between - started, "forward_s": time.perf_counter() - between}.items()}


def upwards(panel: Panel, raised: Mapping[str, Mapping[str, Tensor]]) -> Iterator[tuple[str, Arrays]]:
    """(name, scores) of each set of weights, {parameter: value}, put back into the panel's model, whose others are quantized.

    The panel's `reference` is the unquantized model.
    """
    for name, stream in branches(panel.source, raised, panel.entrance):
        yield name, panel.score(stream)
