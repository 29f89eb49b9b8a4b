"""How good is a model: loss, perplexity, KL divergence and agreement with a reference, and exact match of answers.

Everything is kept per text, under the text's id, so that any two models are compared text by text (helpers/measure/stats.py).
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from helpers.measure.stats import Interval, ratio_interval
from helpers.measure.tasks import Item
from helpers.models.layers import instead

PIECE = 1 << 26  # logits that are worked on at a time: with a vocabulary of 260,000 tokens, 258 positions
# What the reference says that is kept for the next model, in numbers: a sixteenth of the memory
REMEMBERED = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 64


@dataclass(frozen=True)
class Sums:
    """Per-text sums over the scored tokens, each of shape [texts]; nll and kl in nats."""

    nll: np.ndarray
    kl: np.ndarray
    agree: np.ndarray
    tokens: np.ndarray

    def mean_nll(self) -> float:
        """Loss, nats/token."""
        return float(self.nll.sum() / self.tokens.sum())

    def perplexity(self) -> float:
        """exp of the mean loss. Protocol: each text is scored alone, from its start token, every token once."""
        return math.exp(self.mean_nll())

    def agreement(self) -> float:
        """Share of tokens at which both models would say the same next."""
        return float(self.agree.sum() / self.tokens.sum())

    def kl_interval(self) -> Interval:
        """KL(reference || model), nats/token, with a 95 % interval over texts."""
        return ratio_interval(self.kl, self.tokens)

    def delta_nll(self, before: "Sums") -> Interval:
        """Loss increase over `before` on the same texts, nats/token, with a paired 95 % interval."""
        if not np.array_equal(self.tokens, before.tokens):
            raise ValueError("the two models were not scored on the same texts; `paired` finds those that they share")
        return ratio_interval(self.nll - before.nll, self.tokens)


@dataclass(frozen=True)
class Scores:
    """What `score` returns: sums over all tokens of each text and over its answer alone, and whether the whole answer
    is the model's own most likely one, token by token (greedy decoding would have said exactly it)."""

    ids: np.ndarray
    tasks: np.ndarray
    all: Sums
    answer: Sums
    exact: np.ndarray

    def select(self, task: str) -> "Scores":
        """The scores of one task."""
        keep = self.tasks == task
        return Scores(self.ids[keep], self.tasks[keep], *(Sums(s.nll[keep], s.kl[keep], s.agree[keep], s.tokens[keep])
                                                          for s in (self.all, self.answer)), self.exact[keep])

    def arrays(self) -> dict[str, np.ndarray]:
        """As named arrays, one value a text: what a cell stores."""
        return {"id": self.ids, "task": self.tasks, "exact": self.exact} | {
            f"{part}_{name}": getattr(sums, name) for part, sums in (("all", self.all), ("answer", self.answer))
            for name in ("nll", "kl", "agree", "tokens")}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> "Scores":
        """The inverse of `arrays`."""
        parts = [Sums(*(arrays[f"{part}_{name}"] for name in ("nll", "kl", "agree", "tokens"))) for part in ("all", "answer")]
        return cls(arrays["id"], arrays["task"], *parts, arrays["exact"])


def right_answers(ids: Sequence[str], exact: Sequence[bool], loss: Sequence[float]) -> dict[str, bool]:
    """{question: whether it was answered right}: word for word, or, where it has choices (tasks.encode_choices), with the right
    answer likelier than each of them; `loss` of the answers in nats/token."""
    told: dict[str, dict[str, float]] = {}
    for i, nll in zip(ids, loss, strict=True):
        told.setdefault(i.split(" or ")[0], {})[i] = nll
    alone = dict(zip(ids, exact, strict=True))
    return {q: bool(alone[q]) if len(of) == 1 else min(of, key=of.__getitem__) == q for q, of in told.items()}


