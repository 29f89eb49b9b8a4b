"""How good is a model: loss, perplexity, KL divergence and agreement with a reference, and exact match of answers.

Everything is kept per text, so that two models are compared text by text (helpers/measure/stats.py).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from helpers.measure.stats import Interval, ratio_interval
from helpers.models.texts import Example, Item, render

STRUCTURED = ("json", "tool", "condense")  # tasks whose answer must parse as JSON


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
            raise ValueError("the two models were not scored on the same texts")
        return ratio_interval(self.nll - before.nll, self.tokens)


@dataclass(frozen=True)
class Scores:
    """What `score` returns: sums over all tokens of each text and over its answer alone, and whether the whole answer
    is the model's own most likely one, token by token (greedy decoding would have said exactly it)."""

    tasks: np.ndarray
    all: Sums
    answer: Sums
    exact: np.ndarray

    def select(self, task: str) -> "Scores":
        """The scores of one task."""
        keep = self.tasks == task
        return Scores(self.tasks[keep], *(Sums(s.nll[keep], s.kl[keep], s.agree[keep], s.tokens[keep])
                                          for s in (self.all, self.answer)), self.exact[keep])


def _batches(items: Sequence[Item], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of items of similar length, at most `batch_tokens` tokens of them with the padding."""
    batch: list[int] = []
    for i in sorted(range(len(items)), key=lambda i: len(items[i].ids)):
        if batch and (len(batch) + 1) * len(items[i].ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _compare(logits: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
    """[nll, kl, agree] at each position, [3, batch, length - 1], of logits [batch, length - 1, vocabulary]."""
    nll = cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    log_p, log_q = reference.log_softmax(-1), logits.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return torch.stack([nll, kl, (logits.argmax(-1) == reference.argmax(-1)).float()])


@torch.inference_mode()
def compare(models: Mapping[str, nn.Module], items: Sequence[Item], reference: nn.Module | None = None,
            batch_tokens: int = 2048, progress: bool = False) -> dict[str, Scores]:
    """Score each item by each model, against `reference` if given (else KL is 0 and agreement 1).

    The reference runs once for all of them; it may be among the models. Raises ValueError if there is nothing to score or
    a model puts out something that is not finite.
    """
    if not items:
        raise ValueError("items: expected at least one text to score, got none")
    sums = {name: np.zeros((2, 4, len(items))) for name in models}  # (all, answer) x (nll, kl, agree, tokens) x items
    exact = {name: np.zeros(len(items), dtype=bool) for name in models}
    for batch in tqdm(list(_batches(items, batch_tokens)), disable=not progress, desc="score", leave=False):
        rows = [torch.tensor(items[i].ids) for i in batch]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # on the right: causal attention never looks there
        position = torch.arange(1, ids.shape[1])  # of the predicted token
        everything = position < torch.tensor([len(r) for r in rows])[:, None]
        answer = everything & (position >= torch.tensor([items[i].start for i in batch])[:, None])
        against = None if reference is None else _logits(reference, ids)
        for name, model in models.items():
            logits = against if model is reference else _logits(model, ids)
            targets = ids[:, 1:].to(logits.device)
            values = _compare(logits, logits if against is None else against, targets).cpu()
            if not torch.isfinite(values).all():
                raise ValueError("the model's logits are not finite: its weights are damaged or overflow in this dtype")
            for n, mask in enumerate((everything, answer)):
                sums[name][n, :3, batch] = (values * mask).sum(2).T.numpy()
                sums[name][n, 3, batch] = mask.sum(1).numpy()
            exact[name][batch] = ((logits.argmax(-1) == targets).cpu() | ~answer).all(1).numpy()
    tasks = np.array([i.task for i in items])
    return {name: Scores(tasks, Sums(*sums[name][0]), Sums(*sums[name][1]), exact[name]) for name in models}


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits for the tokens after the first, fp32 [batch, length - 1, vocabulary]."""
    return model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1].float()


def score(model: nn.Module, items: Sequence[Item], reference: nn.Module | None = None, **options) -> Scores:
    """`compare` for a single model."""
    return compare({"model": model}, items, reference, **options)["model"]


@torch.inference_mode()
def generate(model: nn.Module, tokenizer, asked: Sequence[Example], shots: Sequence[Example] = (), batch_size: int = 64,
             max_new_tokens: int = 64, progress: bool = False) -> list[str]:
    """The model's own greedy answers, as text."""
    answers: dict[int, str] = {}
    prompts = [tokenizer.encode(render(tokenizer, e, shots)[0], add_special_tokens=False) for e in asked]
    order = sorted(range(len(asked)), key=lambda i: len(prompts[i]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for at in tqdm(range(0, len(order), batch_size), disable=not progress, desc="generate", leave=False):
        batch = order[at:at + batch_size]
        rows = [torch.tensor(prompts[i]) for i in batch]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True, padding_side="left")
        out = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False,
                             max_new_tokens=max_new_tokens, pad_token_id=pad)
        said = tokenizer.batch_decode(out[:, ids.shape[1]:], skip_special_tokens=True)
        answers |= dict(zip(batch, (s.strip() for s in said), strict=True))
    return [answers[i] for i in range(len(asked))]


def parses(said: str) -> bool:
    """Whether an answer is JSON."""
    try:
        json.loads(said)
    except json.JSONDecodeError:
        return False
    return True


def is_correct(example: Example, said: str) -> bool:
    """Exact match: for structured tasks the same JSON value, else the same words (case and a final stop aside)."""
    if example.task in STRUCTURED:
        return parses(said) and json.loads(said) == json.loads(example.answer)
    return said.strip().rstrip(".").casefold() == example.answer.casefold()
