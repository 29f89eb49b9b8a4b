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
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from helpers.measure.quality import PIECE, REMEMBERED, Judge, compared, padded, vocabulary
from helpers.measure.tasks import Item
from helpers.methods.keep import Keep
from helpers.models.branches import branch, branches, changed
from helpers.models.layers import Fold, Layout, hooked
from helpers.models.local import finished_before, local_modules, only_at, put_out
from helpers.models.method import Gram, Method, Outcome, Plan
from helpers.models.quantize import quantize_block
from helpers.models.source import Source
from helpers.models.walk import Step, Stream, walk
from helpers.quantizers.affine import output_error

HEAD, EMBEDDING = "output head", "embedding"  # beside the linears inside the blocks, which have their own names
Arrays = dict[str, np.ndarray]


class Panel:
    """Questions at the entrance of a model in memory, judged by their answers wherever a branch leaves it.

    KL is that from `reference`, another panel of the same items; without one, from this model as it is. Raises as `Judge`.
    """

    def __init__(self, model: nn.Module | Source, items: Sequence[Item], reference: "Panel | None" = None,
                 batch_tokens: int = 2048):
        self.source, self.items, self.batches = Source.of(model), items, Judge(items, batch_tokens=batch_tokens).batches
        ids, _, self.answers = zip(*(padded([items[i] for i in batch]) for batch in self.batches), strict=True)
        self.targets = [t[:, 1:][mask] for t, mask in zip(ids, self.answers, strict=True)]
        self.entrance = Stream.enter(self.source, ids)
        self.probe = Stream.start(self.source, [range(8)])
        self.local = local_modules(self.source.blocks[-1], self.probe.batches[0].hidden.shape[-1],
                                   partial(self._probed, len(self.source.blocks) - 1))
        self.end = self.to_end(self.entrance)
        self.reference = reference or self
        size = sum(map(len, self.targets)) * vocabulary(self.source.model)
        self.remembered = list(self._log_probabilities(self.end)) if size <= REMEMBERED and not reference else None

    @torch.no_grad()
    def to_end(self, stream: Stream, known: Mapping[str, Sequence] | None = None) -> Stream:
        """After the last block, where what comes before an answer's tokens is right and all else is not to be looked at.

        `known`: what modules of the first of these blocks put out, a batch after another.
        """
        for block in self.source.blocks[stream.index:]:
            outputs, local = [], self.local if block is self.source.blocks[-1] else ()
            given = {n: out for n, out in (known or {}).items() if not any(n.startswith(f"{outer}.") for outer in local)}
            for i, (batch, mask) in enumerate(zip(stream.batches, self.answers, strict=True)):
                with (only_at(block, local, nn.functional.pad(mask, (0, 1)).to(batch.hidden.device)),
                      put_out(block, {n: out[i] for n, out in given.items()})):
                    outputs.append(stream.run(block, batch))
            stream, known = stream.after(outputs), None
        return stream

    @torch.no_grad()
    def through(self, stream: Stream, block: nn.Module) -> tuple[Stream, dict[str, dict[str, list]]]:
        """(the stream after the block, {linear: what is `known` when it alone is changed}) of the block as it is; nothing is
        kept where that is too much."""
        before = finished_before(block, partial(self._probed, stream.index, block))
        kept: dict[str, list] = {n: [] for names in before.values() for n in names}
        outputs = []
        with hooked([(block.get_submodule(n), lambda _, out, n=n: kept[n].append(out)) for n in kept], after=True):
            for batch in stream.batches:
                outputs.append(stream.run(block, batch))
                if sum(t.numel() for outs in kept.values() for out in outs for t in _tensors(out)) > REMEMBERED:
                    before = {}
                    for outs in kept.values():
                        outs.clear()
        return stream.after(outputs), {n: {m: kept[m] for m in names} for n, names in before.items()}

    def log_probabilities(self) -> Iterator[Tensor]:
        """Those of the model as it is."""
        return iter(self.remembered) if self.remembered is not None else self._log_probabilities(self.end)

    @torch.no_grad()
    def _log_probabilities(self, stream: Stream, change: Mapping[str, Tensor] | None = None) -> Iterator[Tensor]:
        """[answer tokens, vocabulary], some at a time, after the last block; what follows it with this {parameter: value}."""
        for batch, mask in zip(stream.batches, self.answers, strict=True):
            for part in _pieces(batch.hidden[:, :-1][mask.to(batch.hidden.device)], self.source):
                with changed(self.source.model, change or {}):
                    logits = batch.logits(self.source, part[None])[0]
                yield logits.float().log_softmax(-1)

    def score(self, stream: Stream | None = None, head: Mapping[str, Tensor] | None = None) -> Arrays:
        """The answers after the last block of a branch (none: of the model as it is), and with this {parameter: value} of the
        output head: sums a question, as in a cell."""
        parts, done = [], 0
        ours = self._log_probabilities(stream or self.end, head)
        for log_q, log_p in zip(ours, self.reference.log_probabilities(), strict=True):
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

    def branches_off(self, stream: Stream, linear: str, known: Mapping[str, Sequence], W_hat: Tensor) -> Arrays:
        """With this weight in a linear inside a block; `stream` stands before the block."""
        return self.score(branch(self.source, stream, {f"{linear}.weight": W_hat}, lambda s: self.to_end(s, known)))

    def enters(self, W_hat: Tensor) -> Arrays:
        """With this embedding. An output head that is the same parameter stays as it is, and so in `leaves`."""
        with changed(self.source.model, {self._name(self.source.model.get_input_embeddings()): W_hat}):
            entrance = Stream.enter(self.source, [b.ids for b in self.entrance.batches])
        return self.score(self.to_end(entrance))

    def leaves(self, W_hat: Tensor) -> Arrays:
        """With this output head."""
        return self.score(head={self._name(self.source.model.get_output_embeddings()): W_hat})

    def _probed(self, index: int, block: nn.Module, hidden: Tensor | None = None) -> Tensor:
        return replace(self.probe, index=index).run(block, self.probe.batches[0], hidden)

    def _name(self, module: nn.Module) -> str:
        return next(n for n, p in self.source.model.named_parameters() if p is module.weight)