def batched(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of texts of similar lengths, at most `batch_tokens` tokens of them with the padding, or one text."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def padded(items: Sequence[Item]) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens [items, length], padded on the right, where causal attention never looks; and of the tokens after the first,
    [items, length - 1], which are there, and which are in an answer)."""
    rows = [torch.tensor(i.ids) for i in items]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    position = torch.arange(1, ids.shape[1])  # of the predicted token
    everything = position < torch.tensor([len(r) for r in rows])[:, None]
    return ids, everything, everything & (position >= torch.tensor([i.start for i in items])[:, None])


def compared(log_q: Tensor, log_p: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """([nll, kl, agree] at each position, [3, ...]; whether the target is the likeliest token), of log-probabilities
    [..., vocabulary], those of the reference being `log_p`."""
    nll, likeliest = -log_q.gather(-1, targets[..., None])[..., 0], log_q.argmax(-1)
    if log_p is None:
        kl, agree = torch.zeros_like(nll), torch.ones_like(nll)
    else:
        kl, agree = (log_p.exp() * (log_p - log_q)).sum(-1), (likeliest == log_p.argmax(-1)).float()
    return torch.stack([nll, kl, agree]), likeliest == targets


class Judge:
    """Texts to score models on, and the model that they are compared with; what it says is remembered where it fits.

    Raises ValueError if there is nothing to score or ids are not unique.
    """

    def __init__(self, items: Sequence[Item], reference: nn.Module | None = None, batch_tokens: int = 2048):
        if not items:
            raise ValueError("items: expected at least one text to score, got none")
        named = [i.id for i in items if i.id]
        if len(set(named)) < len(named):
            raise ValueError("items: the same id twice, so that results could not be paired by it")
        self.items, self.reference = items, reference
        self.batches = list(batched([len(i.ids) for i in items], batch_tokens))
        self.remembered: dict[int, Any] = {}

    @torch.inference_mode()
    def score(self, model: nn.Module, progress: bool = False) -> Scores:
        """Every text by this model. Without a reference KL is 0 and agreement 1. Raises ValueError if the model puts out
        something that is not finite."""
        sums = np.zeros((2, 4, len(self.items)))  # (all, answer) x (nll, kl, agree, tokens) x items
        exact = np.zeros(len(self.items), dtype=bool)
        for n, batch in enumerate(tqdm(self.batches, disable=not progress, desc="score", leave=False)):
            ids, everything, answer = padded([self.items[i] for i in batch])
            parts = list(self._values(model, n, ids))
            values, right = (torch.cat(p, -1).cpu() for p in zip(*parts, strict=True))
            if not torch.isfinite(values[:2, everything]).all():
                raise ValueError("the model's logits are not finite: its weights are damaged or overflow in this dtype")
            for k, mask in enumerate((everything, answer)):
                sums[k, :3, batch] = torch.where(mask, values, 0).sum(2).T.numpy()
                sums[k, 3, batch] = mask.sum(1).numpy()
            exact[batch] = (right | ~answer).all(1).numpy()
        ids, tasks = (np.array([getattr(i, what) for i in self.items]) for what in ("id", "task"))
        return Scores(ids, tasks, Sums(*sums[0]), Sums(*sums[1]), exact)

    def _values(self, model: nn.Module, n: int, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """([nll, kl, agree], whether the target is the likeliest token) of batch n, some positions at a time."""
        start, against = 0, self._reference(n, ids)
        for log_q in log_probabilities(model, ids):
            targets = ids[:, 1 + start:1 + start + log_q.shape[1]].to(log_q.device)
            start += log_q.shape[1]
            yield compared(log_q, None if against is None else next(against).to(log_q.device), targets)

    def _reference(self, n: int, ids: Tensor) -> Iterator[Tensor] | None:
        """Its log-probabilities of batch n."""
        if self.reference is None:
            return None
        if self.keeps == "log-probabilities":
            if n not in self.remembered:
                self.remembered[n] = list(log_probabilities(self.reference, ids))
            return iter(self.remembered[n])
        if self.keeps == "states" and n not in self.remembered:
            self.remembered[n] = states_of(self.reference, ids)
        return log_probabilities(self.reference, ids, self.remembered.get(n))

    @cached_property
    def keeps(self) -> str | None:
        """What of the reference is remembered: all, or what its body puts out (then its head runs again), or nothing."""
        tokens = sum(len(batch) * len(self.items[batch[-1]].ids) for batch in self.batches)
        if tokens * vocabulary(self.reference) <= REMEMBERED:
            return "log-probabilities"
        return "states" if tokens * self.reference.config.get_text_config().hidden_size <= REMEMBERED else None


def vocabulary(model: nn.Module) -> int:
    return model.config.get_text_config().vocab_size


def states_of(model: nn.Module, ids: Tensor) -> Any:
    """What the body of a model, all but its head, puts out."""
    return model.base_model(input_ids=ids.to(model.device), use_cache=False)


def log_probabilities(model: nn.Module, ids: Tensor, states: Any = None) -> Iterator[Tensor]:
    """Those of the tokens after the first, fp32 [batch, positions, vocabulary], at most `PIECE` of them at a time.

    The body of the model runs once, not at all if its `states` are given; its head is asked for some positions after another.
    """
    ids, body = ids.to(model.device), model.base_model
    a_position = len(ids) * vocabulary(model)
    if whole := a_position * ids.shape[1] <= PIECE:
        parts: list[dict] = [{}]
    else:
        positions = torch.arange(ids.shape[1] - 1, device=ids.device)
        parts = [{"logits_to_keep": part} for part in positions.split(max(1, PIECE // a_position))]
    if states is None and not whole:
        states = states_of(model, ids)
    for part in parts:
        with nullcontext() if states is None else instead({body: lambda *_, **__: states}):
            logits = model(input_ids=ids, use_cache=False, **part).logits.float()
        yield (logits[:, :-1] if whole else logits).log_softmax(-1)


def compare(models: Mapping[str, nn.Module], items: Sequence[Item], reference: nn.Module | None = None,
            progress: bool = False, **options) -> dict[str, Scores]:
    """Score each item by each model, against `reference` if given; it may be among the models. Raises as `Judge`."""
    judge = Judge(items, reference, **options)
    return {name: judge.score(model, progress) for name, model in models.items()}


def score(model: nn.Module, items: Sequence[Item], reference: nn.Module | None = None, **options) -> Scores:
    """`compare` for a single model."""
    return compare({"model": model}, items, reference, **options)["model"]