def _tensors(out: Any) -> list[Tensor]:
    return [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)]


def _pieces(states: Tensor, source: Source) -> Iterator[Tensor]:
    """[tokens, width], as many at a time as there is room for the logits of."""
    return iter(states.split(max(1, PIECE // vocabulary(source.model))))


class Layer(NamedTuple):
    """A quantized layer: W_hat as it stands in for W, whatever scales were folded, and what is lost of its own output."""

    W_hat: Tensor
    weight_error: float  # ||dW||^2 / ||W||^2
    output_error: float  # ||dW X||^2 / ||W X||^2


@torch.no_grad()
def alone(step: Step, n: str, method: Method) -> Layer | None:
    """Linear `n` of a block, quantized while the others stay; None where the method leaves it in 16 bits."""
    name, gram = f"{step.name}.{n}", step.grams(Gram).get(n)
    trial, outcome = replace(step, block=copy.deepcopy(step.block), folded={}), Outcome()
    quantize_block(trial, Plan(Keep(), ((f"^{re.escape(name)}$", method),), inputs="model"), outcome)
    if name not in outcome.codes:
        return None
    W, W_hat = step.block.get_submodule(n).weight.float(), outcome.codes[name].dequantize()
    dW = W - (W_hat := W_hat / trial.folded[n] if n in trial.folded else W_hat)
    own = (dW.square().sum() / W.square().sum()).item()
    return Layer(W_hat, own, output_error(dW, gram.H) / output_error(W, gram.H) if gram else own)


class _Alone(nn.Module):
    """A matrix outside the blocks as a block of one linear, behind a norm of ones, which a scale can be folded into."""

    def __init__(self, W: Tensor):
        super().__init__()
        self.norm = nn.RMSNorm(W.shape[1], device=W.device)
        self.linear = nn.Linear(*reversed(W.shape), bias=False, device="meta")
        self.linear.weight = nn.Parameter(W.detach().float(), requires_grad=False)


def embedding_step(source: Source) -> Step:
    """The embedding's turn, for methods that look at no input: with one token a row H is diagonal, and GPTQ is rounding."""
    return Step(EMBEDDING, _Alone(source.model.get_input_embeddings().weight), Stream(()), Layout((), ()))


@torch.no_grad()
def head_step(source: Source, last: Stream) -> Step:
    """The output head's turn, its inputs those that the stream after the last block sends it."""
    head = source.model.get_output_embeddings()
    gram = Gram.of(head.in_features, head.weight.device)
    with hooked([(head, lambda args, _: gram.add(args[0]))]):
        for batch in last.batches:
            for part in _pieces(batch.hidden.flatten(0, 1), source):
                batch.logits(source, part[None])
    group = ("linear",)
    return Step(HEAD, _Alone(head.weight), last, Layout((group,), (Fold("norm", group),)), True, seen={group: {Gram: gram}})


class Place(NamedTuple):
    """A layer's turn: how it is quantized, and what the panel says of the model with W_hat in its place."""

    name: str
    quantize: Callable[[Method], Layer | None]
    judge: Callable[[Tensor], Arrays]


def places(panel: Panel, tokens: Sequence[Sequence[int]]) -> Iterator[Place]:
    """The embedding, each linear inside the blocks, the output head; each is to be used before the next is asked for."""
    source, stream = panel.source, panel.entrance
    yield Place(EMBEDDING, partial(alone, embedding_step(source), "linear"), panel.enters)
    for step in walk(source, tokens):
        after, known = panel.through(stream, step.block)
        for n in [n for group in step.layout.groups for n in group]:
            yield Place(name := f"{step.name}.{n}", partial(alone, step, n),
                        partial(panel.branches_off, stream, name, known.get(n, {})))
        stream = after
    yield Place(HEAD, partial(alone, head_step(source, step.stream.through(step.block)), "linear"), panel.leaves)


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
    for name, stream in branches(panel.source, raised, panel.entrance, panel.to_end):
        yield name, panel.score(stream)
